"""Prompts that begin alike are read once: which columns of left-padded rows are computed for which of the rows.

Columns are computed in stages. In each, rows that are the same computation up to where the stage ends are computed
as one; the keys and values of that one are then handed to all that go on from it.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from reftlens.cone.caches import Stub
from reftlens.generation.rows import Rows

OVERHEAD = defaultdict(lambda: 256.0, cpu=64.0)
"""What one more pass through the blocks costs, in tokens, by the kind of device."""

_END = -1
"""Follows the last token."""


@dataclass(frozen=True)
class Stage:
    """The columns `start <= column < stop`, computed for some of the rows."""

    start: int
    stop: int
    rows: Int[Tensor, " some"] | None = None
    """Those that are computed; None for all, each of which goes on alone."""
    owners: Int[Tensor, " next"] | None = None
    """For each row of the next stage, or for all rows after the last: which of `rows` it begins with."""
    shifts: Int[Tensor, " next"] | None = None
    """By how many columns that row is to the left of it; None where none is."""

    def of(self, rows: Rows) -> Rows:
        """Those of all rows that are computed."""
        return rows if self.rows is None else rows.take(self.rows)

    def to_all(self, values: Tensor) -> Tensor:
        """What was computed of `rows` in the last column, or in all, for every row of the next stage."""
        return values if self.owners is None else values[self.owners]

    def hand_on(self, cache: Any) -> None:
        """Keys and values `[rows, heads, column, width]` up to `stop`, for every row of the next stage."""
        if self.owners is None:
            return
        for layer in cache.layers:
            if layer.is_initialized and not isinstance(layer, Stub):
                layer.keys, layer.values = self._shifted(layer.keys), self._shifted(layer.values)

    def _shifted(self, stored: Tensor) -> Tensor:
        return self.columns(stored.transpose(1, 2)).transpose(1, 2)

    def columns(self, values: Shaped[Tensor, "rows column *_"]) -> Shaped[Tensor, "next column *_"]:
        """What stands in each column up to `stop`, for every row of the next stage; of its padding it says nothing."""
        if self.shifts is None or self.owners is None:
            return self.to_all(values)
        columns = (torch.arange(self.stop, device=values.device) - self.shifts[:, None]).clamp(min=0)
        return values[self.owners[:, None], columns]


def stages(
    computations: Int[Tensor, "row column"],
    real: Bool[Tensor, "row column"],
    *,
    start: int = 0,
    limit: int,
    overhead: float,
) -> list[Stage]:
    """The cheapest stages from column `start` on: each costs its columns times its rows, and `overhead` tokens.

    Args:
        computations: equal where the same is computed of a token, as long as all tokens before it are the same too.
        limit: only the last stage ends after this column.
    """
    texts = [row[mask].tolist() for row, mask in zip(computations.cpu(), real.cpu(), strict=True)]
    width, device = computations.shape[1], computations.device
    like, ends = _alike(texts, width)
    cuts = _cuts(ends, range(start, width), limit, overhead)
    every, result = list(range(len(texts))), list[Stage]()
    chosen = [[row for row in every if ends[row] < stop] for stop in cuts]
    for (begin, stop), rows, following in zip(pairwise([start, *cuts]), chosen, [*chosen[1:], every], strict=True):
        if rows == every:
            result.append(Stage(begin, stop))
            continue
        owners = [_owner(row, stop, like, ends) for row in following]
        shifts = [len(texts[owner]) - len(texts[row]) for row, owner in zip(following, owners, strict=True)]
        places = [rows.index(owner) for owner in owners]
        some, first, moved = (torch.tensor(numbers, device=device) for numbers in (rows, places, shifts))
        result.append(Stage(begin, stop, some, first, moved if any(shifts) else None))
    return result


def distinct(stages: Sequence[Stage], prompts: Rows) -> int | None:
    """How many tokens are computed; None where each row is computed for itself."""
    if not shared(stages):
        return None
    return sum(int(stage.of(prompts).real[:, stage.start : stage.stop].sum()) for stage in stages)


def shared(stages: Sequence[Stage]) -> bool:
    """Whether a row is computed for others."""
    return len(stages) > 1 or stages[0].rows is not None


def _alike(texts: Sequence[Sequence[int]], width: int) -> tuple[list[int], list[int]]:
    """Of each row, which row at least as long it begins like, and the column where that ends.

    Where it begins like a longer one for all its length, its last column is computed all the same.
    """
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    like, ends = [order[0]] * len(texts), [0] * len(texts)
    nodes: dict[tuple[int, int], int] = {}
    owners: list[int] = []
    for row in order:
        node, shared = -1, 0
        for number in (*texts[row], _END):
            following = nodes.setdefault((node, number), len(owners))
            if following == len(owners):
                owners.append(row)
            else:
                like[row], shared = owners[following], shared + 1
            node = following
        length = len(texts[row])
        ends[row] = width - length + shared - (shared >= length)
    return like, ends


def _owner(row: int, stop: int, like: Sequence[int], ends: Sequence[int]) -> int:
    """The row that is computed up to column `stop` in place of this one."""
    while ends[row] >= stop:
        row = like[row]
    return row


def _cuts(ends: Sequence[int], columns: range, limit: int, overhead: float) -> list[int]:
    """Where stages end: exact, by dynamic programming over the columns where the number of rows grows."""
    ordered = sorted(ends)
    best: dict[int, tuple[float, list[int]]] = {columns.start: (0.0, [])}
    for stop in sorted({cut for end in ends if (cut := min(end, limit)) in columns[1:]} | {columns.stop}):
        rows = bisect_left(ordered, stop)
        costs = [(cost + rows * (stop - start) + overhead, cuts) for start, (cost, cuts) in best.items()]
        cost, cuts = min(costs, key=lambda each: each[0])
        best[stop] = cost, [*cuts, stop]
    return best[columns.stop][1]
