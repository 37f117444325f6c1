"""The last block, computed only where a target is predicted from; its keys and values are those of all tokens.

The block runs twice: once on all tokens, as far as its keys and values; then whole, on the scored tokens alone, with
those keys and values in its cache. No norm, query, attention or MLP is computed for a token that nobody reads.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reftlens.cone.body import Body
from reftlens.cone.caches import Recorder, cache_of
from reftlens.cone.stand_ins import StandIn
from reftlens.editing.engine import Stop

Targets = tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]
"""Row and column of what each target is predicted from, on the host."""


class Trimmed(StandIn):
    """In the place of the last block. Its output is right at the scored tokens `at` and zero elsewhere."""

    def __init__(self, body: Body, cache: DynamicCache, layer: DynamicLayer, before: int, at: Targets) -> None:
        last: Any = body.blocks[-1]
        super().__init__(last.original)
        self.hook_out: Callable[[Tensor], Tensor] = last.component.hook_out
        self.cache, self.layer, self.index, self.before, self.at = cache, layer, body.depth - 1, before, at

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, width = hidden_states.shape[:2]
        columns, places = _columns(self.at, rows)
        columns = columns.to(hidden_states.device)
        recorder = Recorder(ends=True)
        with suppress(Stop):
            self._run(recorder, lambda x: x, hidden_states, args, kwargs)
        assert recorder.new_keys is not None and recorder.new_values is not None
        keys, values = self.layer.update(recorder.new_keys, recorder.new_values)
        if not any(isinstance(x, Tensor) and x.ndim == 4 for x in (*args, *kwargs.values())):
            # No mask was passed, as none was needed for a plain causal triangle; now one is.
            place = torch.arange(keys.shape[-2], device=columns.device)
            mask = (place <= self.before + columns[:, None, :, None]).expand(rows, 1, columns.shape[1], -1)
            args, kwargs = _with_mask(mask, args, kwargs)
        out = self._run(_Known(keys, values), lambda x: _taken_of(x, columns, width), hidden_states, args, kwargs)
        first = out[0] if isinstance(out, tuple) else out
        at, which, column = places.to(hidden_states.device).unbind(dim=0)
        whole = torch.zeros_like(hidden_states).index_put((at, column), first[at, which])
        whole = self.hook_out(whole)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    def _run(
        self,
        layer: DynamicLayer,
        part: Callable[[Any], Any],
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The block on `part` of its arguments, with `layer` in place of its own part of the cache."""
        cache = cache_of([*(DynamicLayer() for _ in range(self.index)), layer])

        def passed(x: Any) -> Any:
            return cache if x is self.cache else part(x)

        return self.block(part(hidden), *(passed(x) for x in args), **{k: passed(x) for k, x in kwargs.items()})


class _Known(DynamicLayer):
    """Keys and values that are known already, those of the queries among them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.known = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        return self.known


def _columns(at: Targets, rows: int) -> tuple[Int[Tensor, "rows most"], Int[Tensor, "3 targets"]]:
    """The scored columns of each row, as many in all (column 0 where a row has fewer); of each target its row, its
    number there and its column."""
    counts = torch.bincount(at[0], minlength=rows)
    real = torch.arange(int(counts.max())) < counts[:, None]
    columns = torch.zeros(real.shape, dtype=torch.long)
    columns[real] = at[1]
    return columns, torch.stack([*real.nonzero().unbind(dim=1), at[1]])


def _taken_of(x: Any, columns: Int[Tensor, "rows most"], width: int) -> Any:
    """These columns of whatever has `width` of them, in a tuple too; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(_taken_of(part, columns, width) for part in x)
    if not isinstance(x, Tensor):
        return x
    if x.ndim == 4 and x.shape[-2] == width:
        return torch.take_along_dim(x, columns[:, None, :, None], -2)
    if x.ndim in (2, 3) and x.shape[1] == width:
        return torch.take_along_dim(x, columns if x.ndim == 2 else columns[:, :, None], 1)
    return x


def _with_mask(mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with an attention mask; by name, or in its place after the cache."""
    if "attention_mask" in kwargs or len(args) < 2:
        return args, kwargs | {"attention_mask": mask}
    return (args[0], mask, *args[2:]), kwargs
