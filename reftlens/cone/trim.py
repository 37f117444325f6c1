"""The last block, computed only where a target is predicted from; its keys and values are those of all tokens.

The block runs twice: once on all tokens, as far as its keys and values; then whole, on the scored tokens alone, with
those keys and values in its cache. No norm, query, attention or MLP is computed for a token that nobody reads.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reftlens.cone.body import Body
from reftlens.cone.prefix import Recorder, cache_of
from reftlens.editing.engine import Stop


class Trimmed(nn.Module):
    """In the place of the last block. Its output is right at the scored tokens and zero elsewhere."""

    def __init__(
        self,
        body: Body,
        cache: DynamicCache,
        layer: DynamicLayer,
        before: int,
        at: tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]],
    ) -> None:
        super().__init__()
        last: Any = body.blocks[-1]
        self.block: nn.Module = last.original
        self.hook_out: Callable[[Tensor], Tensor] = last.component.hook_out
        self.cache, self.layer, self.index, self.before, self.at = cache, layer, body.depth - 1, before, at

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        rows, width = hidden_states.shape[:2]
        keep, real = _kept(self.at, rows, hidden_states.device)
        recorder = Recorder(ends=True)
        with suppress(Stop):
            self._run(hidden_states, args, given, recorder, lambda x: x)
        assert recorder.keys is not None and recorder.values is not None
        keys, values = self.layer.update(recorder.keys, recorder.values)

        def chosen(x: Any) -> Any:
            """The kept tokens of whatever has one entry per token."""
            if isinstance(x, tuple):
                return tuple(chosen(part) for part in x)
            if not isinstance(x, Tensor):
                return x
            if x.ndim == 4 and x.shape[-2] == width:
                return _taken(x, keep[:, None, :, None], -2)
            if x.ndim in (2, 3) and x.shape[1] == width:
                return _taken(x, keep if x.ndim == 2 else keep[:, :, None], 1)
            return x

        if not any(isinstance(x, Tensor) and x.ndim == 4 for x in (*args, *given.values())):
            # No mask was made, as none was needed for a plain causal triangle; now one is.
            place = torch.arange(keys.shape[-2], device=keep.device)
            mask = (place <= self.before + keep[:, None, :, None]).expand(rows, 1, keep.shape[1], -1)
            args, given = _with_mask(mask, args, given)
        out = self._run(hidden_states, args, given, _Known(keys, values), chosen)
        first = out[0] if isinstance(out, tuple) else out
        at, which = real.nonzero().unbind(dim=1)
        whole = torch.zeros_like(hidden_states).index_put((at, keep[at, which]), first[at, which])
        whole = self.hook_out(whole)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    def _run(
        self, hidden: Tensor, args: tuple[Any, ...], given: dict[str, Any], layer: DynamicLayer,
        chosen: Callable[[Any], Any],
    ) -> Any:  # fmt: skip
        """The block, with `layer` in place of its own part of the cache."""
        cache = cache_of([*(DynamicLayer() for _ in range(self.index)), layer])

        def pick(x: Any) -> Any:
            return cache if x is self.cache else chosen(x)

        return self.block(chosen(hidden), *(pick(x) for x in args), **{k: pick(x) for k, x in given.items()})


class _Known(DynamicLayer):
    """Keys and values that are known already, those of the queries among them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.known = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        return self.known


def _kept(
    at: tuple[Tensor, Tensor], rows: int, device: torch.device
) -> tuple[Int[Tensor, "rows kept"], Bool[Tensor, "rows kept"]]:
    """Columns to keep in each row, as many in all (column 0 where a row has fewer), and which of them are real."""
    counts = torch.bincount(at[0], minlength=rows)
    real = torch.arange(int(counts.max()), device=device) < counts[:, None]
    keep = torch.zeros(real.shape, dtype=torch.long, device=device)
    keep[real] = at[1]
    return keep, real


def _taken(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`x` at the places of `index` along `dim`, one list of places per row."""
    shape = list(x.shape)
    shape[0] = index.shape[0]
    wide = list(shape)
    wide[dim] = index.shape[dim]
    return x.expand(shape).gather(dim, index.expand(wide))


def _with_mask(mask: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with an attention mask; by name, or in its place after the cache."""
    if "attention_mask" in given or len(args) < 2:
        return args, given | {"attention_mask": mask}
    return (args[0], mask, *args[2:]), given
