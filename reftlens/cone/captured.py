"""What was captured of rows: the tokens of many rows one after the other, and which of them are whose."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.cone.spans import Span

NO_TOKENS = Span(0, 0)


@dataclass(frozen=True, eq=False)
class Pool:
    """What was captured of several rows, their tokens one after the other in one tensor for each block."""

    streams: dict[int, Float[Tensor, "cones d"]]
    """Entering each block that a cone begins at; none for a cone that begins at the embedding, computed each time."""
    keys: tuple[Float[Tensor, "before width"], ...]
    """All heads side by side, for each block of the cone; empty where nothing lies before it."""
    values: tuple[Float[Tensor, "before width"], ...]

    def tensors(self) -> list[Tensor]:
        return [*self.streams.values(), *self.keys, *self.values]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def rebuilt(self, tensors: Sequence[Tensor]) -> "Pool":
        """The same with other tensors, in the order of `tensors()`."""
        streams, rest = dict(zip(self.streams, tensors, strict=False)), tensors[len(self.streams) :]
        return Pool(streams, tuple(rest[: len(self.keys)]), tuple(rest[len(self.keys) :]))

    def narrowed(self) -> "Pool":
        """The same in bfloat16."""
        return self.rebuilt([tensor.to(torch.bfloat16) for tensor in self.tensors()])

    def write(self, rows: Sequence["Captured"], cone: int, before: int) -> list["Captured"]:
        """Copy what rows of one other pool have of their own, beginning at these places; the same rows in this pool."""
        source, skip, result = rows[0].pool, rows[0].skip, list[Captured]()
        cones, befores = (_numbers(spans) for spans in zip(*((row.cone, row.before) for row in rows), strict=True))
        for first in self.streams if len(cones) else ():
            self.streams[first][cone : cone + len(cones)] = taken(source.streams[first], cones)
        pairs = (self.keys, source.keys[skip:]), (self.values, source.values[skip:])
        for mine, theirs in (pair for every in pairs if len(befores) for pair in zip(*every, strict=True)):
            mine[before : before + len(befores)] = taken(theirs, befores)
        for row in rows:
            after = cone + row.cone.length, before + row.before.length
            result.append(Captured(self, Span(cone, after[0]), Span(before, after[1])))
            cone, before = after
        return result


@dataclass(frozen=True)
class Captured:
    """What was captured of one row."""

    pool: Pool
    cone: Span
    """Which tokens of the pool's streams are those of the cone."""
    before: Span
    """Which of the pool's keys and values are those of the tokens before it."""
    skip: int = 0
    """How many of the pool's lowest blocks are left out."""
    beginning: "Captured | None" = None
    """What lies before these tokens, where the row shares it with others."""

    @property
    def shared(self) -> int:
        """Tokens of the beginning."""
        return 0 if self.beginning is None else self.beginning.past

    @property
    def past(self) -> int:
        """Tokens before the cone."""
        return self.shared + self.before.length

    @property
    def parts(self) -> "tuple[Captured, ...]":
        """The beginning, and then what is its own."""
        return (self,) if self.beginning is None else (*self.beginning.parts, self)

    def part(self, whole: Span, span: Span, latest: int, skip: int) -> "Captured":
        """What cones within `whole` need, no earlier than at token `latest` and `skip` blocks above the lowest."""
        start = self.cone.start - whole.start
        return replace(self._until(latest, skip), cone=Span(start + span.start, start + span.stop))

    def _until(self, latest: int, skip: int) -> "Captured":
        """With the first `latest` of the tokens before, without so many more of the lowest blocks."""
        begin, own = self.before.start, max(0, latest - self.shared)
        beginning = self.beginning._until(min(latest, self.shared), skip) if self.beginning and latest else None
        return replace(self, before=Span(begin, begin + own), skip=self.skip + skip, beginning=beginning)


def taken(tokens: Float[Tensor, "tokens width"], index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
    """Some of the tokens."""
    return tokens.index_select(0, index.flatten().to(tokens.device)).view(*index.shape, -1)


def together(rows: Sequence[Captured]) -> list[Captured]:
    """The same rows in one pool."""
    return list(rows) if len({(id(part.pool), part.skip) for row in rows for part in row.parts}) <= 1 else packed(rows)


def packed(rows: Sequence[Captured]) -> list[Captured]:
    """The same rows in a pool of their own, which holds nothing else."""
    groups: dict[tuple[int, int], dict[tuple[Span, Span], Captured]] = {}
    for part in (part for row in rows for part in row.parts):
        groups.setdefault((id(part.pool), part.skip), {})[part.cone, part.before] = part
    parts = [part for group in groups.values() for part in group.values()]
    pool = _empty_pool([row.pool for row in rows], parts)
    cone, before, places = 0, 0, dict[tuple[int, int, Span, Span], Captured]()
    for (number, skip), group in groups.items():
        written = pool.write(list(group.values()), cone, before)
        places |= {(number, skip, *spans): part for spans, part in zip(group, written, strict=True)}
        cone, before = written[-1].cone.stop, written[-1].before.stop

    def placed(part: Captured) -> Captured:
        own = places[id(part.pool), part.skip, part.cone, part.before]
        return replace(own, beginning=part.beginning and placed(part.beginning))

    return [placed(row) for row in rows]


def _empty_pool(pools: Sequence[Pool], parts: Sequence[Captured]) -> Pool:
    """Room for all tokens of the parts, at the blocks that all `pools` have a stream for."""
    cones, before = sum(part.cone.length for part in parts), sum(part.before.length for part in parts)
    deep = max(parts, key=lambda part: part.before.length)
    firsts = [first for first in pools[0].streams if all(first in pool.streams for pool in pools)]
    streams = {first: _room(pools[0].streams[first], cones) for first in firsts}
    keys, values = (tuple(_room(t, before) for t in every[deep.skip :]) for every in (deep.pool.keys, deep.pool.values))
    return Pool(streams, keys, values)


def _room(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty(tokens, like.shape[1])


def _numbers(spans: Iterable[Span]) -> Int[Tensor, " tokens"]:
    """Of the tokens of spans, one span after the other."""
    return torch.from_numpy(np.concatenate([np.arange(span.start, span.stop) for span in spans]))
