"""The pairs and places that `das.py` measures on, as plain data: read by workers of every environment."""

import random
from typing import NamedTuple

LENGTH, BATCH, RANK, LAYER = 64, 16, 4, 15
LR = 1e-3
MAP_LAYERS = range(30)
MAP_PLACES = (-1, -2, -3, -4, -5)
"""Counted from the end of the prompt; each is a cell of its own at each layer."""
MAP_TRAIN, MAP_TEST, MAP_EPOCHS = 128, 64, 2
MAP_STEPS = MAP_EPOCHS * MAP_TRAIN // BATCH
SITES = ((3, -1), (9, -2), (15, -3), (21, -4), (27, -5))
"""Where a peer's map is measured, `(layer, place)`; the others are extrapolated."""


class Pairs(NamedTuple):
    base: list[list[int]]
    source: list[list[int]]
    target: list[int]
    """One token for each row, predicted by the base's last."""


def pairs(count: int, seed: int = 0) -> Pairs:
    """Random token ids, the same in every environment."""
    dice = random.Random(seed)
    base, source = ([[dice.randrange(10, 40000) for _ in range(LENGTH)] for _ in range(count)] for _ in range(2))
    return Pairs(base, source, [dice.randrange(10, 40000) for _ in range(count)])
