"""Twenty trainings (5 seeds x 4 ranks) in one pass, beside one training that computes everything.

    python benchmarks/twenty_runs.py [--steps 3] [--out docs]

Layer 20, last token, 8 rows of 512 + 8, SmolLM2-135M, float32, one thread. Writes docs/performance_twenty.md.
"""

import argparse
import time
from pathlib import Path

import torch
from shapes import rows_of

import reftlens as rl
from reftlens.cone.probe import relative_error
from reftlens.text.batch import batch_from_rows

RANKS, SEEDS, LENGTHS = (1, 2, 4, 8), range(5), [(512, 8)] * 8


def made(d: int, seed: int, rank: int) -> rl.ReFT:
    generator = torch.Generator().manual_seed(seed)
    return rl.ReFT({rl.resid_post(20, "last"): rl.LoReFT(d, rank=rank, generator=generator)})


def timed(function):
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--compare", type=int, default=20, help="how many of the twenty to train alone as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = rl.load_model()
    d = model.cfg.d_model
    data = batch_from_rows(rows_of("d"), [[1] * p + [2] * c for p, c in LENGTHS])
    table = [(seed, rank) for seed in SEEDS for rank in RANKS]
    configs = {str(row): rl.FitConfig(steps=options.steps, batch_size=8, seed=row[0]) for row in table}
    settings = dict(steps=options.steps, batch_size=8, progress=False)
    whole, _ = timed(lambda: rl.fit(made(d, 0, 4), model, data, reuse=False, **settings))
    one, _ = timed(lambda: rl.fit(made(d, 0, 4), model, data, reuse=rl.training.Reuse(verify=False), **settings))
    together = {str(row): made(d, *row) for row in table}
    twenty, _ = timed(
        lambda: rl.training.fit_many(
            together, model, data, configs, reuse=rl.training.Reuse(verify=False), progress=False
        )
    )
    error = 0.0
    chosen = range(0, len(table), -(-len(table) // options.compare))
    for (seed, rank), found in [(table[i], together[str(table[i])]) for i in chosen]:
        alone = made(d, seed, rank)
        rl.fit(alone, model, data, seed=seed, reuse=rl.training.Reuse(verify=False), **settings)
        error = max(error, *(relative_error(a, b) for a, b in zip(found.parameters(), alone.parameters(), strict=True)))
    text = (
        f"## Twenty trainings at once\n\n"
        f"5 seeds x 4 ranks at layer 20, last token, 8 rows of 512 + 8, {options.steps} steps, capture and all; CPU "
        f"seconds of one thread (`python benchmarks/twenty_runs.py`):\n\n"
        f"- all twenty together: {twenty:.1f}\n"
        f"- one run that computes everything: {whole:.1f}\n"
        f"- one run on the light cone: {one:.1f}\n\n"
        f"Largest difference of a trained parameter from its separate run, relative, over {len(chosen)} of them: "
        f"{error:.1e}.\n"
    )
    print(text)
    (options.out / "performance_twenty.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
