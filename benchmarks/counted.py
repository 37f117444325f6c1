"""Multiply-adds of one optimizer step, counted: what reuse can save at most, at any size of model.

python benchmarks/counted.py
"""

from dataclasses import dataclass

from shapes import DEPTH, SHAPES


@dataclass(frozen=True)
class Size:
    """What the cost of a decoder-only model depends on."""

    name: str
    depth: int
    d: int
    keys: int  # width of keys (and of values) of one token, all heads
    mlp: int
    vocab: int

    @property
    def block(self) -> int:
        """Multiply-adds of one block for one token, attention over keys left out."""
        return 2 * self.d * self.d + 2 * self.d * self.keys + 3 * self.d * self.mlp


SMOL = Size("SmolLM2-135M", 30, 576, 192, 1536, 49152)
LLAMA = Size("Llama-3-8B", 32, 4096, 1024, 14336, 128256)


def full(size: Size, shape: str) -> float:
    """Everything, forward and back through the activations, padding included: pyreft's step."""
    rows = SHAPES[shape]["rows"]
    longest = max(p + c for p, c in rows)
    lowest = _layer(size, min(SHAPES[shape]["layers"]))
    tokens = len(rows) * longest
    block = tokens * (size.block + 2 * size.d * longest)
    return block * (size.depth + size.depth - lowest - 1) + 2 * tokens * size.d * size.vocab


def cone(size: Size, shape: str) -> float:
    """The light cone without any padding: what has to be computed at the least."""
    spec, total = SHAPES[shape], 0.0
    first = _layer(size, min(spec["layers"])) + 1
    for prompt, completion in spec["rows"]:
        start = 0 if "f" in spec["positions"] else prompt - 1
        tokens, keys = prompt + completion - 1 - start, prompt + completion - 1
        blocks = size.depth - (0 if "f" in spec["positions"] else first)
        total += 2 * blocks * tokens * (size.block + 2 * size.d * keys) + 2 * completion * size.d * size.vocab
    return total


def _layer(size: Size, layer: int) -> int:
    """The same share of the depth."""
    return round(layer * size.depth / DEPTH)


def ratios(size: Size) -> dict[str, float]:
    return {shape: full(size, shape) / cone(size, shape) for shape in SHAPES}


if __name__ == "__main__":
    for size in (SMOL, LLAMA):
        print(size.name, "  ".join(f"({shape}) {ratio:.1f}" for shape, ratio in ratios(size).items()))
