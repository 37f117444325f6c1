"""The part of docs/performance.md on a GPU, of what `gpu_steps.py` measured."""

from statistics import median

from shapes import RANDOM, SHAPES
from text_report import head

TEXT = """## On a GPU

Wall seconds of a step on one {card}, a model of the shape of Llama-3-8B with random weights in bfloat16; edits in
float32, those of pyreft in bfloat16; medians of {repeats} turns, in which the contenders alternate (torch {torch},
transformers {transformers}; pyreft with transformers 4.57.6). *Full* is reftlens with `reuse=False`. Memory is the
most that a process held over the weights, loading included: one float32 copy of the embedding, 2.1 GB, is all of it
where a step needs less. The other shapes, and generation, were not measured there.

    python benchmarks/gpu_steps.py --shapes {shapes} --repeats {repeats} --peers PYTHON

{table}

A step there is as long as its arithmetic or as the time in which the processor launches its blocks, whichever is more:
about 3 ms a block, forward and back, in each of the contenders. What the light cone saves is arithmetic and memory:
(d), without most of its arithmetic, takes as long as launching the 16 blocks above its edit, and (a) and (e) are a
tenth shorter than pyreft's and as long as the floor that computes everything: a pass over two hundred tokens takes as
long as one over fifteen hundred. The shapes are those that were made for a small model on a CPU; (c) edits the first
{edited} of the {depth} blocks. Since then the number of groups of similar length on a GPU follows from this time; that
was not measured again. `tests/test_cuda.py` passed on such a machine (16 tests).
"""
COLUMNS = ("pyreft-loreft", "floor", "floor-reuse", "reftlens-full", "reftlens")
NAMES = ("pyreft LoReFT", "floor, all", "floor, same reuse", "full", "**reftlens**")


def section(results: dict) -> str:
    """Of performance_gpu.json."""
    shapes = [shape for shape in SHAPES if shape in results]
    lines = head(["shape", *NAMES, "LoReFT / reftlens", "GB, pyreft", "GB, full", "GB, **reftlens**"])
    for shape in shapes:
        wall, growth = results[shape]["wall"], results[shape]["growth"]
        pairs = zip(wall["pyreft-loreft"], wall["reftlens"], strict=True) if "pyreft-loreft" in wall else ()
        ratios = [theirs / ours for theirs, ours in pairs]
        cells = [
            f"({shape}) {SHAPES[shape]['what']}",
            *(f"{median(wall[n]):.3f}" if n in wall else "" for n in COLUMNS),
        ]
        cells += [f"**{median(ratios):.1f}**" if ratios else ""]
        cells += [
            f"{growth[n] / 1e9:.1f}" if n in growth else "" for n in ("pyreft-loreft", "reftlens-full", "reftlens")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return TEXT.format(
        **results["machine"],
        repeats=len(results[shapes[0]]["wall"]["reftlens"]),
        shapes=" ".join(shapes),
        table="\n".join(lines),
        edited=len(SHAPES["c"]["layers"]),
        depth=RANDOM[results["model"]]["num_hidden_layers"],
    )
