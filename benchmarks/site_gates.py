"""Gates over heads on networks in which two of twelve heads carry the answer, and the curve of score over sites.

    python benchmarks/site_gates.py [--first 100] [--networks 10] [--out docs]

Writes `site_gates.md`. Settings were chosen on networks 0 to 2. A quarter of an hour on one core.
"""

import argparse
import sys
from pathlib import Path

import torch

import reftlens as rl

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from planted import FILLER, VALUES, pairs, planted_heads

SETTINGS = rl.FitConfig(steps=60, lr=4e-2, batch_size=16)
PRICES = (0.05, 0.2, 1.0)
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


def line(kind, seeds):
    """One row of the table."""
    exact, accuracy, other = dict.fromkeys((*PRICES, "map"), 0), [], []
    for seed in seeds:
        heads, result = curve(seed, KINDS[kind])
        for point in result.points:
            exact[point.price or "map"] += set(point.sites) == heads
            if point.price == PRICES[1]:
                accuracy.append(point.accuracy.value)
            if point.way == "map" and len(point.sites) == 2:
                other.append(point.accuracy.value)
    cells = [f"{n} of {len(seeds)}" for n in exact.values()]
    means = [f"{sum(values) / len(values):.2f}" if values else "" for values in (accuracy, other)]
    return f"| {kind} | " + " | ".join([*cells, *means]) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=100, help="seed of the first network")
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--out", default="docs", help="folder that site_gates.md is written to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, folder = range(args.first, args.first + args.networks), Path(args.out)
    prices = " | ".join(f"{price:g} nats" for price in PRICES)
    lines = [
        f"| edit of a head | {prices} | map, as many | accuracy, gates | accuracy, map |",
        "|---|" + "--:|" * (len(PRICES) + 3),
    ]
    for kind in KINDS:
        lines.append(line(kind, seeds))
        print(lines[-1], flush=True)
    text = TEXT.format(first=seeds[0], last=seeds[-1], table="\n".join(lines), s=SETTINGS)
    (folder / "site_gates.md").write_text(text, encoding="utf-8")


TEXT = """# Which heads to edit

`python benchmarks/site_gates.py` writes this page.

How often exactly the two heads that carry the answer are open, of networks {first} to {last} (settings were chosen on 0
to 2). In each, a tiny neox of three layers of four heads, two heads copy one bit of the value to where the
unembedding reads it. `rl.places.sparsity` trains an edit of every head behind a gate for {s.steps} steps of
{s.batch_size} of 256 pairs, learning rate {s.lr}, at each price of an open head; the map trains each head alone, ranks
them by their loss on the training pairs, and takes as many as were open at some price.

{table}

Accuracy: interchange accuracy on held-out pairs whose values come from other tokens, of the edits of the open heads
alone, gates taken off, at 0.2 nats; and of two heads of the map.

A price is paid from the first step on, and an edit that has to be trained is worth little at first: gates over DAS shut
too early at prices that are right for an exchange of whole heads. Where the map at an equal number of heads scores
better, the price was too high.
"""


if __name__ == "__main__":
    main()
