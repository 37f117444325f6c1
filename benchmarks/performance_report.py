"""Turns what `step_time.py` measured into docs/performance.md and docs/performance.png.

python benchmarks/performance_report.py [--out docs]
"""

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import counted
import gpu_report
import text_report
from shapes import SHAPES, TEXTS

NAMES = {
    "pyreft-loreft": "pyreft LoReFT",
    "pyreft-nodireft": "pyreft NodiReFT",
    "floor": "floor, all computed",
    "floor-reuse": "floor, same reuse",
    "reftlens": "reftlens",
}

HEAD = """# Performance

How long an optimizer step takes, beside pyreft and beside a floor, on SmolLM2-135M in float32. Measured by

    python benchmarks/step_time.py

which builds the peers' environment, runs all contenders interleaved and writes this page, and by
`python benchmarks/counted.py` (counted operations) and `python benchmarks/twenty_runs.py` (many runs at once).

![Median CPU seconds per step of each contender and shape.](performance.png)

**What is compared.** CPU seconds of one thread, the median of {repeats} interleaved rounds on a shared machine with
two cores ({machine}; torch {torch}, transformers {transformers}). The *floor* is plain transformers with
scaled-dot-product attention, a bare low-rank edit at the same place and logits at the targets only; once computing
everything, once with the same reuse, written for the shape by hand. pyreft 0.1.0 with pyvene 0.1.8 runs in an
environment of its own. A reftlens step is one of the public `rl.fit`: gradient clipping, schedule, record and all.
Capture and the check of the way of computing happen once, before the steps that are timed; peak memory includes them.
Tokens of (a) to (e) are random; the lengths in (e) are made up, with two thirds of the tokens of the padded batch being
padding. (f) to (i) are real text, measured later than the others and at a later commit. Load of the machine while it
was measured: {load}.

"""

TAIL = """
## DAS

A step and a map beside pyvene and TransformerLens' `fit_das`: [performance_das.md](performance_das.md)
(`python benchmarks/das.py`).

## What had to be worked around to run the peers

- pyreft 0.1.0 asks for transformers 4.45.1 and other old pins that cannot be installed together on Python 3.11 with a
  current torch; it is installed with `--no-deps` beside transformers 4.57.6.
- Its interventions default to bfloat16, which fails on a float32 model: `dtype=torch.float32` is passed to each.
- `NodireftIntervention` raises `KeyError: 'add_bias'` unless that is given.
- The step calls `ReftTrainer.compute_loss`, pyreft's own loss, on a collated batch, without the rest of the Trainer.
- In (c) its weights are tied over prefix and suffix, as ours are.

## What is exact, and what is not

A step with reuse has the loss and the gradients of the full computation: bit for bit where only depth is reused, to
1e-10 in float64 and 1e-5 in float32 otherwise (`tests/test_scorer.py`, every kind of site on six architectures).
Exact steps are not identical runs: in float32, rounding alone makes any two runs that sum in another order drift apart
after some twenty steps, with reuse or without. In float64 they stay together.

## Operations counted

What a step without reuse computes, over what the cone holds without any padding. Measured ratios can be above it where
the other side does more than the operations counted (logits and loss at every token, orthogonal maps, hooks).

{counted}

"""


def median(results: dict, shape: str, name: str, kind: str = "cpu") -> float:
    return statistics.median(results[shape][kind][name])


def table(results: dict) -> str:
    columns = [
        "shape",
        "pyreft LoReFT",
        "pyreft NodiReFT",
        "floor, all",
        "floor, same reuse",
        "**reftlens**",
        "LoReFT / reftlens",
        "NodiReFT / reftlens",
        "reftlens / floor",
        "counted",
    ]
    lines = text_report.head(columns)
    bound = counted.ratios(counted.SMOL)
    for shape in (s for s in SHAPES if s in results):
        m = {name: median(results, shape, name) for name in NAMES}
        lines.append(
            f"| ({shape}) {SHAPES[shape]['what']} | {m['pyreft-loreft']:.2f} | {m['pyreft-nodireft']:.2f} | "
            f"{m['floor']:.2f} | {m['floor-reuse']:.2f} | **{m['reftlens']:.2f}** | "
            f"**{m['pyreft-loreft'] / m['reftlens']:.1f}** | {m['pyreft-nodireft'] / m['reftlens']:.1f} | "
            f"{m['reftlens'] / m['floor-reuse']:.2f} | {bound[shape]:.1f} |"
        )
    return "\n".join(lines)


