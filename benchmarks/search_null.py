"""Is what a search says of itself true? Tasks with nothing to find, and tasks with something.

    python benchmarks/search_null.py [--tasks 200] [--planted]
    python benchmarks/search_null.py --simulated
    python benchmarks/search_null.py --table

Rows of four tokens, 64 to train on, 60 to choose by and 60 to report on, answered by one of four tokens: drawn at
random (nothing to find, chance is 0.25), or with `--planted` turned from the value that the last token carries, every
fifth at random. The metric is accuracy. Of each task a line is written to `docs/search_null.jsonl` or
`docs/search_found.jsonl`: the interval on the test rows, dev score, optimism. A task that is there already is left out,
so that the script can be stopped. `--table` writes `docs/search_null.md` from the lines. `--simulated` takes scores of
48 equally good candidates from a random generator (60 rows of 0 or 1, correlation 0.5) in place of a search.
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

CHANCE = 0.25
DOCS = Path(__file__).parents[1] / "docs"
PAGE = """\
## What a search says of itself, on tasks whose truth is known

`python benchmarks/search_null.py`, then with `--planted`; accuracy, chance is 0.25. Dev score and optimism are of the
chosen setting where it was chosen, the test score is of the same on rows that nothing was chosen by; the last column is
the best of all settings when the labels of the dev rows are shuffled. ± is one standard error over tasks.

| | tasks | whose interval holds chance | dev score | optimism | test score | dev less optimism less test | shuffled |
|---|--:|--:|--:|--:|--:|--:|--:|"""
NULL, FOUND = DOCS / "search_null.jsonl", DOCS / "search_found.jsonl"


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


def row_of(name: str, lines: list[dict[str, Any]], truth: float | None) -> str:
    mean = lambda values: sum(values) / len(lines)  # noqa: E731
    covers = None if truth is None else sum(x["test"][0] <= truth <= x["test"][2] for x in lines)
    drop = torch.tensor([x["dev"] - x["optimism"] - x["test"][1] for x in lines])
    columns = (
        f"{len(lines)}",
        "" if covers is None else f"{covers}",
        f"{mean([x['dev'] for x in lines]):.3f}",
        f"{mean([x['optimism'] for x in lines]):.3f}",
        f"{mean([x['test'][1] for x in lines]):.3f}",
        f"{drop.mean():+.3f} ± {drop.std() / len(drop) ** 0.5:.3f}",
        f"{mean([x['shuffled'] or 0.0 for x in lines]):.3f}",
    )
    return f"| {name} | {' | '.join(columns)} |"


def table() -> str:
    rows = [row_of("nothing to find", known(NULL), CHANCE), row_of("something to find", known(FOUND), None)]
    return "\n".join([PAGE, *rows, ""])


def known(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


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
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--simulated", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.simulated:
        print(simulated(options.tasks))
        return
    if options.table:
        (DOCS / "search_null.md").write_text(table(), encoding="utf-8")
        return
    path, noise = (FOUND, 0.2) if options.planted else (NULL, 1.0)
    for task in sorted(set(range(options.tasks)) - {line["task"] for line in known(path)}):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(task, noise)) + "\n")


if __name__ == "__main__":
    main()
