"""What was read of the rows in a cache: their tokens and roles, and what gates have decided by their prompts."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.attachment.calls import cached_columns
from reftlens.attachment.generating import Writing
from reftlens.attachment.reading import Texts
from reftlens.text.view import TokenView


@dataclass(frozen=True, eq=False)
class History:
    """The rows of a cache as they were after the last call."""

    texts: Texts
    columns: Int[Tensor, "row held"]
    """What `cached_columns` gave then; the last of them is that of the last token."""
    decided: dict[int, Float[Tensor, " row"]] = field(default_factory=dict)
    """Of each row, at sites where the prompt decides how far the edit acts; NaN where it has not."""
    writing: Writing | None = None
    """The `generate` that they were read in."""

    @classmethod
    def of(cls, cache: Any, texts: Texts, decided: dict[int, Tensor], writing: Writing | None) -> "History":
        """What is in a cache after these rows were read."""
        return cls(texts, cached_columns(cache), decided, writing)

    def now(self, cache: Any, past: int) -> "History":
        """As the rows stand in the cache, of which `past` columns are left.

        Raises:
            ValueError: where the cache holds what was not read through this attachment, or not the whole prompts.
        """
        columns, width = cached_columns(cache), self.texts.view.ids.shape[1]
        first = max(width - self.columns.shape[1], past - columns.shape[1])
        if past > width or first >= past:
            raise _strange()
        ours = self.columns[:, first - (width - self.columns.shape[1]) :][:, : past - first].to(columns.device)
        rows = _places(columns[:, first - (past - columns.shape[1]) :], ours)
        history = self if rows is None else self._take(rows)
        return history if past == width else history._until(past)

    def _take(self, rows: Int[Tensor, " row"]) -> "History":
        view, owners = self.texts.view, self.texts.owners
        rows = rows.to(view.ids.device)
        turn = None if view.turn is None else view.turn[rows]
        texts = Texts(
            TokenView(view.ids[rows], view.role[rows], view.tokenizer, turn),
            None if owners is None else owners[rows.cpu()],
        )
        decided = {i: values[rows.to(values.device)] for i, values in self.decided.items()}
        return replace(self, texts=texts, decided=decided)

    def _until(self, stop: int) -> "History":
        view = self.texts.view
        if bool(view.prompt[:, stop:].any()):
            raise ValueError("the cache was cut within a prompt: read the whole prompt again, without the cache")
        turn = None if view.turn is None else view.turn[:, :stop]
        cut = TokenView(view.ids[:, :stop], view.role[:, :stop], view.tokenizer, turn)
        return replace(self, texts=replace(self.texts, view=cut))


def _places(now: Int[Tensor, "row column"], before: Int[Tensor, "old column"]) -> Int[Tensor, " row"] | None:
    """For each row of a cache, which it was before; None where all are where they were."""
    if now.shape == before.shape and torch.equal(now, before):
        return None
    if now.shape[1] != before.shape[1]:
        raise _strange()
    alike = (now[:, None] == before[None]).all(dim=2)
    if not bool(alike.any(dim=1).all()):
        raise _strange()
    return alike.long().argmax(dim=1)


def _strange() -> ValueError:
    return ValueError(
        "the model was called with a cache that holds other tokens than were read with it while the model was edited: "
        "what of them is prompt, and how they were edited, is not known; read the text again, without that cache"
    )
