"""The frozen computation that no edit can touch, captured once: what enters the light cone from below and from before.

Of each row two things are captured: the residual stream entering the first block of the cone, at the cone's tokens; and
the keys and values of the tokens before the cone, at the blocks of the cone. Capture runs each block only where one
of the two needs it, and never the unembedding.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.parts import Slot
from reftlens.cone.body import Body
from reftlens.cone.caches import Prefilled, Recorder, cache_of
from reftlens.cone.plans import Autocast
from reftlens.cone.spans import Span, Window
from reftlens.cone.stand_ins import Entry, Observe, Skip
from reftlens.editing.engine import Stop, forward_inside
from reftlens.text.batch import Batch

NO_HOOK: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Captured:
    """What was captured of one row."""

    streams: dict[int, Float[Tensor, "cone d"]]
    """For each block that a cone begins at; none for a cone that begins at the embedding, computed each time."""
    keys: tuple[Float[Tensor, "heads before d_head"], ...]
    """One for each block of the cone; empty where nothing lies before it."""
    values: tuple[Float[Tensor, "heads before d_value"], ...]

    def tensors(self) -> list[Tensor]:
        return [*self.streams.values(), *self.keys, *self.values]

    def rebuilt(self, tensors: Sequence[Tensor]) -> "Captured":
        """The same with other tensors, in the order of `tensors()`."""
        streams, rest = dict(zip(self.streams, tensors, strict=False)), tensors[len(self.streams) :]
        return Captured(streams, tuple(rest[: len(self.keys)]), tuple(rest[len(self.keys) :]))

    def cut(self, whole: Span, cone: Span, first: int, skip: int) -> "Captured":
        """What a cone within `whole` needs that begins at block `first`, `skip` blocks above the lowest captured."""
        part = slice(cone.start - whole.start, cone.stop - whole.start)
        streams = {first: self.streams[first][part]} if first in self.streams else {}
        if cone.start == 0:
            return Captured(streams, (), ())
        keys, values = (tuple(t[:, : cone.start] for t in every[skip:]) for every in (self.keys, self.values))
        return Captured(streams, keys, values)


@dataclass
class Capture:
    """Captures rows of a right-padded data set for cones that begin at the blocks `firsts`.

    `cones` hold those of all plans. No cone begins after `latest`, the tokens before which leave keys and values.
    """

    body: Body
    data: Batch
    cones: list[Span]
    latest: list[int]
    firsts: tuple[int, ...]
    plain: bool
    autocast: Autocast
    returns: int = 0

    @torch.no_grad()
    def __call__(self, rows: Sequence[int]) -> list[Captured]:
        batch, before = self.data[list(rows)], [self.latest[r] for r in rows]
        with self.autocast():
            streams = self._streams(batch)
            lowest = streams.get(self.first)
            keys, values = ([], []) if max(before) == 0 else self._keys_and_values(batch, lowest, max(before))
        result = []
        for i, row in enumerate(rows):
            cone = self.cones[row]
            cut = {first: stream[i, cone.start : cone.stop] for first, stream in streams.items()}
            past = [tuple(t[i, :, : before[i]] for t in every) if before[i] else () for every in (keys, values)]
            result.append(Captured(cut, *past))
        return result

    @property
    def first(self) -> int:
        return min(self.firsts)

    def _streams(self, batch: Batch) -> dict[int, Tensor]:
        """The residual stream entering each of `firsts` but 0: the blocks below the highest run, nothing else."""
        body, firsts = self.body, sorted({*self.firsts} - {0})
        if not firsts:
            return {}
        blocks = observers(body, firsts, firsts[-1], plain=self.plain)
        self._run(batch, [(body.blocks[i], block) for i, block in blocks.items()])
        self.returns = blocks[0].returns
        return {i: stream for i in firsts if (stream := entering_stream(body, blocks, i)) is not None}

    def _keys_and_values(self, batch: Batch, stream: Tensor | None, length: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first `length` tokens at the blocks from `first` on, the last of which only starts."""
        if self.first == self.body.depth:
            return [], []
        layers = [
            DynamicLayer() if i < self.first else Recorder(ends=i == self.body.depth - 1)
            for i in range(self.body.depth)
        ]
        entry = None if stream is None else stream[:, :length]
        short = Batch(batch.tokens[:, :length], batch.role[:, :length], batch.target_mask[:, :length], batch.examples)
        self._run(short, entering(self.body, self.first, entry, self.returns), cache_of(layers))
        recorders = [layer for layer in layers if isinstance(layer, Recorder)]
        return [r.keys for r in recorders if r.keys is not None], [r.values for r in recorders if r.values is not None]

    def _run(self, batch: Batch, places: list[tuple[Slot, Module]], cache: Any = None) -> None:
        mask = batch.attention_mask
        place = torch.arange(mask.shape[1], device=mask.device).expand_as(batch.tokens)
        with self.body.arranged(places, plain=self.plain, used=NO_HOOK), suppress(Stop):
            forward_inside(self.body.model, batch.tokens, mask, place, cache)


def observers(body: Body, firsts: Sequence[int], end: int, *, plain: bool) -> dict[int, Observe]:
    """What to put into blocks 0 and `firsts` to see what enters them, in a pass that ends before block `end`."""
    numbers = sorted({min(i, body.depth - 1) for i in (0, *firsts, end)})
    blocks = {i: Observe(body.piece(body.blocks[i], plain=plain, used=NO_HOOK)) for i in numbers}
    if end < body.depth:
        blocks[end].runs = False
    else:
        blocks[body.depth - 1].ends = True
    return blocks


def entering_stream(body: Body, blocks: dict[int, Observe], first: int) -> Tensor | None:
    """The residual stream entering block `first`, or leaving the last one, that `observers` saw."""
    return blocks[first].entered if first < body.depth else blocks[body.depth - 1].left


def entering(body: Body, first: int, stream: Tensor | None, returns: int) -> list[tuple[Slot, Module]]:
    """What to put into the blocks below `first`, so that `stream` enters it and they compute nothing."""
    if stream is None:
        return []
    below: Any = body.blocks[first - 1]
    entry = Entry(below.original, stream, below.component.hook_out, returns)
    return [*((slot, Skip(slot.original, returns)) for slot in body.blocks[: first - 1]), (below, entry)]


def assemble(
    captured: Sequence[Captured], first: int, window: Window, like: Tensor
) -> tuple[Tensor | None, Bool[Tensor, "rows keys"], list[DynamicLayer]]:
    """The stream entering block `first` of several rows, the attention mask, and cache layers from that block on.

    Prefixes are padded on the left and cones on the right, so that neighbouring tokens are neighbours.
    """
    device, longest = window.real.device, int(window.starts.max())
    before = torch.arange(longest, device=device) >= longest - window.starts[:, None]
    stream, layers = None, list[DynamicLayer]()
    if first in captured[0].streams:
        width = captured[0].streams[first].shape[-1]
        stream = torch.zeros(*window.real.shape, width, device=device, dtype=like.dtype)
        for i, row in enumerate(captured):
            stream[i, : len(row.streams[first])] = row.streams[first]
    for i in range(max(len(row.keys) for row in captured)):
        keys = [row.keys[i] if row.keys else None for row in captured]
        values = [row.values[i] if row.values else None for row in captured]
        layers.append(Prefilled(keys, values, longest))
    return stream, torch.cat([before, window.real], dim=1), layers
