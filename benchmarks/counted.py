"""Multiply-adds of one optimizer step, counted: what reuse can save at most, at any size of model.

    python benchmarks/counted.py [--data FOLDER]

Of the shapes on real text as well, where the folder has them (`texts.py`); in tokens of SmolLM2 at any size of model.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import shapes
from shapes import DEPTH, SHAPES, TEXTS, edited_of
from transformers import LlamaConfig

from reftlens.bridge.weightless import weightless
from reftlens.cone.body import Body
from reftlens.cone.size import Size, size_of


@dataclass(frozen=True)
class Named(Size):
    """A model, all of whose blocks are alike."""

    name: str = ""


def named(name: str, shape: dict[str, int]) -> Named:
    one = size_of(Body(weightless(LlamaConfig(**shape | {"num_hidden_layers": 1}))))
    return Named(**vars(one) | {"blocks": one.blocks * shape["num_hidden_layers"]}, name=name)


SMOL, LLAMA = named("SmolLM2-135M", shapes.SMOL), named("Llama-3-8B", shapes.LLAMA)


def full(size: Size, shape: str) -> float:
    """Everything, forward and back through the activations, padding included: pyreft's step."""
    return _full(size, SHAPES[shape]["layers"], [p + c for p, c in SHAPES[shape]["rows"]])


def _full(size: Size, layers: list[int], lengths: list[int]) -> float:
    longest = max(lengths)
    lowest = _layer(size, min(layers))
    tokens = len(lengths) * longest
    block = size.block(0, tokens, longest)
    return block * (size.depth + size.depth - lowest - 1) + 2 * tokens * size.unembedding


def cone(size: Size, shape: str) -> float:
    """The light cone without any padding: what has to be computed at the least."""
    spec, total = SHAPES[shape], 0.0
    first = _layer(size, min(spec["layers"])) + 1
    for prompt, completion in spec["rows"]:
        start = 0 if "f" in spec["positions"] else prompt - 1
        tokens, keys = prompt + completion - 1 - start, prompt + completion - 1
        blocks = size.depth - (0 if "f" in spec["positions"] else first)
        total += 2 * blocks * size.block(0, tokens, keys) + 2 * completion * size.unembedding
    return total


def text_ratio(size: Size, shape: str, batches: list) -> float:
    """The same of the batches of a shape on real text, padded to the longest row, over the cones' distinct tokens."""
    layers = TEXTS[shape]["layers"]
    above = size.depth - _layer(size, min(layers)) - 1
    total, least = 0.0, 0.0
    for batch in batches:
        total += _full(size, layers, [len(ids) for ids, _ in batch])
        least += 2 * above * sum(size.block(0, 1, place) for place in _distinct(shape, batch))
        least += 2 * sum(len(ids) - prompt for ids, prompt in batch) * size.unembedding
    return total / least


def _distinct(shape: str, batch: list) -> list[int]:
    """The places of the cones' tokens, a beginning that is edited alike counted once (in a tree of beginnings)."""
    nodes = set()
    for row, (ids, prompt) in enumerate(batch):
        edited = edited_of(TEXTS[shape]["positions"], prompt)
        alike = next((p for n, p in enumerate(edited) if p > n), 0)  # places edited in all rows come first
        for place in range(edited[0], len(ids) - 1):
            nodes.add((place, tuple(ids[: place + 1])) if place < alike and not edited[0] else (place, row))
    return [place for place, _ in nodes]


def _layer(size: Size, layer: int) -> int:
    """The same share of the depth."""
    return round(layer * size.depth / DEPTH)


def ratios(size: Size) -> dict[str, float]:
    return {shape: full(size, shape) / cone(size, shape) for shape in SHAPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    options = parser.parse_args()
    from texts import NEEDED, batches_of

    from reftlens.bridge.pretrained import DEFAULT_MODEL, find_model

    there = [shape for shape in TEXTS if (options.data / NEEDED[shape]).exists()]
    batches = {shape: batches_of(shape, options.data, find_model(DEFAULT_MODEL)) for shape in there}
    for size in (SMOL, LLAMA):
        every = ratios(size) | {shape: text_ratio(size, shape, some) for shape, some in batches.items()}
        print(size.name, "  ".join(f"({shape}) {ratio:.1f}" for shape, ratio in every.items()))


if __name__ == "__main__":
    main()
