"""Which tokens of a call are of the prompt, and which were written after it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftlens.attachment.calls import Call
from reftlens.attachment.generating import Writing
from reftlens.text.batch import Batch
from reftlens.text.view import TokenRole, TokenView


@dataclass(frozen=True)
class Known:
    """What is known of the rows of calls, beside what the model is called with."""

    tokenizer: Any
    batch: Batch | None
    """The rows that the model is called on."""
    lengths: tuple[int, ...] | None
    """Tokens of the prompt of each row."""
    writing: Writing | None
    """The `generate` that calls."""


@dataclass(frozen=True)
class Texts:
    """The rows of a call with what was read of them before, and for each the row of the batch that it is, if any."""

    view: TokenView
    owners: Int[Tensor, " row"] | None = None


def begun(call: Call, known: Known) -> Texts:
    """The rows of a call that begins them.

    Raises:
        ValueError: where `generate` reads its prompts in parts or padded on the right, the lengths of prompts are not
            those of as many rows, or the rows are not those of the batch.
    """
    if known.batch is not None:
        return _of_batch(call, known, known.batch)
    real = torch.ones_like(call.tokens, dtype=torch.bool) if call.real is None else call.real
    role = torch.where(real, int(TokenRole.PROMPT), int(TokenRole.PAD))
    written, what = _written(call, real, known)
    role = role.masked_fill(real & written, int(what))
    return Texts(TokenView(call.tokens, role, known.tokenizer))


def _written(call: Call, real: Bool[Tensor, "row column"], known: Known) -> tuple[Tensor, TokenRole]:
    if known.lengths is not None:
        return _after(known.lengths, real), TokenRole.RESPONSE
    if known.writing is not None:
        return _after_prompt(call, real, known.writing), TokenRole.GENERATED
    if call.scored is not None:
        return (call.scored & real).cumsum(dim=1) > 0, TokenRole.RESPONSE
    return torch.zeros_like(real), TokenRole.RESPONSE


def _after(lengths: Sequence[int], real: Bool[Tensor, "row column"]) -> Bool[Tensor, "row column"]:
    counts = real.sum(dim=1).tolist()
    if len(lengths) != len(counts) or any(not 0 <= n <= count for n, count in zip(lengths, counts, strict=True)):
        raise ValueError(
            f"the prompts were said to have {list(lengths)} tokens, and the model is called on rows of {counts}"
        )
    return real.cumsum(dim=1) > torch.tensor(lengths, device=real.device)[:, None]


def _after_prompt(call: Call, real: Tensor, writing: Writing) -> Bool[Tensor, "row column"]:
    """Columns after those that `generate` was given."""
    columns = torch.arange(real.shape[1], device=real.device)
    width = real.shape[1] if writing.width is None else writing.width
    if real.shape[1] < width:
        raise ValueError(
            f"generate was given prompts of {width} tokens and reads {real.shape[1]} of them first: leave "
            "prefill_chunk_size out"
        )
    if width and not bool(real[:, width - 1].all()):
        raise ValueError("the prompts are padded on the right, and generate goes on after the padding: pad on the left")
    writing.width = width
    return (columns >= width).expand_as(real)


def _of_batch(call: Call, known: Known, batch: Batch) -> Texts:
    times, rest = divmod(len(call.tokens), len(batch))
    if rest or not times:
        raise ValueError(f"the model was called on {len(call.tokens)} rows, and the batch has {len(batch)}")
    owners = torch.arange(len(batch)).repeat_interleave(times)
    own, device = batch.rearranged(lambda x: x[owners.to(x.device)]), call.tokens.device
    own = own.right_padded().to(device)
    real = call.real
    if real is None:
        alike = own.tokens.shape == call.tokens.shape and known.writing is None
        real = own.attention_mask if alike else torch.ones_like(call.tokens, dtype=torch.bool)
    role = _roles_of_batch(call.tokens, real, own, known.writing)
    turn = None if own.turn is None else _moved(own.turn, real, own.attention_mask)
    return Texts(TokenView(call.tokens, role, known.tokenizer, turn), owners)


def _roles_of_batch(tokens: Tensor, real: Tensor, own: Batch, writing: Writing | None) -> Tensor:
    """The roles that the batch has, where they lie in this call; what `generate` has put after them was generated."""
    counts, ours = real.sum(dim=1), own.attention_mask.sum(dim=1)
    if not torch.equal(counts, ours) and (writing is None or bool((counts < ours).any())):
        raise ValueError(f"the model was called on {counts.tolist()} tokens per row, and the batch has {ours.tolist()}")
    there = real & (real.cumsum(dim=1) <= ours[:, None])
    if not torch.equal(tokens[there], own.tokens[own.attention_mask]):
        raise ValueError(
            f"the model was called on other tokens than those of the batch: it has {tokens[there].tolist()[:12]} …, "
            f"and the batch {own.tokens[own.attention_mask].tolist()[:12]} …"
        )
    if writing is not None and not bool(there[:, : writing.width][:, -1].all()):
        raise ValueError("the prompts are padded on the right, and generate goes on after the padding: pad on the left")
    return _moved(own.role, real, own.attention_mask).masked_fill(real & ~there, int(TokenRole.GENERATED))


def _moved(values: Tensor, real: Tensor, ours: Tensor) -> Tensor:
    """What the batch holds of each token, moved to where it lies; 0 elsewhere."""
    there = real & (real.cumsum(dim=1) <= ours.sum(dim=1)[:, None])
    moved = torch.zeros_like(real, dtype=values.dtype)
    moved[there] = values[ours]
    return moved


def continued(call: Call, seen: Texts, known: Known) -> Texts:
    """The rows of a call that goes on from cached ones.

    Raises:
        ValueError: where it is not clear whether the new tokens are of the prompt, or the mask of cached ones is
            another than it was.
    """
    before, new = seen.view.real, torch.ones_like(call.tokens, dtype=torch.bool)
    if call.real is None and not bool(before.all()):
        raise ValueError("the rows in the cache are padded, and the model was called without their attention mask")
    if call.real is not None:
        if not torch.equal(call.real[:, : call.past], before):
            raise ValueError("the attention mask of the tokens in the cache is another one than when they were read")
        new = call.real[:, call.past :]
    what = TokenRole.GENERATED
    if known.lengths is not None:
        _check_read(known.lengths, seen, before)
        what = TokenRole.RESPONSE
    elif known.writing is None and call.tokens.shape[1] > 1:
        raise ValueError(
            f"the model was called on {call.tokens.shape[1]} more tokens per row after those in its cache, which may "
            "be of the prompt or written after it: say so, with attachment.prompts(lengths): …"
        )
    role = torch.where(new, int(what), int(TokenRole.PAD))
    turn = seen.view.turn
    turn = None if turn is None else torch.cat([turn, torch.zeros_like(role)], dim=1)
    ids, roles = torch.cat([seen.view.ids, call.tokens], dim=1), torch.cat([seen.view.role, role], dim=1)
    return replace(seen, view=TokenView(ids, roles, known.tokenizer, turn))


def _check_read(lengths: Sequence[int], seen: Texts, before: Tensor) -> None:
    """Raise where prompts of so many tokens are not those that were read."""
    read = seen.view.prompt.sum(dim=1).tolist()
    if list(lengths) != read:
        raise ValueError(
            f"the prompts were said to have {list(lengths)} tokens, and those in the cache were read as {read}: give "
            "the model each prompt whole, in one call"
        )
