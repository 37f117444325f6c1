"""Runs a model on its key/value cache, through as little of it as possible, for the logits of the newest token."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
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

    def repeated(self, times: int) -> "PromptStates":
        """Of all prompts so many times over."""
        stream = None if self.stream is None else self.stream.repeat(times, 1, 1)
        keys, values = (tuple(x.repeat(times, 1, 1, 1) for x in each) for each in (self.keys, self.values))
        return replace(self, stream=stream, keys=keys, values=values)

    def layers(self, blocks: range, stop: int | None = None) -> list[DynamicLayer]:
        """Cache layers that hold the columns before `stop`, of these blocks; what is stored stays as it is."""
        layers = []
        for i in blocks:
            layer = DynamicLayer()
            layer.lazy_initialization(self.keys[i], self.values[i])
            layer.keys, layer.values = self.keys[i][:, :, :stop], self.values[i][:, :, :stop]
            layers.append(layer)
        return layers

    def enter(self, body: Body) -> tuple[DynamicCache, list[tuple[Slot, nn.Module]]]:
        """A cache that ends at `start`, and what to put into the blocks below `first` so that they compute nothing."""
        stubs = [Stub(len(self.keys[0]), self.start) for _ in range(self.first)]
        cache = cache_of([*stubs, *self.layers(range(self.first, body.depth), self.start)])
        return cache, entering(body, self.first, self.stream, self.returns)


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
        self, rows: Rows, new: int, edits: Sequence[Edit], cache: Any, states: PromptStates | None
    ) -> tuple[Float[Tensor, "row vocab"], Any]:
        """Logits after the last of the `new` columns that are not in the cache, and the cache with all columns."""
        body = self.body
        if body is None or self.obstacle():
            with attached(self.model, edits):
                logits, cache = forward_cached(self.model, rows.tokens[:, -new:], rows.real, cache)
            return logits[:, -1], cache
        used = used_points(edits)
        places: list[tuple[Slot, nn.Module]] = [(body.head, _last_of(rows, new, body, used))]
        if states is not None:
            cache, below = states.enter(body)
            places += below
        elif cache is None:
            cache = cache_of([DynamicLayer() for _ in body.blocks])
        with attached(self.model, edits):
            logits = _run(body, rows, new, cache, places, used)
        if states is not None:
            cache.layers[: states.first] = states.layers(range(states.first))
        return logits[0], cache


def read(runner: Runner, prompts: Rows, first: int, start: int, overhead: float) -> PromptStates | None:
    """Run prompts through the unedited model, as far as the residual stream entering block `first`.

    None where a block has no keys and values of its own.
    """
    body, cache = runner.body, None
    assert body is not None
    *before, last = stages(prompts.tokens, prompts.real, limit=start, overhead=overhead)
    for stage in before:
        _, cache = runner.step(stage.of(prompts).until(stage.stop), stage.stop - stage.start, [], cache, None)
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


def _last_of(rows: Rows, new: int, body: Body, used: frozenset[int]) -> Gather:
    """The unembedding, of the last of `new` columns alone."""
    gather, every = Gather(None), torch.arange(len(rows), device=rows.tokens.device)
    gather.last, gather.unembed = True, body.piece(body.head, plain=body.may_be_plain, used=used)
    gather.at = (every, torch.full_like(every, new - 1))
    return gather


def _run(
    body: Body, rows: Rows, new: int, cache: DynamicCache, places: list[tuple[Slot, nn.Module]], used: frozenset[int]
) -> Tensor:
    """The logits of one forward pass over the last `new` columns."""
    index = (rows.real.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
    with body.arranged(places, plain=body.may_be_plain, used=used):
        return forward_inside(body.model, rows.tokens[:, -new:], rows.real, index, cache)
