"""Targets: tokens that are predicted and scored, among all tokens or among a few answers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftlens.text.template import Prompt, Template
from reftlens.text.tokenising import split_row, tokenise
from reftlens.text.view import token_text


def require_targets(mask: Bool[Tensor, "batch seq"], name: str) -> None:
    """Raise `ValueError` where a row has no target, or one that no logits predict; `name` is what the rows are."""
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row(s) {empty[:10]} of {name} have no target: nothing to learn or score there")
    first = mask[:, 0].nonzero().flatten().tolist()
    if first:
        raise ValueError(f"the first token of row(s) {first[:10]} of {name} is a target, and no logits predict it")


def answer_ids(
    labels: Sequence[str | int], tokenizer: Any, template: Template | None, prompt: Prompt
) -> tuple[int, ...]:
    """The token of each label: of text, as it is read after `prompt`.

    Raises:
        TypeError: for one text instead of a list.
        ValueError: for fewer than two labels, a label of several tokens, or two of one token.
    """
    if isinstance(labels, str):
        raise TypeError(f"expected a list of answers, got one text: write [{labels!r}, …]")
    ids = tuple(label if isinstance(label, int) else _id(label, tokenizer, template, prompt) for label in labels)
    if len(ids) < 2:
        raise ValueError(f"answers {list(labels)}: expected two or more, as the softmax over one is always 1")
    if min(ids) < 0:
        raise ValueError(f"answers {list(labels)}: a token is 0 or more")
    twice = [label for label, token in zip(labels, ids, strict=True) if ids.count(token) > 1]
    if twice:
        raise ValueError(f"answers {twice} are one and the same token: give each answer a token of its own")
    return ids


def _id(label: str, tokenizer: Any, template: Template | None, prompt: Prompt) -> int:
    if tokenizer is None:
        raise ValueError(f"this batch has no tokenizer to read {label!r} with: give token ids")
    if template is None or not prompt:
        ids = tokenise(tokenizer, label, bos=False)
    else:
        ids = split_row(tokenizer, prompt, label, 0, template, end=False, boundary="split")[1]
    if len(ids) != 1:
        parts = [token_text(tokenizer, token) for token in ids]
        raise ValueError(
            f"answer {label!r} is {len(ids)} tokens {parts} here, and answers are told apart by one token each: give "
            "labels of one token (or the ids of their first tokens), or score among all tokens, without among_answers"
        )
    return ids[0]


def columns_of(tokens: Int[Tensor, "*shape"], answers: tuple[int, ...], tokenizer: Any = None) -> Int[Tensor, "*shape"]:
    """The column of each token in logits of these answers; of all tokens, itself.

    Raises:
        ValueError: for a token that is none of the answers.
    """
    if not answers:
        return tokens
    matches = tokens[..., None] == torch.tensor(answers, device=tokens.device)
    other = tokens[~matches.any(dim=-1)]
    if len(other):
        token, *shown = [
            f"{i} ({token_text(tokenizer, i)!r})" if tokenizer else str(i) for i in (int(other[0]), *answers)
        ]
        raise ValueError(
            f"token {token} is to be scored among the answers {', '.join(shown[:8])}, and is none of them: encode with "
            "end=False, so that the end of a completion is no target, and give every answer that occurs"
        )
    return matches.long().argmax(dim=-1)
