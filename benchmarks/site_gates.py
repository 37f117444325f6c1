"""Gates over heads on networks in which two of twelve heads carry the answer, and the curve of score over sites.

    python benchmarks/site_gates.py [--first 100] [--networks 10] [--out docs]

Writes `site_gates.md`. Settings were chosen on networks 0 to 2. A quarter of an hour on one core.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch

import reftlens as rl

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from planted import FILLER, VALUES, pairs, planted_heads

SETTINGS = rl.FitConfig(steps=60, lr=4e-2, batch_size=16)
PRICES = (0.05, 0.2, 0.5, 1.0, 2.0)
KINDS = {"Interchange": lambda: rl.Interchange(8), "DAS of rank 1": lambda: rl.DAS(8, 1)}


def curve(seed, make):
    """`(the planted heads, the curve over prices)` of one network."""
    truth, tokens = planted_heads(seed), list(VALUES)
    train, test = (
        pairs(truth.value, count, n, some, fill=FILLER)[0]
        for n, (count, some) in enumerate(((256, tokens[:200]), (100, tokens[200:])), start=1)
    )
    sites = rl.places.every_head(truth.model, "last")
    heads = {rl.attn_z(layer, "last", heads=[head]) for layer, head in truth.heads}
    settings = dict(seed=seed, progress=False)
    return heads, rl.places.sparsity(sites, make, truth.model, train, test, PRICES, SETTINGS, **settings)


def lines(kind, seeds):
    """A row of the table for each price, and one for the best two heads of the map."""
    curves = [curve(seed, KINDS[kind]) for seed in seeds]

    def row(name, points, beside):
        exact = sum(set(point.sites) == heads for point, (heads, _) in zip(points, curves, strict=True))
        count = mean([len(point.sites) for point in points])
        numbers = (mean([point.accuracy.value for point in some]) for some in (points, beside))
        scores = " | ".join(f"{number:.2f}" for number in numbers)
        return f"| {kind} | {name} | {exact} of {len(seeds)} | {count:.1f} | {scores} |"

    rows = []
    for price in PRICES:
        points = [next(p for p in result.points if p.price == price) for _, result in curves]
        beside = [at(result, len(point.sites)) for point, (_, result) in zip(points, curves, strict=True)]
        rows.append(row(f"{price:g}", points, beside))
    two = [at(result, 2) for _, result in curves]
    return rows + ([row("map, best two", two, two)] if all(two) else [])


def at(result, count):
    """The map's choice of so many heads; None where no price left so many, the unedited model for none."""
    found = [point for point in result.points if point.way == "map" and len(point.sites) == count]
    return result.unedited if count == 0 else next(iter(found), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=100, help="seed of the first network")
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--out", default="docs", help="folder that site_gates.md is written to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, folder = range(args.first, args.first + args.networks), Path(args.out)
    table = [
        "| edit of a head | nats for each | exactly the two heads | heads | accuracy | accuracy, map, as many |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        table += lines(kind, seeds)
        print(*table[-len(PRICES) - 1 :], sep="\n", flush=True)
    text = TEXT.format(first=seeds[0], last=seeds[-1], table="\n".join(table), s=SETTINGS)
    (folder / "site_gates.md").write_text(text, encoding="utf-8")


TEXT = """# Which heads to edit

`python benchmarks/site_gates.py` writes this page.

How often exactly the two heads that carry the answer are open, of networks {first} to {last} (settings were chosen on 0
to 2). In each, a tiny neox of three layers of four heads, two heads copy one bit of the value to where the
unembedding reads it. `rl.places.sparsity` trains an edit of every head behind a gate for {s.steps} steps of
{s.batch_size} of 256 pairs, learning rate {s.lr}, at each price of an open head; the map trains each head alone, ranks
them by their loss on the training pairs, and takes as many as were open at that price.

{table}

Heads: how many are open, on average. Accuracy: interchange accuracy on held-out pairs whose values come from other
tokens, of the edits of the open heads alone, gates taken off; where none is open, of the unedited model.

The price grows from 0 over the first half of training (`ramp` of `HardConcrete`; half a nat is its default). An edit
that has to be trained is worth little at first: with the whole price from the first step on (`ramp=0`), gates over DAS
shut too early at prices that are right for an exchange of whole heads. Where the map at an equal number of heads scores
better, the price was too high.
"""


if __name__ == "__main__":
    main()
