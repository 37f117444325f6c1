"""The choosers: which tokens of a row, by place, by text, or by who wrote them."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, SupportsIndex

import torch

from reftlens.errors import check_one_of
from reftlens.numbers import Integers, whole, whole_numbers
from reftlens.text.positions.base import Positions
from reftlens.text.view import Mask, TokenRole, TokenView


@dataclass(frozen=True)
class First(Positions):
    """The first `n` candidates of each row (by default: of the prompt); a short row chooses fewer."""

    n: int = 1
    kind: ClassVar[str] = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.n, "First: n", 1))

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pool = view.prompt if among is None else among
        return pool & (pool.long().cumsum(dim=1) <= self.n)


@dataclass(frozen=True)
class Last(Positions):
    """The last `n` candidates of each prompt; a short prompt chooses fewer."""

    n: int = 1
    kind: ClassVar[str] = "last"
    prompt_only: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.n, "Last: n", 1))

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pool = within(among, view.prompt)
        return pool & (pool.long().flip(1).cumsum(dim=1).flip(1) <= self.n)


@dataclass(frozen=True)
class Nth(Positions):
    """The `k`-th candidate of each prompt, from 0; negative `k` counts from the end of the prompt.

    Where text begins with a BOS token, that is the 0th.

    A prompt that is too short raises, or chooses nothing with `missing="skip"`.
    """

    k: int
    missing: Literal["raise", "skip"] = "raise"
    kind: ClassVar[str] = "nth"
    prompt_only: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole(self.k, "Nth: k"))

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pool = within(among, view.prompt)
        place = pool.long().cumsum(dim=1) - 1
        wanted = self.k if self.k >= 0 else pool.long().sum(dim=1, keepdim=True) + self.k
        return complete(pool & (place == wanted), self.missing, f"{self}: the prompt has too few tokens")


@dataclass(frozen=True)
class At(Positions):
    """Explicit places in each row, from 0, padding not counted; they may lie after the prompt."""

    indices: tuple[int, ...]
    kind: ClassVar[str] = "at"
    reaches_response: ClassVar[bool] = True

    def __init__(self, *indices: SupportsIndex | Integers) -> None:
        flat = tuple(place for each in indices for place in whole_numbers(each, "At: place"))
        if not flat or any(i < 0 for i in flat):
            raise ValueError(
                f"At{flat} needs one or more places counted from 0; use Nth(-k) to count from the prompt's end"
            )
        object.__setattr__(self, "indices", tuple(sorted(set(flat))))

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        wanted = torch.isin(view.index, torch.tensor(self.indices, device=view.index.device))
        return (view.real if among is None else among) & wanted


@dataclass(frozen=True)
class Tokens(Positions):
    """The prompt tokens that carry `text` (or match the pattern, with `regex=True`), every occurrence.

    Matching is on the decoded prompt, so a text may span several tokens; each token that shares a character
    with a match is chosen. A row without a match raises, or chooses nothing with `missing="skip"`.
    """

    text: str
    regex: bool = False
    missing: Literal["raise", "skip"] = "raise"
    kind: ClassVar[str] = "tokens"
    prompt_only: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError('Tokens("") matches nothing; give the text or the pattern of the tokens')
        if self.regex:
            re.compile(self.text)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pattern = re.compile(self.text if self.regex else re.escape(self.text))
        mask = torch.zeros_like(view.prompt)
        for row, (text, spans) in enumerate(view.prompt_text):
            matches = [m.span() for m in pattern.finditer(text) if m.end() > m.start()]
            hits = [any(start < b and a < end for a, b in matches) for start, end in spans]
            mask[row, view.prompt[row]] = torch.tensor(hits, dtype=torch.bool, device=mask.device)
        return complete(within(among, mask), self.missing, f"{self}: no such token in the prompt")


@dataclass(frozen=True)
class All(Positions):
    """Every token: the prompt, and what follows it."""

    kind: ClassVar[str] = "all"
    reaches_response: ClassVar[bool] = True

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return view.real if among is None else among


@dataclass(frozen=True)
class Prompt(Positions):
    """Every token of the prompt."""

    kind: ClassVar[str] = "prompt"
    prompt_only: ClassVar[bool] = True

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return within(among, view.prompt)


@dataclass(frozen=True)
class Response(Positions):
    """Every token after the prompt: the completion in training, the generated tokens in generation."""

    kind: ClassVar[str] = "response"
    reaches_response: ClassVar[bool] = True

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return within(among, view.role >= TokenRole.RESPONSE)


@dataclass(frozen=True)
class Generated(Positions):
    """Only tokens that the model wrote itself, during generation; never a completion of the data."""

    kind: ClassVar[str] = "generated"
    reaches_response: ClassVar[bool] = True

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return within(among, view.role == TokenRole.GENERATED)


def within(among: Mask | None, mask: Mask) -> Mask:
    """What of `mask` is among the candidates."""
    return mask if among is None else mask & among


def complete(mask: Mask, missing: str, why: str) -> Mask:
    """`mask` itself, unless a row has no token in it and `missing` says to raise."""
    check_one_of("missing", missing, ("raise", "skip"))
    rows = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if rows and missing == "raise":
        raise ValueError(f'{why} in row(s) {rows[:10]}; pass missing="skip" to leave such rows unedited')
    return mask
