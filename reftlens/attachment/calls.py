"""What a forward pass of a transformers model was called with; a call of which that is not clear is refused."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_STATES = ("cache_params", "state", "cache", "mems", "block_table", "past_buckets_states")
"""What other models keep of the tokens before."""
_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx", "sequence_id")
_IGNORED = -100
"""The label of a token that is not scored."""


@dataclass(frozen=True)
class Call:
    """The tokens of a forward pass, and what is known of those in its cache."""

    tokens: Int[Tensor, "row new"]
    real: Bool[Tensor, "row column"] | None
    """Of all columns, cached ones too, which are no padding; None where the model was given no mask."""
    cache: Any
    past: int
    """Columns in the cache."""
    scored: Bool[Tensor, "row new"] | None
    """Tokens that have a label; None where there are none."""


def read_call(models: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], *, causal: bool) -> Call:
    """What a model was called with.

    Args:
        models: that model, and those inside it, which get the same.
        causal: whether labels are of the tokens themselves, as those of a causal language model are.

    Raises:
        ValueError: for embeddings in place of tokens, a mask that does not show the padding, several texts in one row,
            and a cache of which one cannot see what it holds.
    """
    given = dict(zip(_names(models), args, strict=False)) | dict(kwargs)
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        raise ValueError(
            "the model was called without input_ids [batch, seq]: which tokens are edited follows from them"
        )
    past = _past(cache, given)
    real = _real(given.get("attention_mask"), (len(tokens), past + tokens.shape[1]))
    _check_one_text(given, None if real is None else real[:, past:])
    labels = given.get("labels")
    scored = None
    if causal and isinstance(labels, Tensor) and labels.shape == tokens.shape:
        scored = labels.to(tokens.device) != _IGNORED
    return Call(tokens, None if real is None else real.to(tokens.device), cache, past, scored)


def _names(models: Sequence[nn.Module]) -> list[str]:
    """Of what is given by place; a PeftModel hands on all of it, `*args`, to the model inside."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    every = [inspect.signature(model.forward).parameters for model in models]
    own = next((p for p in every if all(x.kind != inspect.Parameter.VAR_POSITIONAL for x in p.values())), every[-1])
    return [name for name, p in own.items() if p.kind in kinds]


def _past(cache: Any, given: Mapping[str, Any]) -> int:
    states = [name for name in _STATES if given.get(name) is not None]
    if cache is None and not states:
        return 0
    layers = getattr(cache, "layers", None)
    if states or not isinstance(cache, Cache) or (layers and not kept(cache)):
        what = f"{states[0]}=" if states else f"a {type(cache).__name__}"
        raise ValueError(
            f"the model was called with {what}, and only from keys and values that grow with the text (DynamicCache) "
            "can be seen what was read before: leave cache_implementation out, or pass use_cache=False"
        )
    return int(cache.get_seq_length())


def _real(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "the model was called with an attention mask that does not show the padding: pass [batch, seq]"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"the attention mask is {list(mask.shape)}, expected {list(shape)}: a column for each token, those in the "
            "cache too"
        )
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            "the attention mask has other numbers than 0 and 1, as of several texts in one row: give each a row"
        )
    return mask.bool()


def _check_one_text(given: Mapping[str, Any], real: Tensor | None) -> None:
    """Raise where a row holds several texts, one after the other."""
    packed = [name for name in _PACKED if given.get(name) is not None]
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] > 1:
        steps = positions.diff(dim=-1) > 0
        if real is not None and positions.ndim > 1:
            steps = steps | ~real[:, 1:].to(steps.device) | ~real[:, :-1].to(steps.device)
        packed += [] if bool(steps.all()) else ["position_ids"]
    if packed:
        raise ValueError(
            f"the model was called on several texts in one row ({packed[0]} says so): give each text a row"
        )


def kept(cache: Any) -> list[DynamicLayer]:
    """The layers of a cache that keep keys and values of each token, as they grow."""
    return [x for x in getattr(cache, "layers", ()) if type(x) in (DynamicLayer, DynamicSlidingWindowLayer)]


def filled_cache(output: Any, given: Any) -> Any:
    """The cache that a call has filled, which it was given or gives back; None where it keeps nothing like that."""
    every = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    cache = next((value for value in every if isinstance(value, Cache)), None) if given is None else given
    return cache if cache is not None and _holding(cache) else None


def _holding(cache: Any) -> list[DynamicLayer]:
    return [x for x in kept(cache) if x.is_initialized and x.keys is not None and x.keys.numel()]


def cached_columns(cache: Any) -> Int[Tensor, "row held"]:
    """Of each column that a cache holds a number for each row, made of the bits of its keys.

    Rows of a cache change places, and columns are cut off again; the numbers say which they are. They are taken from
    the highest block that keeps all columns, or the highest at all.
    """
    every = _holding(cache)
    layer: Any = ([layer for layer in every if type(layer) is DynamicLayer] or every)[-1]
    keys: Tensor = layer.keys.detach()
    some = keys.reshape(len(keys), -1, *keys.shape[-2:])[:, 0, :, :8].contiguous()
    bits = some.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[some.element_size()]).long()
    weights = torch.arange(1, bits.shape[-1] + 1, device=bits.device) * 0x9E3779B1 | 1
    return (bits * weights).sum(dim=-1)
