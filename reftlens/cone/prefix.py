"""What enters the light cone: from below the residual stream, from before keys and values; of one row, and of several.

A pass enters a block from stored streams, or ends before one.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.parts import Slot
from reftlens.cone.body import Body
from reftlens.cone.caches import PastTokens, Prefilled
from reftlens.cone.captured import Captured, taken, together
from reftlens.cone.spans import Window
from reftlens.cone.stand_ins import Entry, Observe, Skip

NO_HOOK: frozenset[int] = frozenset()


def mask_of(window: Window) -> Bool[Tensor, "rows keys"]:
    """What is real of the tokens before each row of a window, padded on the left, and of those in it."""
    before = torch.arange(window.before) >= window.before - window.starts[:, None]
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

    Prefixes are padded on the left and cones on the right, so that neighbouring tokens are neighbours; where nothing is
    real stands what any token has. Keys and values of each block that are `begun` stand between them: the first tokens
    of the cones, computed for all rows.
    """
    captured, device = together(captured), like.device
    shared, pool = begun[0][0].shape[2] if begun else 0, captured[0].pool
    stream = None
    if first in pool.streams:
        begins = torch.tensor([row.cone.start + shared for row in captured])[:, None] - window.starts[:, None]
        stream = taken(pool.streams[first], begins + window.columns).to(device, like.dtype)
    return stream, mask_of(window).to(device), [*past_layers(captured, window, begun)]


def past_layers(
    captured: Sequence[Captured | None], window: Window, begun: Sequence[tuple[Tensor, Tensor]] = ()
) -> list[Prefilled]:
    """Cache layers, from the lowest captured block on, of all that lies before a window: captured in one pool, then
    what has `begun`; none where there is neither."""
    some = next((row for row in captured if row is not None and row.past and row.pool.keys), None)
    count, length = len(captured), window.before
    if some is None:
        return [Prefilled(count, length, None, pair) for pair in begun]
    index = np.zeros((count, length + window.real.shape[1]), dtype=np.int64)
    for line, row in zip(index, captured, strict=True):
        end = length - (begun[0][0].shape[2] if begun else 0)
        for part in reversed(() if row is None else row.parts):
            line[end - part.before.length : end] = np.arange(part.before.start, part.before.stop)
            end -= part.before.length
    where = torch.from_numpy(index).to(some.pool.keys[0].device)
    keys, values = some.pool.keys[some.skip :], some.pool.values[some.skip :]
    pairs = zip(keys, values, begun or repeat(None), strict=False)
    return [Prefilled(count, length, PastTokens(k, v, where), pair) for k, v, pair in pairs]
