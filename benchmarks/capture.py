"""Capture of few-shot prompts, with what they begin with alike read once and read for each.

    python benchmarks/capture.py GLUE [--prompts 200] [--repeats 3] [--out docs]

GLUE is a folder with `sst2/train.jsonl` and `sst2/validation.jsonl` (rows with `sentence` and `label`). SmolLM2-135M,
float32, one thread, interleaved: median CPU seconds and bytes of capturing eight-shot prompts for an edit of the last
token at layer 15. Writes docs/performance_capture.md.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import reftlens as rl
from reftlens.cone.plans import Plan
from reftlens.cone.scorer import Scorer

ANSWERS = (" negative", " positive")


def eight_shot(glue: Path, count: int) -> list[rl.Example]:
    """Sentences after the same eight that are answered."""
    train, test = (
        [json.loads(line) for line in (glue / "sst2" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "validation")
    )
    shots = "".join(f"Review: {row['sentence'].strip()}\nSentiment:{ANSWERS[row['label']]}\n\n" for row in train[:8])
    rows = [*test, *train[8:]][:count]
    return [rl.Example(f"{shots}Review: {r['sentence'].strip()}\nSentiment:", ANSWERS[r["label"]]) for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = rl.load_model()
    data = rl.encode(model, eight_shot(options.glue, options.prompts))
    reft = rl.ReFT({rl.resid_post(15, "last"): rl.LoReFT(model.cfg.d_model, rank=4)})
    seconds: dict[bool, list[float]] = {True: [], False: []}
    size, computation = {}, ""
    for _ in range(options.repeats):
        for beginnings in seconds:
            began = time.process_time()
            scorer = Scorer(model, data, [Plan(reft)], rl.training.Reuse(beginnings=beginnings, verify=False))
            assert scorer._cone is not None
            scorer._cone.store.prepare()
            seconds[beginnings].append(time.process_time() - began)
            size[beginnings] = scorer._cone.store.size
            computation = scorer.computation if beginnings else computation
    shared, each = (statistics.median(times) for times in seconds.values())
    text = (
        f"## Capture of few-shot prompts\n\n{len(data)} eight-shot prompts of SST-2, {int(data.attention_mask.sum())} "
        f"tokens, for an edit of the last token at layer 15; CPU seconds of one thread, medians of {options.repeats} "
        f"interleaved repetitions (`python benchmarks/capture.py GLUE --prompts {options.prompts}`).\n\n"
        "| what rows begin with alike | CPU seconds | MB kept |\n|---|--:|--:|\n"
        f"| read once | {shared:.1f} | {size[True] / 1e6:.0f} |\n| read for each row | {each:.1f} | "
        f"{size[False] / 1e6:.0f} |\n| ratio | {shared / each:.3f} | {size[True] / size[False]:.3f} |\n\n"
        f"`{computation}`\n"
    )
    (options.out / "performance_capture.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
