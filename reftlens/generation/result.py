"""What generation gives back: texts, tokens, and which of them were edited."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from reftlens import figures
from reftlens.figures import Axes, DataFrame
from reftlens.generation.rows import Rows
from reftlens.text.batch import Batch, batch_from_rows
from reftlens.text.view import TokenRole, token_spans

_COLUMNS = ("texts", "prompt_ids", "ids", "edited", "logits", "turns")
"""Of a `Generation`, with an entry for each prompt."""


@dataclass(frozen=True)
class Generation:
    """Continuations of a batch of prompts, in the order of the prompts."""

    texts: tuple[str, ...]
    """The generated text, special tokens left out."""
    prompt_ids: tuple[tuple[int, ...], ...]
    ids: tuple[tuple[int, ...], ...]
    """The generated tokens, the stop token included where one was reached."""
    edited: tuple[tuple[bool, ...], ...]
    """For every token of prompt and continuation, whether an edit acted on it; at strength 0 none does, nor behind a
    gate that is shut there. The last token generated is never an input of the model, so nothing can act on it."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    logits: tuple[Float[Tensor, "_steps vocab"], ...] = field(default=(), repr=False, compare=False)
    """Per prompt the logits that each generated token was chosen from, if `keep_logits` was set."""
    turns: tuple[tuple[int, ...], ...] = field(default=(), repr=False, compare=False)
    """Of prompts that are chats, in which message each token stands, as `text.turns` marks it."""

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, rows: Rows, steps: Sequence[Float[Tensor, "row vocab"]] = ()) -> "Generation":
        """What stands in the rows; `steps` are the logits that each column was chosen from, or none."""
        every, tokenizer = range(len(rows)), rows.tokenizer
        ids = tuple(rows.ids(row) for row in every)
        stacked = torch.stack(list(steps), dim=1) if steps else None
        return cls(
            texts=tuple("" if tokenizer is None else tokenizer.decode(row, skip_special_tokens=True) for row in ids),
            prompt_ids=tuple(rows.prompt_ids(row) for row in every),
            ids=ids,
            edited=tuple(rows.marks(row) for row in every),
            tokenizer=tokenizer,
            turns=() if rows.turn is None else tuple(tuple(rows.turn[row, rows.real[row]].tolist()) for row in every),
            logits=() if stacked is None else tuple(stacked[row, : len(ids[row])] for row in every),
        )

    def split(self, parts: int) -> "list[Generation]":
        """Equal parts of the rows, in order."""
        size = len(self) // parts
        rows = [slice(part * size, (part + 1) * size) for part in range(parts)]
        return [replace(self, **{name: getattr(self, name)[some] for name in _COLUMNS}) for some in rows]

    @staticmethod
    def join(parts: "Sequence[Generation]") -> "Generation":
        """The rows of all, in order."""
        joined = {name: tuple(value for part in parts for value in getattr(part, name)) for name in _COLUMNS}
        return replace(parts[0], **joined)

    def batch(self) -> Batch:
        """The same tokens as a batch with the generated ones as such, for a teacher-forced forward pass."""
        rows = list(zip(self.prompt_ids, self.ids, strict=True))
        roles = [[int(TokenRole.PROMPT)] * len(p) + [int(TokenRole.GENERATED)] * len(g) for p, g in rows]
        targets = [[r == TokenRole.GENERATED for r in row] for row in roles]
        return batch_from_rows([[*p, *g] for p, g in rows], roles, targets, tokenizer=self.tokenizer, turns=self.turns)

    def marked(self, row: int = 0) -> str:
        """Prompt and continuation of a row as text, every edited token in ⟦brackets⟧."""
        return "".join(f"⟦{piece}⟧" if hit else piece for piece, hit in pieces_of(*self._tokens(row)))

    def _tokens(self, row: int) -> tuple[Any, list[int], tuple[bool, ...]]:
        return self.tokenizer, [*self.prompt_ids[row], *self.ids[row]], self.edited[row]

    def to_frame(self) -> DataFrame:
        """One row per prompt: the text, and how many tokens were generated and edited."""
        counts = {"tokens": list(map(len, self.ids)), "edited": list(map(sum, self.edited))}
        return figures.table({"text": self.texts, **counts}, "prompt")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Every token of prompt (hollow) and continuation (filled), row by row; orange: edited."""
        ax = figures.axes(ax, height=1.2 + 0.25 * len(self))
        for row, (prompt, marks) in enumerate(zip(self.prompt_ids, self.edited, strict=True)):
            colours = [figures.ORANGE if mark else figures.GREY for mark in marks]
            filled = ["none"] * len(prompt) + colours[len(prompt) :]
            ax.scatter(range(len(marks)), [row] * len(marks), s=14, edgecolors=colours, facecolors=filled)
        ax.invert_yaxis()
        ax.set(xlabel="token", ylabel="prompt")
        return ax

    def __repr__(self) -> str:
        lines = [f"[{i}] {text}" for i, text in enumerate(self.texts)]
        return figures.screenful([row for line in lines for row in line.split("\n")])

    def _repr_html_(self) -> str:
        paragraph = Markup('<p style="white-space:pre-wrap">{}</p>')
        return "".join(paragraph.format(marked_tokens(*self._tokens(row))) for row in range(len(self)))


def pieces_of(tokenizer: Any, ids: Sequence[int], edited: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of each token and whether it was edited; tokens that share a character come as one piece."""
    text, spans = token_spans(tokenizer, ids)
    hits: dict[tuple[int, int], bool] = {}
    for span, hit in zip(spans, edited, strict=True):
        hits[span] = hits.get(span, False) or hit
    return [(text[start:end], hit) for (start, end), hit in hits.items()]


def marked_tokens(tokenizer: Any, ids: Sequence[int], edited: Sequence[bool]) -> Markup:
    """HTML of tokens, the edited ones marked."""
    mark = Markup('<mark title="edited">{}</mark>')
    return Markup().join(mark.format(piece) if hit else piece for piece, hit in pieces_of(tokenizer, ids, edited))


class TextStream:
    """Turns a growing list of tokens into pieces of text that never end inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that became certain with `token`."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece
