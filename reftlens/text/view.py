"""Tokens as positions see them: ids, the role and the text of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

Mask = Bool[Tensor, "batch seq"]
_MOST_PARTS = 8
"""Tokens that are read on for the rest of a character."""


class TokenRole(IntEnum):
    """What a token is in its row."""

    PAD = 0
    PROMPT = 1
    RESPONSE = 2  # written by a person or a data set: the completion of an example
    GENERATED = 3  # written by the model during generation


@dataclass(frozen=True, eq=False)
class TokenView:
    """What a `Positions` may look at: token ids, the role of each token and, on demand, the text."""

    ids: Int[Tensor, "batch seq"]
    role: Int[Tensor, "batch seq"]
    tokenizer: Any = field(default=None, repr=False)
    turn: Int[Tensor, "batch seq"] | None = None
    """Of each token of a chat the mark of the message that it is of, see `text.turns`; None where there are none."""

    @cached_property
    def real(self) -> Mask:
        return self.role != TokenRole.PAD

    @cached_property
    def prompt(self) -> Mask:
        return self.role == TokenRole.PROMPT

    @cached_property
    def written(self) -> Mask:
        """What follows the prompt."""
        return self.role >= TokenRole.RESPONSE

    @cached_property
    def index(self) -> Int[Tensor, "batch seq"]:
        """Place of each token in its own row, padding not counted (meaningless at padding)."""
        return self.real.long().cumsum(dim=1) - 1

    @cached_property
    def steps(self) -> Int[Tensor, "batch seq"]:
        """Of each token that is not of the prompt, how many such tokens are before it in its row; -1 in the prompt."""
        later = self.real & ~self.prompt
        return (later.long().cumsum(dim=1) - 1).masked_fill(~later, -1)

    @cached_property
    def prompt_text(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Per row: the text of the prompt and the character span of each of its tokens."""
        self._require_tokenizer()
        return [token_spans(self.tokenizer, ids[row].tolist()) for ids, row in zip(self.ids, self.prompt, strict=True)]

    @cached_property
    def written_text(self) -> list[tuple[str, list[int]]]:
        """Per row: the text after the prompt, and how many characters of it are there once each token is read."""
        self._require_tokenizer()
        texts = []
        for ids, prompt, written in zip(self.ids, self.prompt, self.written, strict=True):
            context = ids[prompt][-1:].tolist()  # some tokenizers drop the space that a text begins with
            text, spans = token_spans(self.tokenizer, [*context, *ids[written].tolist()])
            begin = spans[0][1] if context else 0
            lengths = whole_lengths(text, spans)[len(context) :]
            texts.append((text[begin:], [max(0, length - begin) for length in lengths]))
        return texts

    def _require_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError("choosing tokens by their text needs a tokenizer, and this batch has none")


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; bytes of a character as `<F0 9F 8C>` where it holds only a part of one."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text
    values = {character: value for value, character in bytes_to_unicode().items()}
    raw = tokenizer.convert_ids_to_tokens([token])[0]  # the byte-level alphabet of GPT-2, or <0xF0>
    if not all(character in values for character in raw):
        return raw
    head = raw[: len(raw) - len(raw.lstrip("Ġ"))]
    return " " * len(head) + f"<{' '.join(f'{values[c]:02X}' for c in raw[len(head) :])}>"


def whole_lengths(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """How many characters of a text are whole once each of its tokens is read, whatever comes after it.

    A character of several tokens is whole with the last of them; the parts of one at the end of the text are none.
    """
    lengths = []
    for i, (start, end) in enumerate(spans):
        last = i + 1 == len(spans)
        open_end = last and text[start:end].endswith("\ufffd") and spans.count((start, end)) < _MOST_PARTS
        lengths.append(start if open_end or (not last and spans[i + 1] == (start, end)) else end)
    return lengths


@lru_cache(maxsize=1 << 16)
def _decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """While a text is written, all that stands is decoded at each step, in windows of a few tokens."""
    return tokenizer.decode(list(ids))


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text of `ids` and the character span `(start, end)` of each token in it.

    Tokens that are parts of one character (bytes of an emoji, say) share the span of that character.
    """
    text, spans, left, start = "", [], 0, 0
    for stop in range(1, len(ids) + 1):
        # The piece before, from `left` on, is context: it keeps the leading space that some tokenizers drop at the
        # start of a text, and it ends with a whole character, so that the bytes after it are read alone.
        before = _decoded(tokenizer, tuple(ids[left:start]))
        piece = _decoded(tokenizer, tuple(ids[left:stop]))[len(before) :]
        if piece.endswith("\ufffd") and stop < len(ids) and stop - start < _MOST_PARTS:
            continue
        spans.extend([(len(text), len(text) + len(piece))] * (stop - start))
        text, left, start = text + piece, start, stop
    return text, spans
