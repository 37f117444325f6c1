"""The tokens of a message of a chat."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens.errors import check_one_of
from reftlens.numbers import whole
from reftlens.text.positions.base import Positions
from reftlens.text.positions.choosers import complete, within
from reftlens.text.turns import UNKNOWN, marked
from reftlens.text.view import Mask, TokenView


@dataclass(frozen=True)
class Role(Positions):
    """The tokens of what a role says in the prompt of a chat: `Role("user", turn=-1)` is the last question.

    A token that holds a character of the message is its, also where it holds one of the template's. What is answered
    is no part of the prompt: that is `Response()`.

    Args:
        role: as the messages name it: "system", "user", "assistant", …
        turn: which of its messages, from 0; negative: from the last; None: all of them.
        part: "content" leaves out all that the template writes; "before" and "after" are what it writes between this
            message and the one before (or the beginning), or the next (or the end of the prompt): `Role("user",
            turn=-1, part="after")` is what follows the instruction, the turn of the assistant opened.
        missing: a prompt without such a message raises, or chooses nothing with "skip".

    Raises:
        ValueError: where the prompts are no chat, or the template rewrites messages so that they are not recognised.
    """

    role: str
    turn: int | None = None
    part: Literal["content", "before", "after"] = "content"
    missing: Literal["raise", "skip"] = "raise"
    kind: ClassVar[str] = "role"
    prompt_only: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_one_of("part", self.part, ("content", "before", "after"))
        if not isinstance(self.role, str) or not self.role:
            raise TypeError(f"Role({self.role!r}): expected the name of a role, such as 'user'")
        if self.turn is not None:
            object.__setattr__(self, "turn", whole(self.turn, "Role: turn"))

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        if view.turn is None:
            raise ValueError(f"{self} is of chats, and these prompts are none: encode them with chat=True")
        rows = (view.turn == UNKNOWN).any(dim=1).nonzero().flatten().tolist()
        if rows:
            raise ValueError(f"{self}: the chat template rewrites what is said in row(s) {rows[:10]}; choose by Tokens")
        turn = view.turn
        if self.part != "content":
            turn = torch.where(turn > 0, 0, _carried(turn, view.prompt, backwards=self.part == "before"))
        return complete(within(among, marked(turn, self.role, self.turn) & view.prompt), self.missing, f"{self}: none")


def _carried(turn: Int[Tensor, "batch seq"], prompt: Mask, *, backwards: bool) -> Int[Tensor, "batch seq"]:
    """For each token of the prompt the mark of the last message that begins at it or before it; or of the next."""
    marks = turn.flip(1) if backwards else turn
    columns = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    latest = torch.where(marks > 0, columns, -1).cummax(dim=1).values
    carried = torch.where(latest >= 0, marks.gather(1, latest.clamp(min=0)), 0)
    return torch.where(prompt, carried.flip(1) if backwards else carried, 0)
