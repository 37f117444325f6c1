"""Texts with labels, for a head: one text, or a pair, with the marks that the model's tokenizer puts around them."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import SupportsIndex

from reftlens.bridge.protocol import Bridge
from reftlens.numbers import real, whole
from reftlens.text.batch import Batch, batch_from_rows
from reftlens.text.template import Example, Template
from reftlens.text.tokenising import plain_text
from reftlens.text.view import TokenRole
from reftlens.text.vocabulary import check_vocabulary

Text = str | tuple[str, str]


def encode_labelled(
    model: Bridge, texts: Sequence[Text], labels: Sequence[float], *, max_length: SupportsIndex | None = None
) -> Batch:
    """Tokenise texts, or pairs of texts, for a head; all their tokens are prompt, and there are no targets.

    The tokenizer puts its own marks around them, as where its model was trained: `[CLS] a [SEP] b [SEP]` for BERT.
    Types of tokens are not told apart.

    Args:
        labels: the number of a class for each, or a value.
        max_length: longest row in tokens, by default and at most the model's context; longer texts are cut at their
            end, the longer one of a pair first, with a warning.

    Raises:
        ValueError: for a text that is empty, one text in place of a list, a label that is no number, or unequal numbers
            of both.
    """
    if len(texts) != len(labels) or not len(texts):
        raise ValueError(f"{len(texts)} texts and {len(labels)} labels, expected one label for each, and a text")
    if isinstance(texts, str):
        raise ValueError(f"texts is {texts[:40]!r}, expected a list of texts, one for each row")
    context, tokenizer = model.cfg.n_ctx, model.tokenizer
    limit = min(context, whole(context if max_length is None else max_length, "max_length", 4))
    ids, examples, cut = [], [], []
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        parts = text if isinstance(text, tuple | list) else (text,)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(f"row {row} is {text!r}, expected a text, or a pair of texts, that is not empty")
        whole_row = tokenizer(*(plain_text(part, row) for part in parts)).input_ids
        if len(whole_row) > limit:
            cut.append(row)
        ids.append(tokenizer(*parts, truncation=True, max_length=limit).input_ids)
        mark = tokenizer.sep_token or "\n"
        examples.append(Example(f" {mark} ".join(parts), label=real(label, f"the label of row {row}")))
    if cut:
        warnings.warn(f"{len(cut)} row(s) were cut to {limit} tokens: {cut[:10]}", stacklevel=2)
    roles = [[int(TokenRole.PROMPT)] * len(row) for row in ids]
    batch = batch_from_rows(ids, roles, examples=examples, tokenizer=tokenizer)
    check_vocabulary(model, batch, "the texts")
    return replace(batch, template=Template(), truncated=tuple(cut))
