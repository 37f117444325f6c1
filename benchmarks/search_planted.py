"""A search beside the full grid, random search and plain halving, on networks in which an edit works at one place.

    python benchmarks/search_planted.py [--seeds 100:140] [--out docs/search_planted.jsonl] [--table]

The grid is 96 cells (6 layers x 8 tokens x 2 hooks) x ranks 1, 2, 4, 8 x 3 rates x 2 signs, 60 steps each; it is
trained in plain torch (`planted_grid.py`). Right means: the recommended (site, token) is in the equivalence set of the
grid (dev score within one standard error of the best cell), the rank within one doubling of the planted one, the sign
exact. One line is written for each network, and one that is there already is left out, so that it can be stopped.
Random search draws cells of the grid and takes the best on the dev rows, with both signs of each for its steps; plain
halving draws cells with one sign each and lets a third of them go on at 7 and 20 steps; both have the steps that the
search took. `--table` writes what the lines say.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from planted_grid import RANKS, RATES, SIGNS, STEPS, Cell, Network, Rows, grid

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted_place
from planted_place import TOKENS, place, rows

import reftlens as rl

BUDGET, RUNGS = 4500, (7, 20, 60)
CONFIG = rl.FitConfig(steps=STEPS, batch_size=8)


def data_of(truth: Any) -> tuple[Any, Any, Any]:
    return rows(truth, 256, 2, 1), rows(truth, 100, 3, truth.sign), rows(truth, 100, 4, truth.sign)


def full_grid(truth: Any) -> tuple[list[Cell], torch.Tensor]:
    """`[rung, cell, sign, row]`."""

    def weights(rank: int) -> Any:
        module = rl.LoReFT(planted_place.D, rank, init="identity", generator=torch.Generator().manual_seed(0))
        return [p.detach().clone() for p in (module.frame.matrix, module.W, module.b)]

    train, dev, _ = (Rows(b.tokens[:, :TOKENS], b.tokens[:, TOKENS]) for b in data_of(truth))
    order = [list(CONFIG.micro_batches(step, len(train.ids))[0]) for step in range(STEPS)]
    return grid(Network(truth.model.original_model), weights, train, dev, order, RUNGS)


def searched(truth: Any) -> dict[str, Any]:
    hooks = [getattr(rl, name) for name in planted_place.HOOKS]
    space = rl.selection.Space(hooks=hooks, ranks=RANKS, lrs=RATES)
    settings = {"config": CONFIG, "budget": BUDGET, "seeds": 2, "progress": False}
    result = rl.search(truth.model, *data_of(truth), space, **settings)
    axes = result.candidate.axes
    chosen = [axes["hook"].removeprefix("hook_"), axes["layer"], int(axes["positions"].strip("Nth(k=)")), axes["rank"]]
    sign = 1 if result.variant.strength > 0 else -1
    numbers = {name: getattr(result, name).value for name in ("dev", "test", "unedited_test")}
    return {"chosen": [*chosen, sign], "steps": result.steps, "optimism": result.optimism.expected.value, **numbers}


def random_search(cells: list[Cell], scores: torch.Tensor, steps: int, seed: int) -> list[Any]:
    drawn = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[: steps // STEPS]
    means = scores[-1, drawn].mean(dim=-1)
    best = divmod(int(means.argmax()), len(SIGNS))
    cell = cells[int(drawn[best[0]])]
    return [cell.hook, cell.layer, cell.token, cell.rank, SIGNS[best[1]]]


def plain_halving(cells: list[Cell], scores: torch.Tensor, steps: int, seed: int) -> list[Any]:
    each = sum(more / 3**rung for rung, more in enumerate((7, 13, 40)))
    alive = torch.randperm(2 * len(cells), generator=torch.Generator().manual_seed(seed))[: int(steps / each)]
    for rung in range(len(RUNGS)):
        means = scores[rung].mean(dim=-1).flatten()[alive]
        alive = alive[means.argsort(descending=True)][: max(1, len(alive) // 3)]
    cell, sign = divmod(int(alive[0]), 2)
    return [cells[cell].hook, cells[cell].layer, cells[cell].token, cells[cell].rank, SIGNS[sign]]


def equivalents(cells: list[Cell], scores: torch.Tensor) -> list[list[Any]]:
    """(site, token)s with a cell within one standard error of the best."""
    means = scores[-1].mean(dim=-1)
    best = scores[-1].flatten(0, 1)[int(means.argmax())]
    good = (means >= best.mean() - best.std() / len(best) ** 0.5).any(dim=1)
    return [list(p) for p in dict.fromkeys((c.hook, c.layer, c.token) for c, g in zip(cells, good, strict=True) if g)]


def right(chosen: list[Any], line: dict[str, Any]) -> bool:
    *where, rank, sign = chosen
    return where in line["equivalents"] and 0.5 <= rank / line["rank"] <= 2 and sign == line["sign"]


def line_of(seed: int) -> dict[str, Any]:
    truth, began = place(seed), time.perf_counter()
    line: dict[str, Any] = {"seed": seed, "planted": [truth.hook, truth.layer, truth.token]}
    line |= {"rank": truth.rank, "sign": truth.sign} | searched(truth) | {"seconds": time.perf_counter() - began}
    cells, scores = full_grid(truth)
    line["equivalents"] = equivalents(cells, scores)
    line["random"] = random_search(cells, scores, line["steps"], seed)
    line["halving"] = plain_halving(cells, scores, line["steps"], seed)
    return line


def table(lines: list[dict[str, Any]]) -> str:
    total = 96 * len(RANKS) * len(RATES) * len(SIGNS) * STEPS
    sound = [x for x in lines if x["planted"] in x["equivalents"] and len(x["equivalents"]) <= 9.6]
    most = max(x["steps"] for x in lines)
    counts = {name: sum(right(x[key], x) for x in lines) for name, key in METHODS.items()}
    size = sum(len(x["equivalents"]) for x in lines) / len(lines)
    drop = [x["dev"] - x["optimism"] - x["test"] for x in lines]
    others = [x for x in lines if x not in sound]
    planted = sum(x["chosen"][:3] == x["planted"] for x in others)
    rows = "\n".join(f"| {name} | {count} of {len(lines)} |" for name, count in counts.items())
    return (
        f"## A search on planted networks\n\n{len(lines)} networks, seeds {lines[0]['seed']} to {lines[-1]['seed']} "
        f"(`python benchmarks/search_planted.py`); at most {most:,} of the grid's {total:,} steps "
        f"({most / total:.1%}).\nThe equivalence set holds the planted cell and at most 10 % of all in {len(sound)}; "
        f"it has {size:.1f} of 96 places on average.\nIn the {len(others)} others, which count as wrong whatever is "
        f"recommended, the search recommends the planted cell in {planted}.\n\n"
        f"| at equal steps | right |\n|---|---|\n{rows}\n\nDev score less optimism is {sum(drop) / len(drop):+.3f} off "
        f"the test score on average (nats per token).\nThe draws of the dev and the test rows are the same for all "
        f"networks, so this is mostly how the two draws differ: up to 6 %\nof the dev rows that decide are answered at "
        f"random, 2 to 4 % of the test rows. `search_null.md` has rows drawn anew for each task.\n"
    )


METHODS = {"search": "chosen", "random search": "random", "halving without sharing": "halving"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="100:140", help="first:end")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "search_planted.jsonl")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = [json.loads(x) for x in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.table:
        text = table(sorted(known, key=lambda x: x["seed"]))
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
        return
    for seed in range(*map(int, options.seeds.split(":"))):
        if seed not in {line["seed"] for line in known}:
            line = line_of(seed)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(seed, *(f"{name}: {right(line[key], line)}" for name, key in METHODS.items()), flush=True)


if __name__ == "__main__":
    main()
