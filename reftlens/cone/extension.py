"""Rows of which too little is known are computed on from what is: stored streams go through the blocks above them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftlens.cone.caches import Prefilled, Recorder, Stub, cache_of, recorded
from reftlens.cone.capture import Capture
from reftlens.cone.memory import Known
from reftlens.cone.prefix import NO_HOOK, assemble, entering, entering_stream, observers
from reftlens.cone.spans import window
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
    result = dict[int, Known]()
    for i, (row, each) in enumerate(known.items()):
        own = each.cones
        whole = own.union(own._replace(firsts=capture.firsts, latest=capture.latest[row]))
        more = {first: stream[i, : own.span.length].clone() for first, stream in streams.items()}
        new = slice(own.latest - own.span.start, whole.latest - own.span.start)
        past = (tuple(t[i, :, new].clone() for t in every) for every in (keys, values))
        result[row] = each._replace(cones=whole, captured=each.captured.followed(more, *past))
    return result


def _computed(
    capture: Capture, rows: Sequence[int], known: Sequence[Known], start: int, deeper: Sequence[int], *, later: bool
) -> tuple[dict[int, Tensor], list[Tensor], list[Tensor]]:
    """The streams entering the blocks `deeper`; with `later` keys and values of the blocks from `start` on, too."""
    body, depth, end = capture.body, capture.body.depth, capture.body.depth if later else deeper[-1]
    win = window([each.cones.span for each in known], capture.data.tokens.device)
    below = [each.part(each.cones.entry(start)) for each in known]
    stream, mask, layers = assemble(below, start, win, next(body.head.original.parameters()))
    before = [layer for layer in layers if isinstance(layer, Prefilled)] or [None] * (depth - start)
    only_starts = later and depth not in deeper
    recorders = [Recorder(ends=only_starts and i == depth - 1, after=layer) for i, layer in enumerate(before, start)]
    skipped: list[DynamicLayer] = [Stub(len(rows), int(win.starts.max())) for _ in range(start)]
    blocks = {i: seen for i, seen in observers(body, deeper, end, plain=capture.plain).items() if i >= start}
    places = [*entering(body, start, stream, known[0].returns), *((body.blocks[i], seen) for i, seen in blocks.items())]
    with body.arranged(places, plain=capture.plain, used=NO_HOOK), suppress(Stop):
        tokens = win.cut(capture.data.tokens[list(rows)])
        forward_inside(body.model, tokens, mask, win.columns, cache_of([*skipped, *recorders]))
    streams = {i: stream for i in deeper if (stream := entering_stream(body, blocks, i)) is not None}
    return streams, *(recorded(recorders) if later else ([], []))
