"""Every architecture that TransformerLens knows, right or refused; writes docs/architectures.md.

    python benchmarks/architectures.py                      # all, about 15 minutes on one core
    python benchmarks/architectures.py --only GPTNeoForCausalLM Phi3ForCausalLM:longrope     # prints, writes nothing

A tiny random model of each class is trained, scored, generated from, saved and loaded, and compared at every step
with a plain transformers model that computes one row at a time (`row_oracle.py`). Each runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers as it is imported
os.environ["PIP_REQUIRE_VIRTUALENV"] = os.environ["PIP_NO_INDEX"] = "1"
os.environ["PIP_FIND_LINKS"] = os.environ["PIP_EXTRA_INDEX_URL"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402 (torch reads the number of threads when it is imported)
import zoo  # noqa: E402
from architecture_checks import TOLERANCE, Checked, check, ending  # noqa: E402

SECONDS = 120
CONE, FULL, PARTLY = "right on the cone", "right in full", "right, the rest refused"
REFUSED, RAW, WRONG = "refused in one sentence", "an error, not a sentence", "silently wrong"
FIRST = "fit (block 1, last)"
KINDS = {"class": zoo.CLASSES, "setting of a class": zoo.VARIANTS, "class without an adapter": zoo.NO_ADAPTER}


def guarded(name: str) -> dict[str, Any]:
    """`check` in a process of its own: a crash or a hang is a result, too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    checked = asdict(Checked(name))
    try:
        if receiver.poll(SECONDS):
            checked = receiver.recv()
        else:
            checked["parts"]["all"] = ("raw", f"no answer within {SECONDS} s")
    except EOFError:
        process.join()
        checked["parts"]["all"] = ("raw", f"the process ended with status {process.exitcode}")
    process.kill()
    process.join()
    return checked


def _child(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        sender.send(check(name))
    except Exception as error:  # of the check itself
        sender.send(asdict(Checked(name, {"all": ("raw", f"the check failed: {ending(error)[1]}")})))


def verdict(checked: dict[str, Any]) -> str:
    """One of six; where nothing boots, what counts is what a user meets, `load_model`."""
    parts = checked["parts"]
    if any(status == "wrong" for status, _ in parts.values()):
        return WRONG
    if FIRST not in parts:
        return REFUSED if parts.get("load_model", parts["transformers"])[0] == "refused" else RAW
    used = {part: status for part, (status, _) in parts.items() if part not in ("boot", "load_model")}
    if "raw" in used.values():
        return RAW
    if used[FIRST] == "refused":
        return REFUSED
    if "refused" in used.values():
        return PARTLY
    ways = [text for place, text in checked["computation"].items() if "MLP" not in place]
    return CONE if all(text.startswith("light cone") for text in ways) else FULL


def notes(checked: dict[str, Any]) -> str:
    """Every part that did not end right, with the words that ended it; equal words once."""
    endings: dict[str, list[str]] = {}
    for part, (status, text) in checked["parts"].items():
        if status != "right":
            words = text if len(text) < 260 else f"{text[:200]} … ({len(text)} characters)"
            endings.setdefault(f"{status}: {words}", []).append(part)
    lines = [f"{', '.join(parts)} {words}" for words, parts in endings.items()]
    lines += ["tried to run `pip install torchvision`"] * any("pip" in command for command in checked["commands"])
    return _cell("; ".join(lines))


def computation(checked: dict[str, Any]) -> str:
    """On the cone, or in full and why, and at which places where they differ."""
    ways: dict[str, list[str]] = {}
    for place, text in checked["computation"].items():
        way = "cone" if text.startswith("light cone") else f"full ({text.removeprefix('full computation: ')})"
        ways.setdefault(way, []).append(place)
    return _cell(", ".join(way if len(ways) == 1 else f"{way} at {'; '.join(at)}" for way, at in ways.items()))


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def document(results: list[dict[str, Any]], seconds: float) -> str:
    """docs/architectures.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))
    verdicts = {checked["name"]: verdict(checked) for checked in results}
    booted = sum(checked["parts"].get("boot", ("",))[0] == "right" for checked in results)
    lines = [
        "# Architectures\n",
        f"`python benchmarks/architectures.py`, {seconds / 60:.0f} minutes on one core ({versions}).\n",
        "A tiny random model, float32 on a CPU, of every transformers class that TransformerLens has an adapter for, "
        "remote code apart, beside a plain transformers model with one forward hook that computes one row at a time. "
        "Right means: the loss falls; logits, loss and gradients of every step and the losses of `evaluate` differ by "
        f"at most {TOLERANCE:g} of the largest value (gradients, where that is more, by what a change of each weight "
        "by 1e-6 does to them); greedy tokens of a batch, of each prompt alone and of prefilled prompts "
        "are the same; what was saved can be loaded. Edits are at the output of blocks, and at that of an MLP. "
        f"{booted} of {len(results)} rows boot; `load_model` is asked for the same weights in a folder.\n",
        f"| verdict | {' | '.join(KINDS)} |\n|---|{'---:|' * len(KINDS)}",
    ]
    for kind in (CONE, FULL, PARTLY, REFUSED, RAW, WRONG):
        counts = [str(sum(verdicts.get(name) == kind for name in names)) for names in KINDS.values()]
        lines.append(f"| {kind} | {' | '.join(counts)} |")
    lines.append("\n| row | verdict | computed | largest difference | `load_model` | what was not right |")
    lines.append("|---|---|---|---:|---|---|")
    for checked in results:
        name, loaded = checked["name"], checked["parts"].get("load_model", ("",))[0]
        cells = (name, verdicts[name], computation(checked), f"{checked['error']:.0e}", loaded, notes(checked))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(zoo.ROWS), metavar="NAME", help="these rows, and no document")
    parser.add_argument("--json", type=Path, help="also write everything that came out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "architectures.md")
    options = parser.parse_args()
    began, results = time.perf_counter(), []
    zoo.tokenizer()
    for name in options.only or zoo.ROWS:
        checked = guarded(name)
        results.append(checked)
        how = f"{checked['error']:.0e}, {checked['seconds']:.0f} s"
        print(f"{name}: {verdict(checked)} ({how}) {notes(checked)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if not options.only:
        options.out.write_text(document(results, time.perf_counter() - began), encoding="utf-8")


if __name__ == "__main__":
    main()
