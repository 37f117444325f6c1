"""What enters the light cone: from below the residual stream, from before keys and values; of one row, and of several.

A pass enters a block from stored streams, or ends before one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.parts import Slot
from reftlens.cone.body import Body
from reftlens.cone.caches import Pieces, Prefilled
from reftlens.cone.spans import Span, Window
from reftlens.cone.stand_ins import Entry, Observe, Skip

NO_HOOK: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Captured:
    """What was captured of one row."""

    streams: dict[int, Float[Tensor, "cone d"]]
    """For each block that a cone begins at; none for a cone that begins at the embedding, computed each time."""
    keys: tuple[Float[Tensor, "heads before d_head"], ...]
    """One for each block of the cone; empty where nothing lies before it."""
    values: tuple[Float[Tensor, "heads before d_value"], ...]
    beginning: "Captured | None" = None
    """What lies before these tokens, where the row shares it with others."""

    def tensors(self) -> list[Tensor]:
        """Its own."""
        return [*self.streams.values(), *self.keys, *self.values]

    def rebuilt(self, tensors: Sequence[Tensor], beginning: "Captured | None") -> "Captured":
        """The same with other tensors, in the order of `tensors()`."""
        streams, rest = dict(zip(self.streams, tensors, strict=False)), tensors[len(self.streams) :]
        return Captured(streams, tuple(rest[: len(self.keys)]), tuple(rest[len(self.keys) :]), beginning)

    def narrowed(self) -> "Captured":
        """The same, its own tensors in bfloat16."""
        return self.rebuilt([tensor.to(torch.bfloat16) for tensor in self.tensors()], self.beginning)

    @property
    def shared(self) -> int:
        """Tokens of the beginning."""
        return 0 if self.beginning is None else self.beginning.keys[0].shape[1]

    def above(self, skip: int) -> "Captured":
        """Keys and values of all but the lowest `skip` blocks."""
        return Captured({}, self.keys[skip:], self.values[skip:], self.beginning and self.beginning.above(skip))

    def cut(self, whole: Span, cone: Span, first: int, skip: int) -> "Captured":
        """What a cone within `whole` needs that begins at block `first`, `skip` blocks above the lowest captured."""
        return self.part(whole, (first - skip,), cone, (first,), cone.start)

    def part(
        self, whole: Span, firsts: tuple[int, ...], span: Span, wanted: tuple[int, ...], latest: int
    ) -> "Captured":
        """What cones within `whole` need that begin at the blocks `wanted`, no earlier than at token `latest`."""
        tokens = slice(span.start - whole.start, span.stop - whole.start)
        streams = {first: self.streams[first][tokens] for first in wanted if first in self.streams}
        if latest == 0:
            return Captured(streams, (), ())
        above, own = self.above(min(wanted) - min(firsts)), latest - self.shared
        keys, values = (tuple(t[:, :own] for t in every) for every in (above.keys, above.values))
        return Captured(streams, keys, values, above.beginning)

    def followed(self, streams: dict[int, Tensor], keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> "Captured":
        """With streams that enter more blocks, and keys and values of the tokens that follow."""
        more, own = (*keys, *values), (*self.keys, *self.values)
        past = [torch.cat(pair, dim=1) for pair in zip(own, more, strict=True)] if own and more else own or more
        middle = len(past) // 2
        return Captured(self.streams | streams, tuple(past[:middle]), tuple(past[middle:]), self.beginning)

    def pieces(self, block: int) -> tuple[Pieces, Pieces]:
        """Keys, and values, of all tokens before the cone."""
        if not self.keys:
            return (), ()
        before = ((), ()) if self.beginning is None else self.beginning.pieces(block)
        return (*before[0], self.keys[block]), (*before[1], self.values[block])


def mask_of(window: Window) -> Bool[Tensor, "rows keys"]:
    """What is real of the tokens before each row of a window, padded on the left, and of those in it."""
    longest = int(window.starts.max())
    before = torch.arange(longest, device=window.real.device) >= longest - window.starts[:, None]
    return torch.cat([before, window.real], dim=1)


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
    captured: Sequence[Captured], first: int, window: Window, like: Tensor, begun: Sequence[tuple[Tensor, Tensor]] = ()
) -> tuple[Tensor | None, Bool[Tensor, "rows keys"], list[DynamicLayer]]:
    """The stream entering block `first` of several rows, the attention mask, and cache layers from that block on.

    Prefixes are padded on the left and cones on the right, so that neighbouring tokens are neighbours. Keys and values
    of each block that are `begun` stand between them: the first tokens of the cones, computed for all rows.
    """
    longest, shared, stream = int(window.starts.max()), begun[0][0].shape[2] if begun else 0, None
    if first in captured[0].streams:
        width = captured[0].streams[first].shape[-1]
        stream = torch.zeros(*window.real.shape, width, device=window.real.device, dtype=like.dtype)
        for i, row in enumerate(captured):
            own = row.streams[first][shared : shared + window.real.shape[1]]
            stream[i, : len(own)] = own
    layers: list[DynamicLayer] = []
    for block in range(max(len(begun), *(len(row.keys) for row in captured))):
        keys, values = zip(*(row.pieces(block) for row in captured), strict=True)
        layers.append(Prefilled(keys, values, longest, begun[block] if begun else None))
    return stream, mask_of(window), layers
