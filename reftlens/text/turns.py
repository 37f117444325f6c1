"""Which tokens of a templated chat are the content of which message."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from reftlens.text.template import Messages, Prompt, Template
from reftlens.text.view import Mask, token_spans

UNKNOWN = -1
"""The mark of the tokens of a prompt whose template writes the messages otherwise than they are."""
_SENTINEL = re.compile("\ue000(\\d+)\ue001")  # of the private use area, which no text holds


def mark_of(role: str, turn: int, count: int) -> int:
    """The mark of the content of message `turn` of the `count` that a role has in a chat; above 0.

    It holds the place from the first (bits 32 to 46) and from the last (from bit 47), and the CRC-32 of the role.
    """
    return (count - turn << 47) | (turn + 1 << 32) | zlib.crc32(role.encode())


def marked(marks: Int[Tensor, "batch seq"], role: str, turn: int | None) -> Mask:
    """The tokens whose mark is of a role's message: of all, or that number `turn`, from 0, or from the last, -1."""
    mine = (marks > 0) & (marks & 0xFFFFFFFF == zlib.crc32(role.encode()))
    if turn is None:
        return mine
    return mine & ((marks >> 32 & 0x7FFF) == turn + 1 if turn >= 0 else marks >> 47 == -turn)


def turn_marks(
    tokenizer: Any, template: Template, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The mark of each token of some prompts; none where they are no chats."""
    if not template.chat:
        return []
    frames, texts = _Frames(tokenizer, template), [template.prompt(tokenizer, p, row) for row, p in enumerate(prompts)]
    marks = []
    for prompt, text, row, spans in zip(prompts, texts, ids, _spans(tokenizer, texts, ids), strict=True):
        turns = template.turns(prompt)
        contents = frames.contents(turns, text)
        marks.append([UNKNOWN] * len(row) if spans is None or contents is None else _marks(turns, contents, spans))
    return marks


def _marks(turns: Messages, contents: Sequence[tuple[int, int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The mark of each token by its characters, from those of the content of messages: 0 for what is of none."""
    counts, before, numbers = Counter(turn["role"] for turn in turns), Counter[str](), list[int]()
    for turn in turns:
        numbers.append(before[turn["role"]])
        before[turn["role"]] += 1
    marks = [0] * len(spans)
    for message, begin, end in contents:
        within = [i for i, (start, stop) in enumerate(spans) if start < end and begin < stop]
        role = turns[message]["role"]
        for i in range(within[0], within[-1] + 1) if within else ():
            marks[i] = mark_of(role, numbers[message], counts[role])
    return marks


@dataclass
class _Frames:
    """What the template writes around the messages of a chat, rendered once for all chats alike."""

    tokenizer: Any
    template: Template
    _known: dict[Any, list[str] | None] = field(default_factory=dict)

    def contents(self, turns: Messages, text: str) -> list[tuple[int, int, int]] | None:
        """Of each message that is in the text its number, and where its content begins and ends; None if unclear."""
        frame = self._frame(turns)
        contents = [None] if frame is None else list(_contents(frame, turns, text))
        return None if None in contents else [content for content in contents if content is not None]

    def _frame(self, turns: Messages) -> list[str] | None:
        """What the template writes around the contents of such messages, and between them the number of each.

        None where it does not write each content once at most.
        """
        key = tuple((turn["role"], len(turn), isinstance(turn["content"], str)) for turn in turns)
        if key not in self._known or any(len(turn) > 2 for turn in turns):
            texts = [isinstance(turn["content"], str) for turn in turns]
            empty = [{**turn, "content": f"\ue000{i}\ue001"} if texts[i] else turn for i, turn in enumerate(turns)]
            try:
                text = replace(self.template, system=None).prompt(self.tokenizer, empty, 0)
            except ValueError:  # it reads what the messages say
                text = ""
            pieces = _SENTINEL.split(text)
            self._known[key] = pieces if 1 < len(pieces) == 1 + 2 * len(set(pieces[1::2])) else None
        return self._known[key]


def _contents(frame: Sequence[str], turns: Messages, text: str) -> Iterator[tuple[int, int, int] | None]:
    """Of each message that is in the text its number, and where its content begins and ends; None for what differs."""
    at = len(frame[0])
    if not text.startswith(frame[0]):
        yield None
    for number, after in zip(map(int, frame[1::2]), frame[2::2], strict=True):
        content = turns[number]["content"]
        fits = (c for c in (content, content.strip(), content.rstrip()) if text.startswith(c + after, at))
        rest = text[at:]
        value = next(fits, rest[: rest.index(after)] if after and after in rest else rest)
        yield (number, at, at + len(value)) if value in content else None
        at += len(value) + len(after)
    if at != len(text):
        yield None


def _spans(
    tokenizer: Any, texts: Sequence[str], ids: Sequence[Sequence[int]]
) -> Iterator[list[tuple[int, int]] | None]:
    """Of each text the characters of each token, white space before it included; None where its tokens are others."""
    if not getattr(tokenizer, "is_fast", False):
        for text, row in zip(texts, ids, strict=True):
            decoded, spans = token_spans(tokenizer, row)
            yield spans if decoded == text else None
        return
    encoded: Mapping[str, Any] = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    for own, row, offsets in zip(encoded["input_ids"], ids, encoded["offset_mapping"], strict=True):
        spans = list[tuple[int, int]]()
        for start, end in offsets:
            before = spans[-1] if spans else (0, 0)
            # Of a character of several tokens some tokenizers give all but the first an empty span.
            spans.append((min(start, before[1]), end) if end > before[1] else before)
        yield spans if list(own) == list(row) else None
