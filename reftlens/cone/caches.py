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


Pieces = tuple[Tensor, ...]
"""Keys, or values, of tokens that follow one another, `[heads, tokens, width]` each."""


class Prefilled(Stub):
    """Stored keys and values of each row, and those of a beginning that all rows share, before what a pass computes."""

    def __init__(
        self, keys: Sequence[Pieces], values: Sequence[Pieces], length: int, shared: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(len(keys), length)
        self.stored_keys, self.stored_values, self.length = list(keys), list(values), length
        self.shared = shared or (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        keys = _Joined.apply(key_states, self.shared[0], self.stored_keys, self.length)
        values = _Joined.apply(value_states, self.shared[1], self.stored_values, self.length)
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


def recorded(recorders: Sequence[Recorder]) -> tuple[list[Tensor], list[Tensor]]:
    """The keys, and the values, of each layer that was reached."""
    seen = [(layer.new_keys, layer.new_values) for layer in recorders]
    return [k for k, _ in seen if k is not None], [v for _, v in seen if v is not None]


class _Joined(torch.autograd.Function):
    """`[stored, shared, new]` along the tokens, stored rows padded on the left with zeros and without a gradient.

    What is shared is written to each row from one place, and takes the sum of the rows' gradients.
    """

    @staticmethod
    def forward(ctx: Any, new: Tensor, shared: Tensor | None, stored: Sequence[Pieces], length: int) -> Tensor:
        ctx.length, ctx.shared = length, 0 if shared is None else shared.shape[2]
        rows, heads, tokens, width = new.shape
        out = new.new_empty(rows, heads, length + tokens, width)
        for i, pieces in enumerate(stored):
            end = length - ctx.shared
            for piece in reversed(pieces):
                out[i, :, end - piece.shape[1] : end] = piece
                end -= piece.shape[1]
            if end:
                out[i, :, :end] = 0
        if shared is not None:
            out[:, :, length - ctx.shared : length] = shared
        out[:, :, length:] = new
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,), length, shared = grads, ctx.length, None
        if ctx.shared and ctx.needs_input_grad[1]:
            shared = grad[:, :, length - ctx.shared : length].sum(dim=0, keepdim=True)
        return grad[:, :, length:], shared, None, None
