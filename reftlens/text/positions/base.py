"""What a choice of tokens is, and how choices combine: `a | b`, `a - b`, `a >> b`."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, SupportsIndex

from reftlens.numbers import Integers
from reftlens.text.view import Mask, TokenView


@dataclass(frozen=True)
class Positions:
    """A choice of tokens. Abstract: use `First`, `Last`, `Nth`, `At`, `Tokens`, `Prompt`, `Response`, …

    `a | b` is what either chooses, `a - b` what `b` does not. `a >> b` lets `b` choose among the tokens of `a`, row by
    row: `Tokens("cat") >> Last(1)` is the last token that carries "cat", `Prompt() >> At(0)` the row's first.
    """

    kind: ClassVar[str]
    reaches_response: ClassVar[bool] = False
    """Whether a token after the prompt can be chosen."""
    prompt_only: ClassVar[bool] = False
    """Whether no token after the prompt is chosen, not even among candidates that lie there."""
    looks_ahead: ClassVar[bool] = False
    """Whether what follows a token decides whether it is chosen, so that the whole prompt has to be known."""

    def __str__(self) -> str:
        """As it would be written: arguments that have their default are left out."""
        values = [(f, getattr(self, f.name)) for f in fields(self)]
        shown = [(f, v) for i, (f, v) in enumerate(values) if i == 0 or f.default is MISSING or v != f.default]
        arguments = [f"{f.name}={v if isinstance(v, Positions) else repr(v)}" for f, v in shown]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        """The chosen tokens; `among` narrows the candidates (None: this choice's own default)."""
        raise NotImplementedError

    def mask(self, view: TokenView) -> Mask:
        """The chosen tokens of `view`, padding never among them."""
        return self.select(view, None) & view.real

    def __or__(self, other: "Positions | str | SupportsIndex | Integers") -> "Positions":
        return Union(self, _as_positions(other))

    def __sub__(self, other: "Positions | str | SupportsIndex | Integers") -> "Positions":
        return Difference(self, _as_positions(other))

    def __rshift__(self, other: "Positions | str | SupportsIndex | Integers") -> "Positions":
        return Chain(self, _as_positions(other))

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": self.kind} | {
            k: v.to_dict() if isinstance(v, Positions) else list(v) if isinstance(v, tuple) else v
            for k, v in values.items()
        }


@dataclass(frozen=True)
class _Pair(Positions):
    left: Positions
    right: Positions


@dataclass(frozen=True)
class Union(_Pair):
    """`left | right`: the tokens that either chooses, each of them once."""

    kind: ClassVar[str] = "union"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reaches_response", self.left.reaches_response or self.right.reaches_response)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return self.left.select(view, among) | self.right.select(view, among)


@dataclass(frozen=True)
class Difference(_Pair):
    """`left - right`: the tokens of `left` that `right` does not choose."""

    kind: ClassVar[str] = "difference"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reaches_response", self.left.reaches_response)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return self.left.select(view, among) & ~self.right.select(view, among)


@dataclass(frozen=True)
class Chain(_Pair):
    """`left >> right`: what `right` chooses among the tokens that `left` chose."""

    kind: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        follows = self.left.reaches_response
        if follows and (narrow := _looking_ahead(self.right)):
            raise ValueError(
                f"{narrow} acts on the prompt only, and {self.left} chooses tokens after the prompt, which "
                "are not all known while they are written; chain it after Prompt() or another prompt selector"
            )
        object.__setattr__(self, "reaches_response", follows and not self.right.prompt_only)

    def select(self, view: TokenView, among: Mask | None) -> Mask:
        return self.right.select(view, self.left.select(view, among))


def _looking_ahead(positions: Positions) -> Positions | None:
    """The first part of `positions` that needs the whole prompt."""
    if isinstance(positions, Union | Difference):
        return _looking_ahead(positions.left) or _looking_ahead(positions.right)
    if isinstance(positions, Chain):
        return _looking_ahead(positions.left)
    return positions if positions.looks_ahead else None


def _as_positions(value: Positions | str | SupportsIndex | Integers) -> Positions:
    from reftlens.text.positions.spelling import as_positions  # it spells the choosers, and these are made of this file

    return as_positions(value)
