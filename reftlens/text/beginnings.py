"""Beginnings that rows share: templates, system prompts, few-shot examples, which are computed and stored once.

Two rows share as many tokens as they begin with alike. One level is looked for: groups of rows, each with one
beginning; a tree of beginnings within beginnings would save a few per cent more.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

PASS = defaultdict(lambda: 256.0, cpu=25.0)
"""What one more pass through the blocks costs, in tokens, by the kind of device."""


@dataclass(frozen=True)
class Beginning:
    """What the rows of these numbers begin with: the first `length` tokens of each."""

    rows: tuple[int, ...]
    length: int


def shared_beginnings(tokens: Int[Tensor, "rows seq"], limits: Sequence[int], *, overhead: float) -> list[Beginning]:
    """Groups of rows whose beginning pays: they compute it once in place of each, which costs `overhead` more tokens.

    The sorted rows are walked over once. Neighbours that are alike for longest come together first; a group is
    dissolved into a larger one, of a shorter beginning, where that saves more.

    Args:
        limits: of each row, how many tokens a beginning may have.
    """
    tokens = tokens[:, : max(limits)].cpu()
    texts = [row[:limit] for row, limit in zip(tokens.tolist(), limits, strict=True)]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    alike = (tokens[order[1:]] == tokens[order[:-1]]).cumprod(dim=1).sum(dim=1).tolist()
    lengths = [min(n, limits[a], limits[b]) for n, (a, b) in zip(alike, pairwise(order), strict=True)]
    nested: list[_Run] = []
    run = _Run(0)
    for row, length in zip(order, [*lengths, -1], strict=True):
        run = _Run(length, [row])
        while nested and nested[-1].length > length:
            whole = nested.pop()
            whole.take(run)
            run = whole.grouped(overhead)
        if nested and nested[-1].length == length:
            nested[-1].take(run)
        elif length >= 0:
            nested.append(_Run(length))
            nested[-1].take(run)
    return run.groups


@dataclass
class _Run:
    """Neighbours among the sorted rows, alike for at least `length` tokens."""

    length: int
    single: list[int] = field(default_factory=list)
    """Rows in no group."""
    groups: list[Beginning] = field(default_factory=list)

    def take(self, run: "_Run") -> None:
        """The rows of a run that are alike for longer; a group of it stays one where that saves more than `length`."""
        self.single += run.single
        for group in run.groups:
            if (len(group.rows) - 1) * group.length < len(group.rows) * self.length:
                self.single += group.rows
            else:
                self.groups.append(group)

    def grouped(self, overhead: float) -> "_Run":
        """With the rows in no group as one, where that pays."""
        if (len(self.single) - 1) * self.length <= overhead:
            return self
        return _Run(self.length, [], [*self.groups, Beginning(tuple(sorted(self.single)), self.length)])
