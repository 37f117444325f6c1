"""Turns what `das.py` measured into docs/performance_das.md.

python benchmarks/das_report.py [--out docs]
"""

import argparse
import json
import statistics
from pathlib import Path

import das_shapes as shape

PARTS = ("train", "score")
GOALS = {"pyvene": 33, "fit_das": 20, "map": 20}

HEAD = """# DAS: a step, and a map

How long distributed alignment search takes beside pyvene 0.1.8 and beside TransformerLens' `fit_das`, on SmolLM2-135M
in float32. Measured by

    {command}

which runs all contenders interleaved, each in a process of its own, and writes this page: CPU seconds of one thread,
medians of {repeats} rounds, on a shared machine with {cores} cores ({machine}; Python {python}, torch {torch},
transformers {transformers}, TransformerLens {lens}; pyvene with torch 2.13.0 and transformers 4.57.6). Tokens are
random.

## One optimizer step

Layer {layer}, last token, rank {rank}, {batch} pairs, base and source of {length} tokens each, one target token.

| | CPU seconds | reftlens is faster by | goal |
|---|--:|--:|--:|
"""

STEP = """
The three start from one basis and have the same first loss ({losses}).

- *pyvene*: `IntervenableModel` with `LowRankRotatedSpaceIntervention`, given one place for all rows (its fast path):
  source and base forward, cross-entropy at the last position, backward, Adam.
- *fit_das*: the public function on one batch, epoch after epoch; the time from the end of one step of its optimizer to
  the end of the next, told by `torch.optim.optimizer.register_optimizer_step_post_hook`. It reads the sources once,
  before the first step. Its task logits are those of the whole vocabulary at the last position, as in the others.
- *reftlens*: the public `rl.fit`, time from one `on_step` to the next: gradient clipping, schedule, record and all.
  Sources, capture and the check of the way of computing come once, before the steps that are timed.
"""

MAP = """
## A map

{layers} layers x {places} positions (the last {places} tokens, each a cell of its own), rank {rank}: {cells} cells,
each trained for {epochs} epochs on {train} pairs in batches of {batch} ({steps} steps) and scored on {test} held-out
pairs. CPU seconds:

| | in all | per cell |
|---|--:|--:|
| loop over pyvene (extrapolated) | {theirs:.0f} | {their_cell:.1f} |
| one call of `rl.interchange_map`{how} | **{ours:.0f}** | {our_cell:.2f} |

reftlens is faster by **{ratio:.1f}** (goal: {goal}). Its time is that of the whole call, measured once, in the middle
of the rounds: sources, capture, checks, training, scores, and 999 shuffles per cell for a p-value, which the loop over
pyvene has not.{scaled}

**Extrapolated.** Nothing is shared between the cells of a loop over pyvene, so its time is that of its parts: at the
{count} sites below one optimizer step and one batch of {batch} held-out pairs are timed, {rounds} times. A cell takes
{steps} steps and {scored} scored batches; the mean over these sites, times {cells}. They lie evenly and their mean
layer is {mean_layer:.0f}, that of all layers is 14.5: the higher, the shorter is the way back, so this favours pyvene.
Loading, building the interventions and the first, slower step are not counted.

| pyvene at | step | scored batch |
|---|--:|--:|
"""


SCALED = """ Only layers {layers} were run, in {measured:.0f} CPU seconds, and that times {share:g} is given:
too much, as one call for all layers shares its capture among them."""


def median(results: dict, name: str) -> float:
    return statistics.median(answer["cpu"] for answer in results[name])


def steps(results: dict) -> str:
    known = results["setting"]
    parts = known["versions"]
    head = HEAD.format(
        command=known["command"],
        repeats=len(results["reftlens"]),
        cores=known["cores"],
        machine=known["machine"],
        python=known["python"],
        torch=parts["torch"],
        transformers=parts["transformers"],
        lens=parts["transformer-lens"],
        layer=shape.LAYER,
        rank=shape.RANK,
        batch=shape.BATCH,
        length=shape.LENGTH,
    )
    ours = median(results, "reftlens")
    for name in ("pyvene", "fit_das"):
        theirs = median(results, name)
        head += f"| {name} | {theirs:.2f} | **{theirs / ours:.1f}** | {GOALS[name]} |\n"
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in results["losses"].items())
    return head + f"| **reftlens** | **{ours:.3f}** | | |\n" + STEP.format(losses=losses)


def pyvene_cell(results: dict) -> tuple[float, list[tuple[str, float, float]]]:
    """CPU seconds of a mean cell, and of each site `(name, step, scored batch)`."""
    rounds = results["pyvene-map"]
    rows = [
        (f"{layer} {place}", *(statistics.median(r[part][f"{layer} {place}"] for r in rounds) for part in PARTS))
        for layer, place in shape.SITES
    ]
    scored = -(-shape.MAP_TEST // shape.BATCH)
    return statistics.mean(shape.MAP_STEPS * train + scored * score for _, train, score in rows), rows


def whole_map(results: dict) -> str:
    cells = len(shape.MAP_LAYERS) * len(shape.MAP_PLACES)
    cell, rows = pyvene_cell(results)
    layers, measured = results["map_layers"], median(results, "reftlens-map")
    share = len(shape.MAP_LAYERS) / len(layers)
    ours = measured * share
    scaled = SCALED.format(layers=", ".join(map(str, layers)), measured=measured, share=share) if share > 1 else ""
    text = MAP.format(
        layers=len(shape.MAP_LAYERS),
        places=len(shape.MAP_PLACES),
        rank=shape.RANK,
        cells=cells,
        epochs=shape.MAP_EPOCHS,
        train=shape.MAP_TRAIN,
        batch=shape.BATCH,
        steps=shape.MAP_STEPS,
        test=shape.MAP_TEST,
        theirs=cell * cells,
        their_cell=cell,
        ours=ours,
        our_cell=ours / cells,
        ratio=cell * cells / ours,
        goal=GOALS["map"],
        count=len(rows),
        scored=-(-shape.MAP_TEST // shape.BATCH),
        rounds=len(results["pyvene-map"]),
        how=" (extrapolated)" if scaled else "",
        scaled=scaled,
        mean_layer=statistics.mean(layer for layer, _ in shape.SITES),
    )
    for (layer, place), (_, train, score) in zip(shape.SITES, rows, strict=True):
        text += f"| layer {layer}, position {place} | {train:.2f} | {score:.2f} |\n"
    return text


def write(results: dict, out: Path) -> None:
    text = steps(results) + (whole_map(results) if "reftlens-map" in results else "")
    (out / "performance_das.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    write(json.loads((options.out / "performance_das.json").read_text(encoding="utf-8")), options.out)
