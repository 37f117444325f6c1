"""A notebook's session on the emoji chatbot, call by call: what asking several questions of one run costs.

    python benchmarks/session.py [--before CHECKOUT] [--rounds 3] [--small] [--out docs]

Each session is a process of its own: the chatbot is trained, then evaluated, its dose-response is measured at nine
strengths, effects of its positions, sites, cells and pairs (together where the checkout can), the path of its edit, and
a report is written. Sessions take turns: that of another checkout (`--before`), the present one, and the present one
that forgets before every call what the calls before it computed. Then `reftlens report` in a process of its own, in
either checkout. CPU seconds of one thread, SmolLM2-135M-Instruct in float32. Writes docs/performance_session.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from text_report import head

HERE = Path(__file__).resolve().parent
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
NAMES = {"before": "before", "now": "now", "forgetful": "now, without a memory"}
KINDS = ("positions", "sites", "cells", "pairs")
REPORT = "`reftlens report` in a fresh process"


def effects(rl, *arguments, **settings) -> None:
    """Of all kinds, asked together where the checkout can."""
    try:
        rl.effects(*arguments, of=KINDS, **settings)
    except (TypeError, ValueError):
        for kind in KINDS:
            rl.effects(*arguments, of=kind, **settings)


def session(options: argparse.Namespace) -> None:
    """Print the CPU seconds of each call, and what the process holds at most."""
    import torch

    import reftlens as rl
    from reftlens.tasks import emoji

    torch.set_num_threads(1)
    model = rl.load_model(progress=False)
    examples = rl.load_examples(emoji.data_file("emoji.jsonl"))[: 8 if options.small else None]
    data = rl.encode(model, examples, chat=True)
    reft, config = emoji.emoji_reft(model.cfg.d_model), emoji.SETTINGS
    if options.small:
        config = config.replace({"steps": 2})
    fewer = {"decoding": rl.Decoding(max_new_tokens=2)} if options.small else {}
    strengths, quiet = STRENGTHS[: 3 if options.small else None], {"progress": False}
    run = None

    def train():
        nonlocal run
        run = rl.fit(reft, model, data, config, **quiet)

    calls = {
        "fit": train,
        "evaluate": lambda: rl.evaluate(reft, model, data, **quiet),
        f"dose_response, {len(strengths)} strengths": lambda: rl.dose_response(reft, model, data, strengths, **quiet),
        f"effects of {', '.join(KINDS)}": lambda: effects(rl, reft, model, data, **quiet),
        "edit_path": lambda: rl.places.edit_path(reft, model, data, **quiet),
        "report": lambda: rl.report(reft, model, data, options.folder / "page.html", run=run, **fewer, **quiet),
    }
    seconds = {}
    for name, call in calls.items():
        if options.session == "forgetful":
            rl.training.forget()
        began = time.process_time()
        call()
        seconds[name] = time.process_time() - began
        print(f"{options.session} {name} {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    rl.save(reft, options.folder / "run", model, run=run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def in_process(command: list, checkout: Path) -> tuple[str, float]:
    """What a process writes, and its CPU seconds, all told."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=checkout
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def measure(options: argparse.Namespace) -> dict:
    """Of each kind of session, seconds of each call in each round, its peak memory, and a report by itself."""
    import reftlens as rl

    trees = {"before": options.before.resolve()} if options.before else {}
    trees |= {"now": HERE.parent} | ({"forgetful": HERE.parent} if hasattr(rl, "forget") else {})
    results: dict = {name: {"seconds": {}, "peak": []} for name in trees}
    for _ in range(options.rounds):
        for name, checkout in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--session", name, "--folder", folder]
                out, _ = in_process([*command, *(["--small"] if options.small else [])], checkout)
                answer = json.loads(out.splitlines()[-1])
                if name != "forgetful":
                    report = [sys.executable, "-m", "reftlens", "report", f"{folder}/run", "--quiet"]
                    if not options.small:
                        answer["seconds"][REPORT] = in_process(report, checkout)[1]
            results[name]["peak"].append(answer["peak"])
            for call, seconds in answer["seconds"].items():
                results[name]["seconds"].setdefault(call, []).append(seconds)
    return results


def page(results: dict, options: argparse.Namespace, load: tuple[float, float]) -> str:
    command = f"python benchmarks/session.py --rounds {options.rounds}" + (" --small" if options.small else "")
    columns = ["call", *(NAMES[name] for name in results), *(["now / before"] if "before" in results else [])]
    lines = [
        "## A session",
        "",
        "The questions of a notebook asked of one emoji run, one after the other, each session in a process of its "
        f"own: CPU seconds of one thread, medians of {options.rounds} interleaved rounds, ratios medians of those of "
        f"each round (`{command}`; load of the machine {load[0]:.1f} to {load[1]:.1f}, one of it our own).",
        "",
        *head(columns),
    ]
    calls = list(results["now"]["seconds"])
    for each in results.values():
        parts = [each["seconds"][call] for call in calls if call != REPORT]
        each["seconds"]["**in sum**"] = [sum(turn) for turn in zip(*parts, strict=True)]
    order = [*(call for call in calls if call != REPORT), "**in sum**", *(call for call in calls if call == REPORT)]
    for call in order:
        every = {name: each["seconds"].get(call) for name, each in results.items()}
        cells = [call, *(f"{median(times):.1f}" if times else "" for times in every.values())]
        if "before" in every:
            pairs = zip(every["now"], every["before"], strict=True)
            cells.append(f"{median(now / before for now, before in pairs):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    peaks = ", ".join(f"{NAMES[name]} {median(each['peak']) / 1e6:.0f}" for name, each in results.items())
    return "\n".join([*lines, "", f"Peak memory of the process in MB: {peaks}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="8 rows, 2 steps, 3 strengths; writes nothing")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--session", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.session:
        session(options)
        return
    loads = [os.getloadavg()[0]]
    results = measure(options)
    loads.append(os.getloadavg()[0])
    text = page(results, options, (min(loads), max(loads)))
    print(text)
    if not options.small:
        (options.out / "performance_session.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
