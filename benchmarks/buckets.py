"""How many length buckets pay: a step of shape (e), completions of 9 to 200 tokens, by the most buckets allowed.

    python benchmarks/buckets.py [--repeats 9] [--out docs]

SmolLM2-135M, float32, one thread, interleaved: the groups that the cost model chooses, the tokens that are computed,
and median CPU seconds of forward and backward. In the last line every row is computed by itself, without any padding.
Writes docs/performance_buckets.md.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from shapes import SHAPES, rows_of

import reftlens as rl
from reftlens.cone.plans import Job, Plan
from reftlens.cone.scorer import Scorer
from reftlens.cone.spans import buckets
from reftlens.text import beginnings as cost
from reftlens.text.batch import batch_from_rows

ALLOWED = (1, 2, 3, 4, 6, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, spec = rl.load_model(), SHAPES["e"]
    data = batch_from_rows(rows_of("e"), [[1] * p + [2] * c for p, c in spec["rows"]])
    lengths, before = [c for _, c in spec["rows"]], [p - 1 for p, _ in spec["rows"]]
    stepping = {}
    for most in ALLOWED:
        overhead = 0.0 if most == len(lengths) else 25.0
        groups = buckets(lengths, before, most, overhead)
        tokens = sum(len(g) * max(lengths[i] for i in g) for g in groups)
        reft = rl.ReFT({rl.resid_post(8, "last"): rl.LoReFT(model.cfg.d_model, rank=4)})
        stepping[most] = (groups, tokens, overhead, Scorer(model, data, [Plan(reft)], rl.training.Reuse(buckets=most)))
    seconds: dict[int, list[float]] = {most: [] for most in ALLOWED}
    for repeat in range(options.repeats + 1):
        for most, (_, _, overhead, scorer) in stepping.items():
            cost.PASS["cpu"] = overhead
            began = time.process_time()
            for group in scorer.score([Job(0, tuple(range(len(data))))]):
                losses = [torch.nn.functional.cross_entropy(s.logits, s.batch.target_ids) for s in group]
                torch.stack(losses).sum().backward()
            if repeat:  # the first captures and checks
                seconds[most].append(time.process_time() - began)
    lines = [
        "## Length buckets",
        "",
        f"Forward and backward of a step of shape (e), {sum(lengths)} tokens in the cones, by the most groups of "
        f"similar length allowed; CPU seconds of one thread, medians of {options.repeats} interleaved repetitions "
        "(`python benchmarks/buckets.py`). A step of `fit` uses as many as pay.",
        "",
        "| at most | rows of each group | tokens computed | CPU seconds |",
        "|--:|---|--:|--:|",
    ]
    for most, (groups, tokens, _, _) in stepping.items():
        sizes = ", ".join(str(len(g)) for g in groups)
        lines.append(f"| {most} | {sizes} | {tokens} | {statistics.median(seconds[most]):.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (options.out / "performance_buckets.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
