"""The one place that runs the model: attach edits to hooks, call the bridge once, detach."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.lengths import check_lengths, length_limit
from reftlens.bridge.protocol import Bridge
from reftlens.bridge.trial import last_trial
from reftlens.editing.edits import Edit
from reftlens.errors import SiteNeverFired

Hook = tuple[HookPoint, Callable[..., Any]]


class Stop(Exception):
    """Ends a forward pass from inside once what it was run for is known."""


def attached(model: Bridge, edits: Sequence[Edit]) -> AbstractContextManager[None]:
    """Edits act inside the block, backward included; no other thread is in such a block with the model."""
    carries = [(edit.carry, edit.pass_on) for edit in edits if edit.carry is not None]
    return hooked(model, [(edit.point, edit) for edit in edits], first=carries)


@contextmanager
def hooked(model: Bridge, hooks: Sequence[Hook], first: Sequence[Hook] = ()) -> Iterator[None]:
    """Hook functions are called inside the block; only these hooks are added, and only they are removed.

    Those in `first` are called before any others at their hook.
    """
    handles = []
    with exclusive(model):
        try:
            for prepend, group in ((True, first), (False, hooks)):
                for point, function in group:
                    handles.append((point, point.add_hook(function, prepend=prepend)))
            yield
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def check_fired(edits: Sequence[Edit]) -> None:
    """Raise if nothing passed through one of the sites."""
    for edit in edits:
        if edit.fired == 0:
            raise SiteNeverFired(
                f"no hidden state passed through {edit.point.name} inside this block, so nothing was edited there"
            )


def forward(
    model: Bridge, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq vocab"]:
    """The logits of one pass, with whatever edits are attached.

    Position ids follow from the mask, so padding on either side leaves every token at its own absolute position.
    """
    _check_rows(model, attention_mask)
    with exclusive(model):
        return model(tokens, attention_mask=attention_mask.long(), return_type="logits", use_cache=False)


def forward_cached(
    model: Bridge, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch keys"], cache: Any = None
) -> tuple[Float[Tensor, "batch seq vocab"], Any]:
    """`forward` after the tokens in `cache`, which the mask covers too; and the cache with all of them."""
    _check_rows(model, attention_mask)
    kwargs, mask = {} if cache is None else {"past_key_values": cache}, attention_mask.long()
    if cache is not None and last_trial(model).takes_positions:  # some models begin to count anew
        kwargs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(tokens, attention_mask=mask, return_type="logits_and_cache", use_cache=True, **kwargs)


def _check_rows(model: Bridge, attention_mask: Bool[Tensor, "batch keys"]) -> None:
    """Raise where rows would not be what they are alone: beside longer ones, or after padding on the left."""
    limit = length_limit(model)
    if limit is not None and attention_mask.shape[1] > limit[1]:
        lengths = attention_mask.sum(dim=1)
        check_lengths(model, int(lengths.min()), int(lengths.max()))
    if last_trial(model).minds_padding and not bool(attention_mask[:, 0].all()):
        raise ValueError(
            f"on this {type(model.original_model).__name__} padding on the left changes what is computed of the tokens "
            "after it: give one row at a time, or rows of one length"
        )


def forward_inside(
    model: Bridge,
    tokens: Int[Tensor, "batch seq"],
    attention_mask: Bool[Tensor, "batch keys"],
    position_ids: Int[Tensor, "batch seq"],
    cache: Any = None,
) -> Float[Tensor, "_ _ vocab"]:
    """`forward` for a model whose parts were rearranged: the transformers model inside the bridge is run once."""
    return model.original_model(
        input_ids=tokens,
        attention_mask=attention_mask.long(),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits
