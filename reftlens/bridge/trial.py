"""A model is tried once on a few tokens: does it predict them from those before, as transformers computes it?

What a class promises by its name is measured instead: whether the bridge computes what the original model does,
whether a token changes logits before it, and whether padding on the left changes those of the tokens after it.
"""

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

from reftlens.bridge.classes import missing_head
from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.foreign import muted
from reftlens.bridge.parts import originals
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.bridge.weightless import is_weightless
from reftlens.bridge.weights import weights_state
from reftlens.errors import in_brief

_SHORT, _LONG = 7, 23
"""Tokens of two rows, one the beginning of the other."""
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Difference, over the size of what is compared, that is no rounding; 0.1 in numbers of two bytes."""


@dataclass(frozen=True)
class Trial:
    """What a model did with a few tokens."""

    differs: float = 0.0
    """By how much the bridge's logits differ from those of the original model, relative; 0 if by rounding."""
    breaks: str = ""
    """What was raised in place of logits."""
    looks_ahead: bool = False
    """Whether a token changes logits before it."""
    predicts: bool = True
    """Whether there are logits for each token."""
    minds_padding: bool = False
    """Whether padding on the left changes the logits of the tokens after it."""
    takes_positions: bool = False
    """Whether places of tokens may be handed to the model; some derive them in a way of their own."""


_trials: WeakKeyDictionary[nn.Module, tuple[Hashable, Trial]] = WeakKeyDictionary()
"""The last trial of each model, and the state that it was in."""


def trial(model: Bridge) -> Trial:
    """What a model does with a few tokens, measured once for each state of its weights; nothing without weights."""
    if is_weightless(model):
        return Trial()
    root, processed = model.original_model, bool(getattr(model, "compatibility_mode", False))
    state = weights_state(model), processed
    if root not in _trials or _trials[root][0] != state:
        with exclusive(model), muted(model):
            _trials[root] = state, _measured(model, comparable=not processed)
    return _trials[root][1]


def last_trial(model: Bridge) -> Trial:
    """What was last seen of a model, with whatever weights; of one that was not tried, nothing."""
    return _trials.get(model.original_model, (None, Trial()))[1]


def check_agrees(model: Bridge) -> Trial:
    """Raise `ValueError` where the bridge does not compute what the original model does, or breaks."""
    tried, problem = trial(model), ""
    if tried.breaks:
        problem = f"gives no logits for {_LONG} tokens ({tried.breaks})"
    elif tried.differs:
        problem = f"and the transformers model inside it give logits that differ by {tried.differs:.1g}, so nothing"
        problem += " would be learned about the model itself"
    if problem:
        raise ValueError(
            f"the bridge of this {type(model.original_model).__name__} {problem}: choose another model, or another "
            "version of TransformerLens"
        )
    return tried


def check_predicts(model: Bridge) -> None:
    """Raise where a model does not predict each token from those before it.

    Raises:
        ValueError: where the bridge and the original model differ, a token changes logits before it, or there are no
            logits for tokens.
    """
    name, tried = type(model.original_model).__name__, check_agrees(model)
    if missing := missing_head(model.original_model):
        raise ValueError(f"{missing}, so that next-token losses and generation mean nothing: load the whole model")
    if not tried.predicts:
        raise ValueError(f"{name} has no logits for tokens: load the class with its language model's head")
    if getattr(getattr(model.original_model, "config", None), "index_topk", None):
        raise ValueError(
            f"{name} attends to the keys of the best scores, of which many are equal, and which it takes then depends "
            "on the tokens that follow: choose a model with another attention"
        )
    if tried.looks_ahead:
        raise ValueError(
            f"{name} sees the tokens that it would predict (its attention looks ahead), so next-token losses and "
            "generation mean nothing: choose a causal model; hooks and activations work"
        )


@torch.no_grad()
def _measured(model: Bridge, *, comparable: bool) -> Trial:
    """Two rows, alone and together, by the bridge, and by the original model where its weights are `comparable`."""
    tokens = few_tokens(model, 1, _LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            whole, short = _logits(model, tokens), _logits(model, tokens[:, :_SHORT])
            together = _logits(model, *_padded(tokens))
            plain = _plain_logits(model, tokens) if comparable else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            fits = getattr(model.cfg, "n_ctx", 0) >= _LONG
            return Trial(breaks=in_brief(error) if fits else "")
    if not isinstance(whole, Tensor) or whole.ndim != 3 or whole.shape[:2] != tokens.shape:
        return Trial(predicts=False)
    limit = LIMITS.get(whole.dtype, 0.1)
    error = 0.0 if plain is None else _error(whole, plain)
    padding = max(_error(together[:1, -_SHORT:], short), _error(together[1:], whole))
    return Trial(
        differs=error if error > limit else 0.0,
        looks_ahead=_error(whole[:, :_SHORT], short) > limit,
        minds_padding=padding > limit,
        takes_positions=accepts_mask_derived_position_ids(model.original_model),
    )


def few_tokens(model: Bridge, rows: int, columns: int) -> Int[Tensor, "{rows} {columns}"]:
    """Tokens to try a model on, always the same."""
    high = min(int(model.cfg.d_vocab), 1000)
    tokens = torch.randint(min(5, high - 1), high, (rows, columns), generator=torch.Generator().manual_seed(0))
    return tokens.to(device_of(model))


def _padded(tokens: Int[Tensor, "1 long"]) -> tuple[Int[Tensor, "2 long"], Bool[Tensor, "2 long"]]:
    """The short row, padded on the left, and the long one; and which tokens are real."""
    real = torch.ones(2, _LONG, dtype=torch.bool, device=tokens.device)
    real[0, : _LONG - _SHORT] = False
    return torch.cat([torch.cat([tokens[:, : _LONG - _SHORT], tokens[:, :_SHORT]], dim=1), tokens]), real


def _logits(model: Bridge, tokens: Tensor, real: Tensor | None = None) -> Any:
    mask = torch.ones_like(tokens) if real is None else real.long()
    return model(tokens, attention_mask=mask, return_type="logits", use_cache=False)


def _plain_logits(model: Bridge, tokens: Tensor) -> Any:
    with originals(model.original_model):
        return model.original_model(input_ids=tokens, use_cache=False).logits


def _error(measured: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Size of the difference over the size of what was expected; 0 where that is not finite."""
    size = expected.double().norm()
    if not torch.isfinite(size) or size == 0:
        return 0.0
    error = ((measured.double() - expected.double()).norm() / size).item()
    return error if error == error else float("inf")
