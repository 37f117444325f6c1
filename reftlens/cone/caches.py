"""Cache layers of transformers that hold what was captured, note what is computed, or only have a length."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reftlens.editing.engine import Stop


def cache_of(layers: Sequence[DynamicLayer]) -> DynamicCache:
    """A cache with just these layers, none of which ever drops a key, sliding window or not."""
    cache = DynamicCache()
    cache.layers.extend(layers)
    return cache


class Stub(DynamicLayer):
    """The cache of a block that is not run: it has a length, which some models read from block 0, and no content."""

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self.keys = self.values = _no_content(rows, length)
        self.is_initialized = True


@lru_cache(maxsize=64)
def _no_content(rows: int, length: int) -> Tensor:
    return torch.zeros(1, dtype=torch.float32).expand(rows, 1, length, 1)


class PastTokens(NamedTuple):
    """Keys and values of many tokens, one after the other, with all heads side by side."""

    keys: Float[Tensor, "stored width"]
    values: Float[Tensor, "stored width"]
    index: Int[Tensor, "rows tokens"]
    """Of each row its tokens, and then as many more as a pass computes, or more, which are written over."""


class Prefilled(Stub):
    """Stored keys and values of each row, and those of a beginning that all rows share, before what a pass computes.

    Args:
        length: how many tokens there are before those of the pass; the last of them are `begun`, the others `stored`.
    """

    def __init__(
        self, rows: int, length: int, stored: PastTokens | None = None, begun: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(rows, length)
        self.length, self.stored, self.begun = length, stored, begun or (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        if self.length == 0:
            return key_states, value_states
        *stored, index = self.stored or (None, None, None)
        keys, values = (
            _Joined.apply(*each, index, self.length)
            for each in zip((key_states, value_states), self.begun, stored, strict=True)
        )
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        return keys, values


class Recorder(DynamicLayer):
    """Notes the keys and values of one pass, after stored ones; with `ends`, they were all that the pass was for."""

    def __init__(self, *, ends: bool, after: Prefilled | None = None) -> None:
        super().__init__()
        self.ends, self.after = ends, after
        self.new_keys: Tensor | None = None
        self.new_values: Tensor | None = None
        if after is not None:
            self.keys, self.values, self.is_initialized = after.keys, after.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        self.new_keys, self.new_values = key_states, value_states
        if self.ends:
            raise Stop
        return (key_states, value_states) if self.after is None else self.after.update(key_states, value_states)


def recorders_after(layers: Sequence[DynamicLayer], first: int, depth: int, *, ends: bool) -> list[Recorder]:
    """Of the blocks from `first` on, after what is stored there, if anything is; where it `ends`, the last one only
    starts."""
    stored = [layer for layer in layers if isinstance(layer, Prefilled)] or [None] * (depth - first)
    return [Recorder(ends=ends and i == depth - 1, after=layer) for i, layer in enumerate(stored, first)]


def recorded(recorders: Sequence[Recorder]) -> tuple[list[Tensor], list[Tensor]]:
    """The keys, and the values, of each layer that was reached."""
    seen = [(layer.new_keys, layer.new_values) for layer in recorders]
    return [k for k, _ in seen if k is not None], [v for _, v in seen if v is not None]


class _Joined(torch.autograd.Function):
    """`[stored, begun, new]` along the tokens, stored ones of all rows taken at once and without a gradient.

    What is begun is written to each row from one place, and takes the sum of the rows' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, new: Tensor, begun: Tensor | None, stored: Tensor | None, index: Tensor | None, length: int
    ) -> Float[Tensor, "rows heads tokens width"]:
        ctx.length, ctx.begun = length, 0 if begun is None else begun.shape[2]
        rows, heads, tokens, width = new.shape
        if stored is None or index is None:
            out = new.new_empty(rows, heads, length + tokens, width)
        else:
            index = index if index.shape[1] == length + tokens else index[:, : length + tokens]
            taken = stored.index_select(0, index.flatten()).to(new.device, new.dtype)
            out = taken.view(rows, length + tokens, heads, width).transpose(1, 2)
        if begun is not None:
            out[:, :, length - ctx.begun : length] = begun
        out[:, :, length:] = new
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (grad,), length, begun = grads, ctx.length, None
        if ctx.begun and ctx.needs_input_grad[1]:
            begun = grad[:, :, length - ctx.begun : length].sum(dim=0, keepdim=True)
        return grad[:, :, length:], begun, None, None, None
