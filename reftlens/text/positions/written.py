"""Tokens chosen by what has been written so far."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from reftlens.errors import check_one_of
from reftlens.text.positions.base import Positions
from reftlens.text.positions.choosers import within
from reftlens.text.view import Mask, TokenView


@dataclass(frozen=True)
class Written(Positions):
    """Tokens after the prompt at which the text written so far matches: in training the completion's so far.

    What is looked at for a token is the text after the prompt up to that token's last character, as if it ended there:
    no token to its right, so that training, a full forward pass and generation on the cache choose the same tokens. A
    character of several tokens is there with the last of them. An edit at a token acts on what is written after it.

    Args:
        text: what is looked for, or with `regex=True` a pattern; matches of no length are none.
        then: "at" chooses the tokens with which a match ends, "after" all tokens after the first of these; both are
            `Written("x") | Written("x", then="after")`. A text that never comes up chooses nothing.
    """

    text: str
    regex: bool = False
    then: Literal["at", "after"] = "at"
    kind: ClassVar[str] = "written"
    reaches_response: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_one_of("then", self.then, ("at", "after"))
        if not self.text:
            raise ValueError('Written("") matches nothing; give the text or the pattern that is waited for')
        if self.regex:
            re.compile(self.text)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        hits = torch.zeros_like(view.written)
        for row, (text, lengths) in enumerate(view.written_text):
            ends = zip([0, *lengths], lengths, strict=False)
            flags = [self._ends(text, before, after) for before, after in ends]
            hits[row, view.written[row]] = torch.tensor(flags, dtype=torch.bool, device=hits.device)
        if self.then == "after":
            hits = view.written & (hits.long().cumsum(dim=1) - hits.long() > 0)
        return within(among, hits)

    def _ends(self, text: str, before: int, after: int) -> bool:
        """Whether a match in the first `after` characters ends after the first `before` of them."""
        if not self.regex:
            return text.find(self.text, max(0, before - len(self.text) + 1), after) >= 0
        matches = re.compile(self.text).finditer(text, 0, after)
        return after > before and any(m.end() > before and m.end() > m.start() for m in matches)
