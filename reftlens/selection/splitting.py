"""Rows to train on, to choose by and to report on, no group in two of them."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import SupportsIndex

from reftlens.numbers import whole
from reftlens.selection.strings import groups_of, row_keys, split_groups
from reftlens.text.batch import Batch


@dataclass(frozen=True)
class Split:
    """Numbers of the rows of each part."""

    train: tuple[int, ...]
    dev: tuple[int, ...]
    test: tuple[int, ...]
    groups: int
    """How many groups of rows there are: those of one share a prompt, or a source."""
    seed: int

    def __str__(self) -> str:
        parts = f"{len(self.train)} train, {len(self.dev)} dev, {len(self.test)} test"
        return f"{parts} rows in {self.groups} groups, by seed {self.seed}"

    __repr__ = __str__


def split(data: Batch, *, seed: SupportsIndex = 0) -> Split:
    """60 % of the rows to train on, 20 % to choose by and 20 % to report on; rows that share a prompt or a source stay
    together.
    """
    groups, number = groups_of(data), whole(seed, "seed")
    train, dev, test = split_groups(groups, (0.6, 0.2, 0.2), number)
    return Split(tuple(train), tuple(dev), tuple(test), len(set(groups)), number)


def check_apart(parts: Mapping[str, Batch]) -> None:
    """Warn where a row is in two parts."""
    prints = {name: set(row_keys(part)) for name, part in parts.items()}
    for a, b in combinations(parts, 2):
        if shared := prints[a] & prints[b]:
            warnings.warn(
                f"{len(shared)} row(s) of {a} are in {b} as well: what is chosen or reported there is too good",
                stacklevel=4,
            )
