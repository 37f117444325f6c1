"""Rows to train on, to choose by and to report on, no group in two of them."""

import warnings
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import SupportsIndex

import torch

from reftlens.numbers import seeded, whole
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

    def __repr__(self) -> str:
        parts = f"{len(self.train)} train, {len(self.dev)} dev, {len(self.test)} test"
        return f"{parts} rows in {self.groups} groups, by seed {self.seed}"


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


def groups_of(data: Batch) -> list[int]:
    """The number of the group of each row: rows that share a prompt, or are exchanged with the same source.

    Where pairs are made of so few texts that they all hang together (a group of more than a fifth of the rows), those
    that share a prompt alone.
    """
    keys: list[list[Hashable]] = [[prompt] for prompt in _prompts(data)]
    alone = _joined(keys)
    for source in data.sources.values():
        rows = _prompts(source.batch)
        for own, row in zip(keys, source.rows.tolist(), strict=True):
            own += [rows[row]] if row >= 0 else []
    joined = _joined(keys)
    return alone if max(Counter(joined).values(), default=0) > len(data) / 5 else joined


def row_keys(data: Batch) -> list[str]:
    """Of each row its tokens, which of them are targets, and what it is exchanged with."""
    real = zip(data.tokens, data.attention_mask, data.target_mask, strict=True)
    keys = [f"{t[m].tolist()} {x[m].int().tolist()}" for t, m, x in real]
    for name, source in sorted(data.sources.items()):
        rows = _prompts(source.batch)
        keys = [f"{key} {name} {rows[r] if r >= 0 else ''}" for key, r in zip(keys, source.rows.tolist(), strict=True)]
    return keys


def _prompts(data: Batch) -> list[str]:
    """Of each row the tokens of its prompt."""
    return [str(t[m].tolist()) for t, m in zip(data.tokens, data.prompt_mask, strict=True)]


def _joined(keys: list[list[Hashable]]) -> list[int]:
    """Rows that share a key, or share one with a row that does, have one number."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    first = dict[Hashable, int]()
    for row, own in enumerate(keys):
        for key in own:
            a, b = sorted((root(first.setdefault(key, row)), root(row)))
            parent[b] = a
    numbers = {r: n for n, r in enumerate(dict.fromkeys(root(row) for row in range(len(keys))))}
    return [numbers[root(row)] for row in range(len(keys))]


def split_groups(groups: list[int], shares: tuple[float, ...], seed: int) -> list[list[int]]:
    """Rows in so many parts of about these shares, no group in two of them, each part in ascending order."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    order = torch.randperm(len(members), generator=seeded(seed)).tolist()
    every = list(members.values())
    parts: list[list[int]] = [[] for _ in shares]
    for number in sorted(order, key=lambda n: -len(every[n])) if len(members) < len(groups) else order:
        short = [share * len(groups) - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[short.index(max(short))] += every[number]
    return [sorted(part) for part in parts]
