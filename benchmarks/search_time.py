"""A first rung of a search beside a loop of separate fits, on SmolLM2 and sentiment: same candidates, same steps.

    python benchmarks/search_time.py --data FILE [--rows 64] [--steps 4] [--alone 4]

FILE is JSONL with `sentence` and `label` (SST-2). 32 candidates, each of one site: 4 layers x 2 ranks x 4 rates at
the last token, LoReFT, batch 8, float32, one thread, CPU seconds of the process, capture and all. Of the separate fits
every eighth is run, with reuse and without, in turn with the shared run, and multiplied.
"""

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path

import torch

import reftlens as rl

LAYERS, RANKS, RATES = (6, 12, 18, 24), (1, 4), (1e-3, 3e-3, 1e-2, 3e-2)
LABELS = {0: " negative", 1: " positive"}


def encoded(model, path: Path, count: int):
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    examples = [rl.Example(f"Review: {r['sentence'].strip()}\nSentiment:", LABELS[r["label"]]) for r in records]
    return rl.encode(model, examples, end=False)


def candidate(model, layer: int, rank: int) -> rl.ReFT:
    reft = rl.ReFT({rl.resid_post(layer, "last"): rl.LoReFT(model.cfg.d_model, rank, init="identity")})
    reft.reset(0)
    return reft


def timed(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--alone", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = rl.load_model(progress=False)
    data = encoded(model, options.data, options.rows)
    every = list(itertools.product(LAYERS, RANKS, RATES))
    settings = {"steps": options.steps, "batch_size": 8, "schedule": "constant", "progress": False}
    warm = rl.training.Reuse(verify=False)

    def shared():
        refts = {str(c): candidate(model, c[0], c[1]) for c in every}
        configs = {str(c): rl.FitConfig(lr=c[2]) for c in every}
        rl.fit_many(refts, model, data, configs, reuse=warm, **settings)

    def alone(some, reuse):
        layer, rank, lr = some
        rl.fit(candidate(model, layer, rank), model, data, lr=lr, reuse=reuse, **settings)

    chosen = every[:: -(-len(every) // options.alone)]
    full, reused, together = 0.0, 0.0, []
    for number, some in enumerate(chosen):
        full += timed(lambda some=some: alone(some, False))
        reused += timed(lambda some=some: alone(some, warm))
        if number in (0, len(chosen) - 1):
            together.append(timed(shared))
    scale, shared_time = len(every) / len(chosen), sum(together) / len(together)
    print(f"{len(every)} candidates, {options.steps} steps, CPU seconds: shared {shared_time:.1f}, ", end="")
    print(f"a loop of fits with reuse=False {full * scale:.1f} ({full * scale / shared_time:.1f}x), ", end="")
    print(f"with reuse {reused * scale:.1f} ({reused * scale / shared_time:.1f}x)")


if __name__ == "__main__":
    main()
