"""Which tokens an intervention edits: pure functions from a batch of tokens to a mask.

A `Positions` sees a `TokenView` (ids, role of each token, token text) and returns a boolean mask
`[batch, seq]`. It never sees padding, never depends on which side the padding is, and never depends on tokens
to the right of the one it decides about, so that a mask means the same in training, in a full forward pass and
while generating with a key/value cache.

`a | b` is the union, `a - b` the difference, and `a >> b` lets `b` choose among the tokens that `a` chose.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal

import torch

from reftlens.text.view import Mask, Role, TokenView


@dataclass(frozen=True)
class Positions:
    """A choice of tokens. Abstract: use `First`, `Last`, `Nth`, `At`, `Tokens`, `Prompt`, `Response`, …"""

    kind: ClassVar[str]
    reaches_response: ClassVar[bool] = False
    """Whether a token after the prompt can be chosen."""

    def __str__(self) -> str:
        """As it would be written: arguments that have their default are left out."""
        given = [(f, getattr(self, f.name)) for f in fields(self)]
        said = [f"{f.name}={value}" if isinstance(value, Positions) else f"{f.name}={value!r}"
                for f, value in given if f.default is MISSING or f is given[0][0] or value != f.default]  # fmt: skip
        return f"{type(self).__name__}({', '.join(said)})"

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        """The chosen tokens; `among` narrows the candidates (None: this choice's own default)."""
        raise NotImplementedError

    def mask(self, view: TokenView) -> Mask:
        """The chosen tokens of `view`, padding never among them."""
        return self.select(view, None) & view.real

    def __or__(self, other: "Positions") -> "Positions":
        return Union(self, as_positions(other))

    def __sub__(self, other: "Positions") -> "Positions":
        return Difference(self, as_positions(other))

    def __rshift__(self, other: "Positions") -> "Positions":
        return Chain(self, as_positions(other))

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": self.kind} | {
            k: v.to_dict() if isinstance(v, Positions) else list(v) if isinstance(v, tuple) else v
            for k, v in fields.items()
        }


