"""Rows of which too little is known are computed on from what is: stored streams go through the blocks above them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftlens.cone.caches import Stub, cache_of, recorded, recorders_after
from reftlens.cone.capture import Capture, pool_of
from reftlens.cone.captured import NO_TOKENS, Captured, packed, taken, together
from reftlens.cone.memory import Known
from reftlens.cone.prefix import NO_HOOK, assemble, entering, entering_stream, observers
from reftlens.cone.spans import Span, window
from reftlens.editing.engine import Stop, forward_inside


@torch.no_grad()
def extended(capture: Capture, known: Mapping[int, Known]) -> dict[int, Known]:
    """What is known of some rows, of all at the same blocks, and beside it what `capture` wants of them.

    Streams that are missing are seen on the way up from the nearest stored ones. Where keys of later tokens are
    missing, the way begins at the lowest stored stream, and ends with the keys and values of the last block.
    """
    firsts, some = next(iter(known.values())).cones.firsts, list(known.values())
    deeper = sorted({*capture.firsts} - {*firsts, 0})
    later = any(capture.latest[row] > each.cones.latest for row, each in known.items())
    start = min(firsts) if later else max(first for first in firsts if first <= deeper[0])
    with capture.autocast():
        streams, keys, values = _computed(capture, list(known), some, start, deeper, later=later)
    wholes = [
        each.cones.union(each.cones._replace(firsts=capture.firsts, latest=capture.latest[row]))
        for row, each in known.items()
    ]
    old = together([each.captured for each in some])
    places = window([row.cone for row in old]).columns
    stored = {first: taken(stream, places) for first, stream in old[0].pool.streams.items()}
    every = {first: stream.flatten(0, 1) for first, stream in (stored | streams).items()}
    pool, rows = pool_of(every, keys, values), list[Captured]()
    for i, (each, whole, row) in enumerate(zip(some, wholes, old, strict=True)):
        start, span = i * places.shape[1], each.cones.span
        later_ones = (start + token - span.start for token in (each.cones.latest, whole.latest))
        new = Span(*later_ones) if keys else NO_TOKENS
        rows.append(Captured(pool, Span(start, start + span.length), new, 0, replace(row, cone=NO_TOKENS)))
    result = zip(known.items(), wholes, packed(rows), strict=True)
    return {row: each._replace(cones=whole, captured=captured) for (row, each), whole, captured in result}


def _computed(
    capture: Capture, rows: Sequence[int], known: Sequence[Known], start: int, deeper: Sequence[int], *, later: bool
) -> tuple[dict[int, Tensor], list[Tensor], list[Tensor]]:
    """The streams entering the blocks `deeper`; with `later` keys and values of the blocks from `start` on, too."""
    body, depth, end = capture.body, capture.body.depth, capture.body.depth if later else deeper[-1]
    win = window([each.cones.span for each in known])
    below = [each.part(each.cones.entry(start)) for each in known]
    stream, mask, layers = assemble(below, start, win, next(body.head.original.parameters()))
    recorders = recorders_after(layers, start, depth, ends=later and depth not in deeper)
    skipped: list[DynamicLayer] = [Stub(len(rows), win.before)] * start
    cache = cache_of([*skipped, *recorders]) if layers or later else None  # a stateful model takes no cache of ours
    blocks = {i: seen for i, seen in observers(body, deeper, end, plain=capture.plain).items() if i >= start}
    places = [*entering(body, start, stream, known[0].returns), *((body.blocks[i], seen) for i, seen in blocks.items())]
    with body.arranged(places, plain=capture.plain, used=NO_HOOK), suppress(Stop):
        tokens, columns = (x.to(mask.device) for x in (win.cut(capture.data.tokens[list(rows)]), win.columns))
        forward_inside(body.model, tokens, mask, columns, cache)
    streams = {i: stream for i in deeper if (stream := entering_stream(body, blocks, i)) is not None}
    return streams, *(recorded(recorders) if later else ([], []))
