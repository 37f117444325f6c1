"""Is what a search says of itself true? Tasks with nothing to find, and tasks with something.

    python benchmarks/search_null.py [--tasks 200] [--planted] [--out docs/search_null.jsonl] [--table]
    python benchmarks/search_null.py --simulated

Rows of four tokens, 64 to train on, 60 to choose by and 60 to report on, answered by one of four tokens: drawn at
random (nothing to find, chance is 0.25), or with `--planted` turned from the value that the last token carries, every
fifth at random (0.85 is right). The metric is accuracy. Of each task a line is written: the interval on the test rows,
dev score, optimism. A task that is there already is left out, so that the script can be stopped. `--simulated` takes
scores of 48 equally good candidates from a random generator (60 rows of 0 or 1, correlation 0.5) in place of a search.
"""

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planted import ANSWERS, pairs, planted

import reftlens as rl

CHANCE, RIGHT = 0.25, 0.85


def rows(count: int, seed: int, noise: float) -> Any:
    own, generator = pairs(planted().value, count, seed)[1], torch.Generator().manual_seed(seed + 10**6)
    answers, tokens = torch.tensor(ANSWERS), own.tokens.clone()
    turned = answers[(planted().value[own.tokens[:, 3]] + 1) % 4]
    wrong = torch.rand(count, generator=generator) < noise
    tokens[:, -1] = torch.where(wrong, answers[torch.randint(0, 4, (count,), generator=generator)], turned)
    return replace(own, tokens=tokens)


def line_of(task: int, noise: float) -> dict[str, Any]:
    space = rl.selection.Space(layers=(0, 2), ranks=(1, 2, 4), lrs=(0.03, 0.1), strengths=(-1.0, 0.5, 1.0))
    data = [rows(count, 3 * task + part, noise) for part, count in enumerate((64, 60, 60))]
    config = rl.FitConfig(steps=18, batch_size=32)
    settings = {"metric": "accuracy", "config": config, "seeds": 1, "seed": task, "progress": False}
    result = rl.search(planted().model, *data, space, **settings)
    shuffled = result.optimism.permuted
    return {
        "task": task,
        "dev": result.dev.value,
        "optimism": result.optimism.expected.value,
        "test": [result.test.low, result.test.value, result.test.high],
        "shuffled": None if shuffled is None else shuffled.value,
    }


def table(lines: list[dict[str, Any]], truth: float) -> str:
    mean = lambda values: sum(values) / len(lines)  # noqa: E731
    covers = sum(x["test"][0] <= truth <= x["test"][2] for x in lines)
    drop = torch.tensor([x["dev"] - x["optimism"] - x["test"][1] for x in lines])
    return (
        f"{len(lines)} tasks: the 95 % interval of the test score covers {truth:g} in {covers}; dev score "
        f"{mean([x['dev'] for x in lines]):.3f}, optimism {mean([x['optimism'] for x in lines]):.3f}, test score "
        f"{mean([x['test'][1] for x in lines]):.3f}: dev less optimism is {drop.mean():+.3f} ± "
        f"{drop.std() / len(drop) ** 0.5:.3f} off; best on shuffled labels "
        f"{mean([x['shuffled'] or 0.0 for x in lines]):.3f}"
    )


def simulated(tasks: int) -> str:
    """How much too good the chosen score is, before and after its optimism is taken off, with standard errors."""
    options, count, generator = 48, 60, torch.Generator().manual_seed(0)
    before, after = torch.zeros(2, tasks)
    for task in range(tasks):
        common = torch.randn(1, count + 400, generator=generator)
        hits = 0.5**0.5 * (common + torch.randn(options, count + 400, generator=generator)) > 0.67
        dev, test = hits.double().split([count, 400], dim=1)
        size = torch.tensor((1, 2, 4, 8)).repeat(options // 4)
        finals = rl.selection.Options(dev, dev, torch.zeros_like(dev), torch.inf, size, torch.arange(count))
        chosen = finals.chosen(torch.ones(count, dtype=torch.float64))
        before[task] = dev[chosen].mean() - test[chosen].mean()
        after[task] = before[task] - rl.selection.optimism(finals, resamples=200, seed=task).value
    means = (f"{x.mean():+.4f} ± {x.std() / tasks**0.5:.4f}" for x in (before, after))
    return "{} too high, {} after optimism is taken off, over {} tasks".format(*means, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "search_null.jsonl")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--simulated", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.simulated:
        print(simulated(options.tasks))
        return
    known = [json.loads(x) for x in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.table:
        print(table(known, RIGHT if options.planted else CHANCE))
        return
    for task in range(options.tasks):
        if task not in {line["task"] for line in known}:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line_of(task, 0.2 if options.planted else 1.0)) + "\n")


if __name__ == "__main__":
    main()