def _at_least_one(name: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{name}({n}) chooses nothing; n must be 1 or more")


def _prompt_only(view: TokenView, among: Mask | None) -> Mask:
    return view.prompt if among is None else view.prompt & among


@dataclass(frozen=True)
class First(Positions):
    """The first `n` candidates of each row (by default: of the prompt); a short row chooses fewer."""

    n: int = 1
    kind: ClassVar[str] = "first"

    def __post_init__(self) -> None:
        _at_least_one("First", self.n)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pool = view.prompt if among is None else among
        return pool & (pool.long().cumsum(dim=1) <= self.n)


@dataclass(frozen=True)
class Last(Positions):
    """The last `n` candidates of each prompt; a short prompt chooses fewer."""

    n: int = 1
    kind: ClassVar[str] = "last"

    def __post_init__(self) -> None:
        _at_least_one("Last", self.n)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pool = _prompt_only(view, among)
        return pool & (pool.long().flip(1).cumsum(dim=1).flip(1) <= self.n)


@dataclass(frozen=True)
class Nth(Positions):
    """The `k`-th candidate of each prompt, from 0; negative `k` counts from the end of the prompt.

    A prompt that is too short raises, or chooses nothing with `missing="skip"`.
    """

    k: int
    missing: Literal["raise", "skip"] = "raise"
    kind: ClassVar[str] = "nth"

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pool = _prompt_only(view, among)
        place = pool.long().cumsum(dim=1) - 1
        wanted = self.k if self.k >= 0 else pool.long().sum(dim=1, keepdim=True) + self.k
        chosen = pool & (place == wanted)
        _refuse_missing(chosen, self.missing, f"{self}: the prompt has too few tokens")
        return chosen


@dataclass(frozen=True)
class At(Positions):
    """Explicit places in each row, from 0, padding not counted; they may lie after the prompt."""

    indices: tuple[int, ...]
    kind: ClassVar[str] = "at"
    reaches_response: ClassVar[bool] = True

    def __init__(self, *indices: int | Sequence[int]) -> None:
        flat = tuple(j for i in indices for j in ([i] if isinstance(i, int) else i))
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

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError('Tokens("") matches nothing; give the text or the pattern of the tokens')
        if self.regex:
            re.compile(self.text)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        pattern = re.compile(self.text if self.regex else re.escape(self.text))
        chosen = torch.zeros_like(view.prompt)
        for row, (text, spans) in enumerate(view.prompt_text):
            found = [m.span() for m in pattern.finditer(text) if m.end() > m.start()]
            hit = [any(s < b and a < e for a, b in found) for s, e in spans]
            chosen[row, view.prompt[row]] = torch.tensor(hit, dtype=torch.bool, device=chosen.device)
        chosen = chosen & _prompt_only(view, among)
        _refuse_missing(chosen, self.missing, f"{self}: no such token in the prompt")
        return chosen


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

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return _prompt_only(view, among)


@dataclass(frozen=True)
class Response(Positions):
    """Every token after the prompt: the completion in training, the generated tokens in generation."""

    kind: ClassVar[str] = "response"
    reaches_response: ClassVar[bool] = True

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        chosen = view.role >= Role.RESPONSE
        return chosen if among is None else chosen & among


@dataclass(frozen=True)
class Generated(Positions):
    """Only tokens that the model wrote itself, during generation; never a completion of the data."""

    kind: ClassVar[str] = "generated"
    reaches_response: ClassVar[bool] = True

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        chosen = view.role == Role.GENERATED
        return chosen if among is None else chosen & among


@dataclass(frozen=True)
class Union(Positions):
    """`left | right`: the tokens that either chooses, each of them once."""

    left: Positions
    right: Positions
    kind: ClassVar[str] = "union"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reaches_response", self.left.reaches_response or self.right.reaches_response)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return self.left.select(view, among) | self.right.select(view, among)


@dataclass(frozen=True)
class Difference(Positions):
    """`left - right`: the tokens of `left` that `right` does not choose."""

    left: Positions
    right: Positions
    kind: ClassVar[str] = "difference"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reaches_response", self.left.reaches_response)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return self.left.select(view, among) & ~self.right.select(view, among)


@dataclass(frozen=True)
class Chain(Positions):
    """`left >> right`: what `right` chooses among the tokens that `left` chose."""

    left: Positions
    right: Positions
    kind: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        follows = self.left.reaches_response
        if follows and (narrow := _prompt_bound(self.right)):
            raise ValueError(
                f"{narrow} acts on the prompt only, and {self.left} chooses tokens after the prompt, which "
                "are not all known while they are written; chain it after Prompt() or another prompt selector"
            )
        object.__setattr__(self, "reaches_response", follows and not isinstance(self.right, Prompt))

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return self.right.select(view, self.left.select(view, among))


KINDS: dict[str, type[Positions]] = {
    c.kind: c for c in (First, Last, Nth, At, Tokens, All, Prompt, Response, Generated, Union, Difference, Chain)
}
_WORDS: dict[str, Positions] = {
    "first": First(),
    "last": Last(),
    "all": All(),
    "prompt": Prompt(),
    "response": Response(),
    "generated": Generated(),
}


def parse(text: str) -> Positions:
    """`"f7+l7"` → `First(7) | Last(7)`; also `first last all prompt response generated`, joined by `+`."""
    result: Positions | None = None
    for part in text.replace(" ", "").split("+"):
        if counted := re.fullmatch(r"([fl])([1-9]\d*)", part):
            atom: Positions = (First if counted[1] == "f" else Last)(int(counted[2]))
        elif part in _WORDS:
            atom = _WORDS[part]
        else:
            raise ValueError(
                f"cannot read positions {text!r}: {part!r} is none of f<n>, l<n>, {', '.join(_WORDS)}; "
                'join them with +, as in "f7+l7"'
            )
        result = atom if result is None else result | atom
    assert result is not None
    return result


def as_positions(value: "Positions | str | Sequence[int]") -> Positions:
    """`value` itself, or what it spells: `"f7+l7"` is parsed, `[0, 3]` means `At(0, 3)`."""
    if isinstance(value, str):
        return parse(value)
    if not isinstance(value, Positions | int | Sequence):
        raise TypeError(f"positions={value!r}, expected positions such as 'last', Last(3) or [0, 3]")
    return value if isinstance(value, Positions) else At(value)


def positions_from_dict(spec: dict[str, Any]) -> Positions:
    """The inverse of `Positions.to_dict`."""
    fields: dict[str, Any] = dict(spec)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of positions {kind!r}, expected one of {', '.join(KINDS)}")
    fields = {k: positions_from_dict(v) if isinstance(v, dict) else v for k, v in fields.items()}
    return At(*fields.pop("indices"), **fields) if kind == "at" else KINDS[kind](**fields)


def _prompt_bound(positions: Positions) -> Positions | None:
    """The first part of `positions` that can only choose among prompt tokens."""
    if isinstance(positions, Union | Difference):
        return _prompt_bound(positions.left) or _prompt_bound(positions.right)
    if isinstance(positions, Chain):
        return _prompt_bound(positions.left)
    return positions if isinstance(positions, Last | Nth | Tokens) else None


def _refuse_missing(chosen: Mask, missing: str, why: str) -> None:
    if missing not in ("raise", "skip"):
        raise ValueError(f'missing={missing!r}, expected "raise" or "skip"')
    rows = (~chosen.any(dim=1)).nonzero().flatten().tolist()
    if rows and missing == "raise":
        raise ValueError(f'{why} in row(s) {rows[:10]}; pass missing="skip" to leave such rows unedited')