def wall_and_memory(results: dict) -> str:
    columns = [
        "shape",
        "wall s, pyreft LoReFT",
        "wall s, reftlens",
        "ratio",
        "peak MB, pyreft LoReFT",
        "peak MB, reftlens",
        "share",
    ]
    lines = text_report.head(columns)
    for shape in (s for s in SHAPES if s in results):
        theirs, ours = (median(results, shape, name, "wall") for name in ("pyreft-loreft", "reftlens"))
        grown = results[shape]["growth"]
        lines.append(
            f"| ({shape}) | {theirs:.2f} | {ours:.2f} | {theirs / ours:.1f} | {grown['pyreft-loreft'] / 1e6:.0f} | "
            f"{grown['reftlens'] / 1e6:.0f} | {grown['reftlens'] / grown['pyreft-loreft']:.2f} |"
        )
    return "\n".join(lines)


def generation(results: dict) -> str:
    lines = text_report.head(["prompts", "pyreft", "plain transformers", "reftlens", "reftlens / plain"])
    for shape in (s for s in ("g1", "g8") if s in results):
        batch = int(shape[1:])
        speed = {name: 64 * batch / median(results, shape, name) for name in results[shape]["cpu"]}
        lines.append(
            f"| {batch} | {speed['pyreft-loreft']:.1f} | {speed['floor']:.1f} | {speed['reftlens']:.1f} | "
            f"{speed['reftlens'] / speed['floor']:.2f} |"
        )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    from reftlens import figures

    shapes = [s for s in SHAPES if s in results]
    figure, ax = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    figures.axes(ax)
    colours = dict(zip(NAMES, (figures.ORANGE, "#f3c9a5", figures.GREY, "#9fc3e0", figures.BLUE), strict=True))
    for k, (name, label) in enumerate(NAMES.items()):
        heights = [median(results, shape, name) for shape in shapes]
        places = [i + (k - 2) * 0.16 for i in range(len(shapes))]
        ax.bar(places, heights, width=0.15, color=colours[name], label=label)
    for i, shape in enumerate(shapes):
        ours = median(results, shape, "reftlens")
        ratio = median(results, shape, "pyreft-loreft") / ours
        ax.annotate(f"{ratio:.1f}x", (i + 0.32, ours), ha="center", va="bottom", fontsize=9)
    ax.set(yscale="log", ylabel="CPU seconds per optimizer step", xticks=range(len(shapes)))
    ax.set_xticklabels([f"({s})" for s in shapes])
    ax.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=160)


def write(results: dict, out: Path) -> None:
    repeats = min(len(times) for s in SHAPES if s in results for times in results[s]["cpu"].values())
    parts = [
        HEAD.format(
            repeats=repeats,
            load=text_report.load(results),
            machine=platform.machine(),
            torch=version("torch"),
            transformers=version("transformers"),
        ),
        "## Training: median CPU seconds per step\n\n" + table(results),
        "\n\n## Wall time on two threads, and peak memory (growth over the process with its model loaded)\n\n",
        wall_and_memory(results),
        text_report.section(results),
        "\n\n## Generation: tokens per second of one thread, 64 greedy tokens after 40, layer 8 edited\n\n",
        generation(results),
    ]
    for extra in (out / f"performance_{name}.md" for name in ("buckets", "twenty", "analyses", "session")):
        if extra.exists():
            parts.append("\n\n" + extra.read_text(encoding="utf-8").rstrip())
    texts = {shape: results[shape]["counted"] for shape in TEXTS if shape in results}
    counts = "\n".join(
        f"- {size.name}: " + ", ".join(f"({s}) {ratio:.1f}" for s, ratio in every.items())
        for size in (counted.SMOL, counted.LLAMA)
        for every in [counted.ratios(size) | {shape: ratio[size.name] for shape, ratio in texts.items()}]
    )
    parts.append("\n" + TAIL.format(counted=counts))
    if (on_gpu := out / "performance_gpu.json").exists():
        parts.append(gpu_report.section(json.loads(on_gpu.read_text(encoding="utf-8"))))
    (out / "performance.md").write_text("".join(parts), encoding="utf-8")
    draw(results, out / "performance.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    write(json.loads((options.out / "performance.json").read_text(encoding="utf-8")), options.out)
