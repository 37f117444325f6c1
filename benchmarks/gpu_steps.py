"""Step times on a GPU at the shape of Llama-3-8B, random weights in bfloat16; writes docs/performance_gpu.json

    python benchmarks/gpu_steps.py [--peers PYTHON] [--peers-path FOLDER]

Contenders as in `step_time.py`, each in a process of its own with a model of its own (16 GB); wall seconds between two
moments at which the GPU has nothing left to do, the contenders taking turns. `--model llama-tiny` tries it on a CPU.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from shapes import RANDOM, SHAPES
from step_time import Worker

TRAINING = ("reftlens", "reftlens-full", "floor", "floor-reuse", "pyreft-loreft")
GENERATION = ("reftlens", "floor", "pyreft-loreft")


def measured(shape: str, options: argparse.Namespace) -> dict:
    """Wall seconds of every turn of each contender, and by how much its memory grew; or why there are none."""
    names = [n for n in (TRAINING if shape in SHAPES else GENERATION) if options.peers or not n.startswith("pyreft")]
    workers = {name: Worker(name, shape, options) for name in names}
    wall, growth, failed = dict[str, list[float]](), dict[str, int](), dict[str, str]()
    for turn in range(-2, options.repeats):  # the first turns load and warm up
        for name in [name for name in names if name not in failed]:
            try:
                if turn == -2:
                    workers[name].ready()
                seconds = workers[name].step(1)["wall"]
            except (RuntimeError, BrokenPipeError) as error:
                failed[name] = str(error)
                wall.pop(name, None)
            else:
                wall.setdefault(name, []).extend([seconds] if turn >= 0 else [])
    for name in (name for name in names if name not in failed):
        growth[name] = workers[name].finish()
    return {"wall": wall, "growth": growth, "failed": failed}


def show(shape: str, result: dict) -> None:
    ours = result["wall"].get("reftlens")
    for name, seconds in result["wall"].items():
        ratio = median(a / b for a, b in zip(seconds, ours, strict=True)) if ours else float("nan")
        grown = result["growth"].get(name, 0) / 1e9
        print(f"({shape}) {name}: {median(seconds):.4f} s, {ratio:.2f} of reftlens, {grown:.2f} GB", flush=True)
    for name, why in result["failed"].items():
        print(f"({shape}) {name} failed: {why}", flush=True)


def machine() -> dict[str, str]:
    import torch
    import transformers

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RANDOM, default="llama-8b")
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "g1", "g8"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", type=Path, help="python that has pyreft; without it pyreft is left out")
    parser.add_argument("--peers-path", type=Path, help="a folder that is put before its packages")
    parser.add_argument("--errors", action="store_true", help="show what the contenders write to stderr")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "performance_gpu.json")
    options = parser.parse_args()
    results: dict = {"machine": machine(), "model": options.model}
    print(json.dumps(results), flush=True)
    for shape in options.shapes:
        results[shape] = measured(shape, options)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        show(shape, results[shape])


if __name__ == "__main__":
    main()
