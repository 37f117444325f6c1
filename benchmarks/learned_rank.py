"""The rank that `MaskedDAS` learns, with the settings it has, on networks whose rank is known because it was planted.

    python benchmarks/learned_rank.py [--first 100] [--networks 20] [--out docs]

Writes `learned_rank.md`. Settings were chosen on networks 0 to 19. About half an hour on one core.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

import reftlens as rl

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from planted import VALUES, D, answers_of, pairs, planted

SETTINGS = rl.FitConfig(steps=100, lr=5e-2, batch_size=64)
PAIRS, HELD_OUT, MOST = 512, 200, 8
PRICES = (0.5, 0.7, 1.0, 1.5, 2.0)  # nats for each open direction; 1 is what MaskedDAS has
PLANTED, NOISE = (1, 2, 4), ("answers of other values", "answers drawn for each pair")
SITE = rl.resid_post(1, "last")


def network(seed, rank):
    """`(model, subspace, train, test)` with a subspace of `rank`, or, for a kind of noise, nothing that a source tells.

    The noise is on networks of rank 2. Held-out pairs take their values from other tokens.
    """
    truth = planted(seed, rank if isinstance(rank, int) else 2)
    value, generator = truth.value, torch.Generator().manual_seed(seed + 7)
    if rank == NOISE[0]:
        value = value[torch.randperm(len(value), generator=generator)]
    answers = answers_of(rank if isinstance(rank, int) else 2)
    tokens = list(VALUES)
    train, test = (
        pairs(value, count, n, some, answers)[0]
        for n, (count, some) in enumerate(((PAIRS, tokens[:200]), (HELD_OUT, tokens[200:])), start=1)
    )
    if rank == NOISE[1]:
        for data in (train, test):
            drawn = torch.randint(len(answers), (len(data),), generator=generator)
            data.tokens[data.target_mask] = torch.tensor(list(answers))[drawn]
    return truth.model, truth.subspace, train, test


def learned(seed, rank):
    """Of each price `(learned rank, held-out accuracy, smallest cosine with the planted subspace)`."""
    model, subspace, train, test = network(seed, rank)
    refts = {}
    for price in PRICES:
        refts[str(price)] = rl.ReFT({SITE: rl.interventions.MaskedDAS(D, MOST, sparsity=price)})
        refts[str(price)].reset(seed)
    rl.fit_many(refts, model, train, SETTINGS, progress=False)
    results = {}
    for price, reft in refts.items():
        scores = rl.causal.interchange_scores(reft, model, test, progress=False)
        same = reft[0].learned_rank == rank
        cosine = torch.linalg.svdvals(reft[0].as_das().basis().T @ subspace).min().item() if same else float("nan")
        results[price] = (reft[0].learned_rank, scores.accuracy.value, cosine)
    return results


def line(rank, results):
    """One row of the table."""
    expected = rank if isinstance(rank, int) else 0
    cells = []
    for price in map(str, PRICES):
        ranks = [result[price][0] for result in results]
        others = Counter(r for r in ranks if r != expected)
        also = ", ".join(f"{r} in {n}" for r, n in sorted(others.items()))
        cells.append(f"{ranks.count(expected)} of {len(ranks)}" + (f" ({also})" if also else ""))
    mine = [result["1.0"] for result in results]
    accuracy = sum(a for _, a, _ in mine) / len(mine)
    cosines = [c for _, _, c in mine if c == c]
    cells += [f"{accuracy:.2f}", f"{min(cosines):.3f}" if cosines else ""]
    return f"| {f'rank {rank}' if isinstance(rank, int) else rank} | {expected} | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=100, help="seed of the first network")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--out", default="docs", help="folder that learned_rank.md is written to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first, args.first + args.networks)
    prices = " | ".join(f"{price:g} nats" for price in PRICES)
    lines = [
        f"| planted | expected | {prices} | accuracy | cosine |",
        "|---|--:|" + "--:|" * (len(PRICES) + 2),
    ]
    for rank in (*PLANTED, *NOISE):
        lines.append(line(rank, [learned(seed, rank) for seed in seeds]))
        print(lines[-1], flush=True)
    text = TEXT.format(first=seeds[0], last=seeds[-1], table="\n".join(lines), most=MOST, pairs=PAIRS, s=SETTINGS)
    (Path(args.out) / "learned_rank.md").write_text(text, encoding="utf-8")


TEXT = """# The rank that MaskedDAS learns

`python benchmarks/learned_rank.py` writes this page.

How often the rank that was planted is learned, exactly, of networks {first} to {last} (settings were chosen on
0 to 19). In each, a tiny neox, the embedding writes a value into a subspace and the unembedding reads its `2 ** rank`
answers there. `MaskedDAS(d, rank={most})` is trained for {s.steps} steps of {s.batch_size} of {pairs} pairs, learning
rate {s.lr}, all settings equal in every row; 1 nat for each open direction is its default. In the last two rows the
source tells nothing: its answer is that of another value, or is drawn for each pair.

{table}

Accuracy: on held-out pairs whose values come from other tokens, at 1 nat. Cosine: of the largest principal angle with
the planted subspace, in the worst network where the rank was right, at 1 nat.

A price is a choice of scale: a direction stays open where it lowers the mean loss by more. Each planted direction is
worth 2 to 3 nats at the end, and less while the frame has not turned to it: prices near its worth shut it too early.
Where the answers are those of other values, erasing part of the base's value is worth up to half a nat, as the network
is sure of answers that are now wrong; a cheaper price buys that.
"""


if __name__ == "__main__":
    main()
