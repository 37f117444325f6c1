"""The frozen computation that no edit can touch, captured once: what enters the light cone from below and from before.

Of each row two things are captured: the residual stream entering the first block of the cone, at the cone's tokens; and
the keys and values of the tokens before the cone, at the blocks of the cone. Capture runs each block only where one
of the two needs it, and never the unembedding. What rows begin with alike is captured once for all of them.
"""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache

from reftlens.bridge.parts import Slot
from reftlens.bridge.protocol import device_of
from reftlens.cone.body import Body
from reftlens.cone.caches import Prefilled, Recorder, cache_of, recorded, recorders_after
from reftlens.cone.captured import NO_TOKENS, Captured, Pool, together
from reftlens.cone.plans import Autocast
from reftlens.cone.prefix import NO_HOOK, entering, entering_stream, mask_of, observers, past_layers
from reftlens.cone.spans import Span, Window, window
from reftlens.editing.engine import Stop, forward_inside
from reftlens.text.batch import Batch
from reftlens.text.beginnings import Beginning


@dataclass
class Capture:
    """Captures rows of a right-padded data set for cones that begin at the blocks `firsts`.

    `cones` hold those of all plans. No cone begins after `latest`, the tokens before which leave keys and values.
    `beginnings` are those that rows share, all of them before the cones. What is captured is `narrow` in bfloat16.
    """

    body: Body
    data: Batch
    cones: list[Span]
    latest: list[int]
    firsts: tuple[int, ...]
    plain: bool
    autocast: Autocast
    beginnings: list[Beginning]
    narrow: bool
    returns: int = 0

    def __post_init__(self) -> None:
        self.of_row = {row: n for n, beginning in enumerate(self.beginnings) for row in beginning.rows}
        self.forget()

    @torch.no_grad()
    def __call__(self, rows: Sequence[int]) -> list[Captured]:
        before, first, depth = [self.latest[row] for row in rows], self.first, self.body.depth
        with self.autocast():
            some, recorders = self._rows(rows), list[Recorder]()
            if max(before):  # the last block only starts, where no stream that leaves it is wanted
                recorders = recorders_after(some.layers(depth)[first:], first, depth, ends=max(self.firsts) < depth)
            streams = self._streams(some, recorders)
            wide = max(1, *(n - start for n, start in zip(before, some.window.starts.tolist(), strict=True)))
            keys, values = self._keys_and_values(some.narrowed(wide), streams, recorders)
        keys, values = ([t[:, :, :wide] for t in every] for every in (keys, values))
        pool = self._kept({first: stream.flatten(0, 1) for first, stream in streams.items()}, keys, values)
        result, width = [], some.window.real.shape[1]
        for i, (row, start) in enumerate(zip(rows, some.window.starts.tolist(), strict=True)):
            beginning = self.beginning(self.of_row[row]) if keys and row in self.of_row else None
            cone = Span(*(i * width + place - start for place in (self.cones[row].start, self.cones[row].stop)))
            past = Span(i * wide, i * wide + before[i] - start) if before[i] else NO_TOKENS
            result.append(Captured(pool, cone, past, 0, beginning))
        return result

    @torch.no_grad()
    def beginning(self, number: int) -> Captured:
        """A beginning as rows refer to it: at the blocks of the cone."""
        if number not in self._of_cone:
            whole = self._read(number)
            pool = whole.pool.narrowed() if self.narrow else whole.pool
            self._of_cone[number] = replace(whole, pool=pool, skip=self.first)
        return self._of_cone[number]

    def _kept(self, streams: dict[int, Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Pool:
        """All rows that were captured together, one after the other."""
        pool = pool_of(streams, keys, values)
        return pool.narrowed() if self.narrow else pool

    @property
    def first(self) -> int:
        return min(self.firsts)

    @property
    def setting(self) -> Hashable:
        """What decides what is captured of a row, beside the model, its tokens and the cones."""
        device, attention = device_of(self.body.model), getattr(self.body.config, "_attn_implementation", None)
        with self.autocast():
            narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return self.plain, self.narrow, narrow, attention, str(device)

    def forget(self) -> None:
        """The beginnings, which are kept as long as rows are captured."""
        self._whole: dict[int, Captured] = {}
        self._of_cone: dict[int, Captured] = {}

    def _rows(self, rows: Sequence[int]) -> "_Rows":
        numbers = [self.of_row.get(row) for row in rows]
        beginnings = [None if n is None else self._read(n) for n in numbers]
        return _Rows(self.data.tokens[list(rows)], window(self.after(rows)), beginnings)

    def after(self, rows: Sequence[int]) -> list[Span]:
        """The tokens of each of these rows after the beginning that it shares, up to the end of its cone."""
        shared = (self.of_row.get(row) for row in rows)
        starts = [0 if n is None else self.beginnings[n].length for n in shared]
        return [Span(start, self.cones[row].stop) for start, row in zip(starts, rows, strict=True)]

    def _read(self, number: int) -> Captured:
        """Keys and values of a beginning at every block."""
        if number not in self._whole:
            beginning = self.beginnings[number]
            span = window([Span(0, beginning.length)])
            recorders = recorders_after([], 0, self.body.depth, ends=True)
            self._run(_Rows(self.data.tokens[[beginning.rows[0]]], span, [None]), [], cache_of(recorders))
            self._whole[number] = Captured(pool_of({}, *recorded(recorders)), NO_TOKENS, Span(0, beginning.length))
        return self._whole[number]

    def _streams(self, rows: "_Rows", recorders: list[Recorder]) -> dict[int, Tensor]:
        """The residual stream entering each of `firsts` but 0: the blocks below the highest run, nothing else."""
        body, firsts = self.body, sorted({*self.firsts} - {0})
        if not firsts:
            return {}
        blocks = observers(body, firsts, firsts[-1], plain=self.plain)
        cache = self._cache(rows, recorders) if recorders or any(rows.beginnings) else None
        self._run(rows, [(body.blocks[i], block) for i, block in blocks.items()], cache)
        self.returns = blocks[0].returns
        return {i: stream for i in firsts if (stream := entering_stream(body, blocks, i)) is not None}

    def _keys_and_values(
        self, rows: "_Rows", streams: dict[int, Tensor], recorders: list[Recorder]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of the blocks of the cone: those that the streams did not go through, for these tokens, and the others."""
        top = max(self.firsts)
        if recorders and top < self.body.depth:
            entry = streams[top][:, : rows.window.real.shape[1]] if top else None
            self._run(rows, entering(self.body, top, entry, self.returns), self._cache(rows, recorders))
        return recorded(recorders)

    def _cache(self, rows: "_Rows", recorders: list[Recorder]) -> DynamicCache:
        return cache_of([*rows.layers(self.body.depth)[: self.body.depth - len(recorders)], *recorders])

    def _run(self, rows: "_Rows", places: list[tuple[Slot, Module]], cache: Any = None) -> None:
        tokens, mask = rows.window.cut(rows.tokens), mask_of(rows.window)
        device, columns = device_of(self.body.model), rows.window.columns
        with self.body.arranged(places, plain=self.plain, used=NO_HOOK), suppress(Stop):
            forward_inside(self.body.model, tokens.to(device), mask.to(device), columns.to(device), cache)


@dataclass(frozen=True)
class _Rows:
    """Rows that are captured together, after the beginnings that they share with others."""

    tokens: Int[Tensor, "rows seq"]
    """All of them."""
    window: Window
    """What is computed: the tokens after the beginnings."""
    beginnings: list[Captured | None]

    def narrowed(self, wide: int) -> "_Rows":
        """The first tokens of each."""
        win = self.window
        return replace(self, window=Window(win.columns[:, :wide], win.real[:, :wide], win.starts))

    def layers(self, depth: int) -> list[Prefilled]:
        """The beginnings in the cache of each block."""
        together_now = iter(together([b for b in self.beginnings if b is not None]))
        beginnings = [b and next(together_now) for b in self.beginnings]
        return past_layers(beginnings, self.window) or [Prefilled(len(beginnings), 0) for _ in range(depth)]


def pool_of(streams: dict[int, Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Pool:
    """Of keys and values `[rows, heads, tokens, width]` the heads side by side, and all rows one after the other."""
    keys, values = (tuple(t.transpose(1, 2).flatten(2).flatten(0, 1) for t in every) for every in (keys, values))
    return Pool(streams, keys, values)
