"""The shapes that step times are measured on, as plain data: read by workers of every environment."""

import random

DEPTH = 30  # blocks of SmolLM2-135M

# layers, positions, rank, and the length of prompt and completion of each row
SHAPES = {
    "a": dict(
        layers=[8],
        positions="last",
        rank=4,
        rows=[(40, 20)] * 10,
        what="layer 8, last token, 10 rows of 40 + 20",
    ),
    "b": dict(
        layers=[20],
        positions="last",
        rank=4,
        rows=[(40, 20)] * 10,
        what="layer 20, last token, 10 rows of 40 + 20",
    ),
    "c": dict(
        layers=list(range(DEPTH)),
        positions="f7+l7",
        rank=8,
        rows=[(128, 8)] * 8,
        what="all layers, first and last 7 tokens, rank 8, 8 rows of 128 + 8",
    ),
    "d": dict(
        layers=[15],
        positions="last",
        rank=4,
        rows=[(512, 8)] * 8,
        what="layer 15, last token, 8 rows of 512 + 8",
    ),
    "e": dict(
        layers=[8],
        positions="last",
        rank=4,
        rows=[
            (36, 9),
            (37, 12),
            (38, 14),
            (39, 17),
            (40, 20),
            (42, 24),
            (44, 30),
            (47, 36),
            (50, 90),
            (54, 200),
        ],
        what="layer 8, last token, 10 rows with completions of 9 to 200 tokens",
    ),
}


# beside (d), what `dispatches.py` counts
MANY = dict(
    layers=[15],
    positions="last",
    rank=4,
    rows=[(64, 8)] * 64,
    what="layer 15, last token, 64 rows of 64 + 8",
)
DISPATCHED = ("d", "rows64")


def spec_of(name: str, prompt: int | None = None) -> dict:
    """A shape; with prompts of another length where that is given."""
    spec = MANY if name == "rows64" else SHAPES[name]
    if prompt is None:
        return spec
    return {**spec, "rows": [(prompt, c) for _, c in spec["rows"]], "what": f"{spec['what']}, prompts of {prompt}"}


def rows_of(name: str, prompt: int | None = None) -> list[list[int]]:
    """Random token ids, the same in every environment."""
    dice = random.Random(0)
    return [[dice.randrange(10, 40000) for _ in range(sum(lengths))] for lengths in spec_of(name, prompt)["rows"]]


def edited_places(name: str) -> list[list[int]]:
    """Per row the places that are edited; f7+l7 of prompts of 14 tokens or more."""
    ends = [prompt for prompt, _ in SHAPES[name]["rows"]]
    if SHAPES[name]["positions"] == "last":
        return [[end - 1] for end in ends]
    return [[*range(7), *range(end - 7, end)] for end in ends]
