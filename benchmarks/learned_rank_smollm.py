"""The rank that `MaskedDAS` learns for the gender of a name in SmolLM2-135M-Instruct, beside random subspaces of it.

    python benchmarks/learned_rank_smollm.py [--random 100] [--out docs]

The task, the pairs and the place are those of `notebooks/02_das_with_controls.ipynb`: block 15, at the name. Writes
`learned_rank_smollm.md`. Some minutes on one core.
"""

import argparse
from pathlib import Path

import torch

import reftlens as rl
from reftlens.tasks.gendered_pronoun import gendered_pronoun

PRICES, MOST, PAIRS = (0.05, 0.1, 0.2, 0.5, 1.0), 8, 96
ANSWERS, VERBS = [" he", " she"], "walked|smiled|slept|laughed|waited|danced"
CONFIG = rl.FitConfig(steps=60, lr=3e-2, batch_size=16)
SITE = rl.resid_post(15, rl.positions.Tokens(rf"[A-Z]\w+(?= ({VERBS}))", regex=True))


def pairs(model, split):
    """Pairs with their sources, and the bases alone, scored among the two answers."""
    some = gendered_pronoun().pairs(PAIRS, "gender", split=split)
    encoded = some.encode(model, first_token=True), some.encode_base(model, first_token=True)
    return [batch.among_answers(ANSWERS) for batch in encoded]


def row(price, reft, found):
    """One row of the table: what was learned at a price, beside random subspaces of the same rank."""
    names = ("trained", "random subspaces", "arbitrary labels", "full vector")
    accuracies = " | ".join(str(found[name].accuracy) for name in names)
    return f"| {price} | {reft[0].learned_rank} | {accuracies} | {found.rank} of {len(found.random) + 1} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = rl.load_model(progress=False)
    (train, _), (test, base) = pairs(model, "train"), pairs(model, "test")
    refts = {}
    for price in PRICES:
        refts[f"{price:g}"] = rl.ReFT({SITE: rl.interventions.MaskedDAS(model.cfg.d_model, MOST, sparsity=price)})
        refts[f"{price:g}"].reset(0)
    rl.fit_many(refts, model, train, CONFIG, progress=False)
    settings = {"base": base, "random": options.random, "shuffles": 1, "random_model": False, "progress": False}
    found = {price: rl.controls(reft, model, train, test, CONFIG, **settings) for price, reft in refts.items()}
    lines = [row(price, refts[price], table) for price, table in found.items()]
    text = TEXT.format(table="\n".join(lines), most=MOST, c=CONFIG, pairs=len(train), test=len(test))
    (options.out / "learned_rank_smollm.md").write_text(text, encoding="utf-8")
    print(text)


TEXT = """# The rank that MaskedDAS learns for the gender of a name

`python benchmarks/learned_rank_smollm.py` on SmolLM2-135M-Instruct writes this page.

The task, the pairs and the place, block 15 at the name, are those of `notebooks/02_das_with_controls.ipynb`; pairs are
scored among *he* and *she*. `MaskedDAS(d, rank={most})` is trained for {c.steps} steps of {c.batch_size} of {pairs}
pairs, learning rate {c.lr}, and scored on {test} pairs of other names; random subspaces are of the rank that was
learned and move every vector as far, arbitrary labels are the same training on answers that say nothing.

| nats for each direction | learned rank | trained | random subspaces | arbitrary labels | whole vector | its place |
|--:|--:|--:|--:|--:|--:|--:|
{table}

One direction is enough for all but .03 of what the whole vector does; a cheaper price buys a second, which adds little.
At half a nat and more one direction is left, too, and it is a worse one.
"""


if __name__ == "__main__":
    main()
