"""Every architecture that TransformerLens knows, right or refused; writes docs/architectures.md.

    python benchmarks/architectures.py                      # all, about 15 minutes on one core
    python benchmarks/architectures.py --only GPTNeoForCausalLM Phi3ForCausalLM:longrope     # prints, writes nothing

A tiny random model of each class is trained, scored, generated from, saved and loaded, and compared at every step
with a plain transformers model that computes one row at a time (`oracle.py`). Each runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import zoo
from architecture_checks import TOLERANCE, check

SECONDS = 120
CONE, FULL, PARTLY, REFUSED, RAW, WRONG = (
    "right on the cone", "right in full", "right, the rest refused", "refused in one sentence",
    "an error, not a sentence", "silently wrong",
)  # fmt: skip


def guarded(name: str) -> dict[str, Any]:
    """`check` in a process of its own: a crash or a hang is a result, too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    told: dict[str, Any] = {"name": name, "parts": {}, "computation": {}, "error": 0.0, "warnings": [], "commands": [], "seconds": 0}
    try:
        if not receiver.poll(SECONDS):
            told["parts"]["all"] = ("raw", f"no answer within {SECONDS} s")
        else:
            told = receiver.recv()
    except EOFError:
        process.join()
        told["parts"]["all"] = ("raw", f"the process ended with status {process.exitcode}")
    process.kill()
    process.join()
    return told


def _child(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sender.send(check(name))


def verdict(told: dict[str, Any]) -> str:
    parts = told["parts"]
    if any(status == "wrong" for status, _ in parts.values()):
        return WRONG
    if "fit (block 1, last)" not in parts:  # nothing booted: what the user meets is load_model
        return REFUSED if parts.get("load_model", parts.get("transformers", ("raw", "")))[0] == "refused" else RAW
    used = {part: status for part, (status, _) in parts.items() if part.startswith(("fit", "eval", "gen", "save"))}
    if "raw" in used.values():
        return RAW
    if used["fit (block 1, last)"] == "refused":
        return REFUSED
    if "refused" in used.values():
        return PARTLY
    return CONE if all(text.startswith("light cone") for place, text in told["computation"].items() if "MLP" not in place) else FULL


def notes(told: dict[str, Any]) -> str:
    """What was not right, each part of the check with the words that ended it, equal words once."""
    said: dict[str, list[str]] = {}
    for part, (status, text) in told["parts"].items():
        if status != "right":
            said.setdefault(f"{status}: {text}", []).append(part)
    lines = [f"{', '.join(parts)} {text if len(text) < 240 else text[:200] + f' … ({len(text)} characters)'}" for text, parts in said.items()]
    if any("pip" in command for command in told["commands"]):
        lines.append("tried to run `pip install torchvision`")
    return "; ".join(lines).replace("\n", " ").replace("|", "\\|")


def computed(told: dict[str, Any]) -> str:
    """Cone or full, and why; where an edit at an MLP is computed otherwise, that too."""
    ways: dict[str, list[str]] = {}
    for place, text in told["computation"].items():
        way = "cone" if text.startswith("light cone") else text.removeprefix("full computation: ").join(("full (", ")"))
        ways.setdefault(way, []).append(place)
    said = [way if len(ways) == 1 else f"{way} at {'; '.join(places)}" for way, places in ways.items()]
    return ", ".join(said).replace("|", "\\|")


def write(results: list[dict[str, Any]], path: Path, seconds: float) -> None:
    import transformers
    from importlib.metadata import version

    verdicts = {told["name"]: verdict(told) for told in results}
    groups = {"class": zoo.CLASSES, "setting of a class": zoo.VARIANTS, "class without an adapter": zoo.NO_ADAPTER}
    lines = [
        "# Architectures",
        "",
        f"`python benchmarks/architectures.py`, {seconds / 60:.0f} minutes on one core: reftlens with torch "
        f"{torch.__version__}, transformers {transformers.__version__}, TransformerLens {version('transformer-lens')}.",
        "",
        "A tiny random model (float32, CPU) of every transformers class that TransformerLens has an adapter for, remote code "
        "apart, beside a plain transformers model with one forward hook, one row at a time. Right means: the loss falls; "
        f"logits, loss and gradients of every step and the losses of `evaluate` differ by at most {TOLERANCE:g} of the "
        "largest value; greedy tokens of a batch, of each prompt alone and of prefilled prompts are the same; saved and "
        "loaded again.",
        "",
        "| verdict | " + " | ".join(f"{kind}" for kind in groups) + " |",
        "|---|" + "---:|" * len(groups),
    ]
    for kind in (CONE, FULL, PARTLY, REFUSED, RAW, WRONG):
        lines.append(f"| {kind} | " + " | ".join(str(sum(verdicts.get(n) == kind for n in g)) for g in groups.values()) + " |")
    booted = [told for told in results if told["parts"].get("boot", ("",))[0] == "right"]
    lines += ["", f"{len(booted)} of {len(results)} rows boot. `load_model` is asked for the same weights in a folder.", ""]
    lines += ["| row | verdict | computed | largest difference | `load_model` | what was said |", "|---|---|---|---:|---|---|"]
    for told in results:
        loaded = told["parts"].get("load_model", ("",))[0]
        lines.append(f"| {told['name']} | {verdict(told)} | {computed(told)} | {told['error']:.0e} | {loaded} | {notes(told)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these rows, and no file")
    parser.add_argument("--json", type=Path, help="also write everything that was found")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "architectures.md")
    options = parser.parse_args()
    began, results = time.perf_counter(), []
    zoo.tokenizer()
    for name in options.only or zoo.ROWS:
        told = guarded(name)
        results.append(told)
        print(f"{name}: {verdict(told)} ({told['error']:.0e}, {told['seconds']:.0f} s) {notes(told)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if not options.only:
        write(results, options.out, time.perf_counter() - began)


if __name__ == "__main__":
    main()
