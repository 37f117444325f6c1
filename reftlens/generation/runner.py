"""Runs a model on its key/value cache, through as little of it as possible, for the logits of the newest token."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.parts import Slot
from reftlens.bridge.protocol import Bridge
from reftlens.cone.body import Body
from reftlens.cone.caches import Stub, cache_of
from reftlens.cone.prefix import NO_HOOK, entering, entering_stream, observers
from reftlens.cone.stand_ins import Gather
from reftlens.editing.edits import Edit, used_points
from reftlens.editing.engine import Stop, attached, forward_cached, forward_inside
from reftlens.generation.rows import Rows
from reftlens.generation.stages import distinct, stages


@dataclass(frozen=True, eq=False)
class PromptStates:
    """What was computed of left-padded prompts without an edit, for generation to go on from column `start`."""

    stream: Float[Tensor, "row cone d"] | None
    """Residual stream entering block `first`, from column `start` on; None where `first` is 0."""
    first: int
    start: int
    returns: int
    """How many values the model's blocks return; 0 for a bare tensor."""
    keys: tuple[Float[Tensor, "row heads column d_head"], ...]
    """Of every block, at all columns."""
    values: tuple[Float[Tensor, "row heads column d_value"], ...]
    distinct: int | None = None
    """Tokens that were computed, where prompts begin alike and that was computed once."""

    def enter(
        self, body: Body, rows: Int[Tensor, " rows"], start: int, stop: int, cache: Any
    ) -> tuple[DynamicCache, list[tuple[Slot, nn.Module]]]:
        """A cache of some rows up to column `start`, and what to put into the blocks below `first`.

        They then compute nothing, and the stream of the columns up to `stop` enters block `first`. Above it, a cache
        that holds columns from `self.start` on stays.
        """
        stubs = [Stub(len(rows), start) for _ in range(self.first)]
        above = (
            self._layers(range(self.first, body.depth), rows, start) if cache is None else cache.layers[self.first :]
        )
        stream = None if self.stream is None else self.stream[rows, start - self.start : stop - self.start]
        return cache_of([*stubs, *above]), entering(body, self.first, stream, self.returns)

    def fill(self, cache: Any, rows: Int[Tensor, " rows"]) -> None:
        """Put all columns of the blocks that computed nothing into a cache."""
        cache.layers[: self.first] = self._layers(range(self.first), rows, None)

    def _layers(self, blocks: range, rows: Int[Tensor, " rows"], stop: int | None) -> list[DynamicLayer]:
        """Cache layers of these blocks with the columns before `stop`."""
        layers = []
        for i in blocks:
            layer = DynamicLayer()
            layer.lazy_initialization(self.keys[i], self.values[i])
            layer.keys, layer.values = self.keys[i][rows, :, :stop], self.values[i][rows, :, :stop]
            layers.append(layer)
        return layers


class Runner:
    """Runs a model for the logits of the newest token, by its parts where the model allows it.

    Original components run wherever no edit needs the bridge's; where that is not possible, the bridge itself does.
    """

    def __init__(self, model: Bridge) -> None:
        self.model, self.body, self.problem = model, None, ""
        try:
            self.body = Body(model)
        except ValueError as error:
            self.problem = str(error)

    def obstacle(self) -> str:
        """Why the model, as it is now, is run as a whole, or ""."""
        return self.problem if self.body is None else self.body.obstacle() or self.body.stateful

    def step(
        self, rows: Rows, new: int, edits: Sequence[Edit], cache: Any, below: Sequence[tuple[Slot, nn.Module]] = ()
    ) -> tuple[Float[Tensor, "row vocab"], Any]:
        """Logits after the last of the `new` columns that are not in the cache, and the cache with all columns.

        `below` is what stands in for blocks that are not run.
        """
        body = self.body
        if body is None or self.obstacle():
            with attached(self.model, edits):
                logits, cache = forward_cached(self.model, rows.tokens[:, -new:], rows.real, cache)
            return logits[:, -1], cache
        used, every = used_points(edits), torch.arange(len(rows), device=rows.tokens.device)
        last = Gather((every, torch.full_like(every, new - 1)))
        last.unembed = body.piece(body.head, plain=body.may_be_plain, used=used)
        places = [(body.head, last), *below]
        cache = cache_of([DynamicLayer() for _ in body.blocks]) if cache is None else cache
        with attached(self.model, edits):
            logits = _run(body, rows, new, cache, places, used)
        return logits[0], cache


def read(runner: Runner, prompts: Rows, first: int, start: int, overhead: float) -> PromptStates | None:
    """Run prompts through the unedited model, as far as the residual stream entering block `first`.

    None where a block has no keys and values of its own.
    """
    body, cache = runner.body, None
    assert body is not None
    *before, last = stages(prompts.tokens, prompts.real, limit=start, overhead=overhead)
    for stage in before:
        _, cache = runner.step(stage.of(prompts).until(stage.stop), stage.stop - stage.start, [], cache)
        stage.hand_on(cache)
    cache = cache_of([DynamicLayer() for _ in body.blocks]) if cache is None else cache
    blocks = observers(body, [first], body.depth, plain=body.may_be_plain)
    places: list[tuple[Slot, nn.Module]] = [(body.blocks[i], block) for i, block in blocks.items()]
    with suppress(Stop):
        _run(body, last.of(prompts), last.stop - last.start, cache, places, NO_HOOK)
    last.hand_on(cache)
    entered = entering_stream(body, blocks, first)
    stream = last.to_all(entered[:, start - last.start :]) if first > 0 and entered is not None else None
    filled = [(x.keys, x.values) for x in cache.layers if isinstance(x, DynamicLayer) and x.is_initialized]
    if len(filled) < body.depth:
        return None
    keys, values = zip(*filled, strict=True)
    return PromptStates(stream, first, start, blocks[0].returns, keys, values, distinct([*before, last], prompts))


def _run(
    body: Body, rows: Rows, new: int, cache: DynamicCache, places: list[tuple[Slot, nn.Module]], used: frozenset[int]
) -> Tensor:
    """The logits of one forward pass over the last `new` columns."""
    index = (rows.real.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
    with body.arranged(places, plain=body.may_be_plain, used=used):
        return forward_inside(body.model, rows.tokens[:, -new:], rows.real, index, cache)
