"""Cache layers of transformers that hold what was captured, note what is computed, or only have a length."""

from collections.abc import Sequence
from typing import Any

import torch
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
        self.keys = self.values = torch.zeros(1, dtype=torch.float32).expand(rows, 1, length, 1)
        self.is_initialized = True


class Recorder(DynamicLayer):
    """Notes the keys and values of one pass; with `ends`, they were all that the forward pass was for."""

    def __init__(self, *, ends: bool) -> None:
        super().__init__()
        self.ends = ends

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        if self.ends:
            raise Stop
        return key_states, value_states


class Prefilled(Stub):
    """Stored keys and values of each row (None: nothing), before those that a forward pass computes."""

    def __init__(self, keys: list[Tensor | None], values: list[Tensor | None], length: int) -> None:
        super().__init__(len(keys), length)
        self.stored_keys, self.stored_values, self.length = keys, values, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        keys = _Joined.apply(key_states, self.stored_keys, self.length)
        values = _Joined.apply(value_states, self.stored_values, self.length)
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        return keys, values


class _Joined(torch.autograd.Function):
    """`[stored, new]` along the tokens, stored rows padded on the left with zeros; only `new` takes a gradient."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, stored: list[Tensor | None], length: int) -> Tensor:
        ctx.length = length
        rows, heads, tokens, width = new.shape
        out = new.new_empty(rows, heads, length + tokens, width)
        for i, row in enumerate(stored):
            have = 0 if row is None else row.shape[1]
            out[i, :, : length - have] = 0
            if row is not None:
                out[i, :, length - have : length] = row
        out[:, :, length:] = new
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, :, ctx.length :], None, None
