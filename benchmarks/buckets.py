"""How many length buckets pay: a step of shape (e), completions of 9 to 200 tokens, by the most buckets allowed.

    python benchmarks/buckets.py [--repeats 9]

SmolLM2-135M, float32, one thread, interleaved; prints the groups that the cost model chooses, the tokens that are
computed, and median CPU seconds per step. The other approach in the table: one group with no padding at all (every
row by itself) is what `10` allows where a pass costs nothing, so its overhead is set to 0 there.
"""

import argparse
import statistics
import time

import torch
from shapes import SHAPES, rows_of

import reftlens as rl
from reftlens import scorer
from reftlens.batch import batch_from_rows
from reftlens.cone import buckets

ALLOWED = (1, 2, 3, 4, 6, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, spec = rl.load_model(), SHAPES["e"]
    data = batch_from_rows(rows_of("e"), [[1] * p + [2] * c for p, c in spec["rows"]])
    lengths, before = [c for _, c in spec["rows"]], [p - 1 for p, _ in spec["rows"]]
    stepping = {}
    for most in ALLOWED:
        overhead = 0.0 if most == len(lengths) else 16.0
        groups = buckets(lengths, before, most, overhead)
        tokens = sum(len(g) * max(lengths[i] for i in g) for g in groups)
        reft = rl.ReFT({rl.resid_post(8, "last"): rl.LoReFT(model.cfg.d_model, rank=4)})
        plan = scorer.Plan(reft.bind(model))
        stepping[most] = (groups, tokens, overhead, scorer.Scorer(model, data, [plan], rl.Reuse(buckets=most)))
    seconds: dict[int, list[float]] = {most: [] for most in ALLOWED}
    for repeat in range(options.repeats + 1):
        for most, (_, _, overhead, one) in stepping.items():
            scorer._OVERHEAD["cpu"] = overhead
            began = time.process_time()
            for group in one.groups([scorer.Job(0, tuple(range(len(data))))]):
                losses = [torch.nn.functional.cross_entropy(s.logits, s.batch.target_ids) for s in group]
                torch.stack(losses).sum().backward()
            if repeat:  # the first captures and checks
                seconds[most].append(time.process_time() - began)
    print(f"exact tokens: {sum(lengths)}")
    for most, (groups, tokens, _, _) in stepping.items():
        sizes = [len(g) for g in groups]
        print(f"at most {most} buckets: rows {sizes}, {tokens} tokens, {statistics.median(seconds[most]):.3f} s")


if __name__ == "__main__":
    main()
