"""Gates: an edit that acts only where a condition holds. `Gated` puts one before any kind of intervention.

`h' = h + strength · g(h) · code(h, source) @ basisᵀ` with `g` in [0, 1]; where `g` is 0 the vector is `h` itself.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.interventions.base import Hidden, Intervention, Kind, Origin, Strength


class Gate(Kind):
    """How far an edit acts at each token: `g` in [0, 1]. Abstract; a kind is final, as an intervention is.

    One of your own: a subclass with `kind`, `open`, `settings` and `reset`; `rl.load(…, kinds={kind: YourGate})`
    reads it again.
    """

    d: int | None = None
    """Width of the vectors it reads; None where it reads none."""
    pools: bool = False
    """Whether it decides once for a row, from the tokens of its prompt that are edited."""
    counts: bool = False
    """Whether it depends on how far a token is after the prompt."""
    constant: bool = False
    """Whether it is as open at every token, in eval mode: what is affine in `h` is so behind it."""

    @abstractmethod
    def open(self, h: Hidden, origin: Origin | None = None) -> Float[Tensor, "*units 1"]:
        """How far it is open at each of `h`, which come in the working dtype, before they are edited."""


def undecided(gate: Gate) -> ValueError:
    """That a gate which decides once for a row has no token of its prompt to decide by."""
    return ValueError(
        f"{gate.kind} decides by tokens of the prompt, and none is edited in some row that has tokens edited after it: "
        "its site, and `among` of the variant, have to choose one there"
    )


class Gated(Intervention):
    """Any intervention behind a gate: `h' = h + strength · g(h) · code(h, source) @ basisᵀ`, `g` in [0, 1].

    Where the gate is shut, `h` stays as it is, bit for bit. The gate sees `h` before the edit; both are trained.

    Args:
        inner: the intervention; `Gated` takes its width, basis, variables and dropout.
        gate: `Threshold`, `Sigmoid`, `Schedule`, or a class of one's own that is a `Gate`.

    Raises:
        TypeError: where they are something else.
        ValueError: for a gate of another width.
    """

    kind = "Gated"

    def __init__(self, inner: Intervention, gate: Gate) -> None:
        for value, expected, what in ((inner, Intervention, "an Intervention"), (gate, Gate, "a Gate")):
            if not isinstance(value, expected):
                raise TypeError(f"got a {type(value).__name__}, expected {what}: Gated(LoReFT(d), Threshold(…))")
        if gate.d not in (None, inner.d):
            raise ValueError(f"{gate.kind} reads vectors of width {gate.d}, and {inner.kind} was made for d={inner.d}")
        super().__init__(inner.d, inner.rank)
        self.inner, self.gate, self.dropout = inner, gate, inner.dropout
        self.variables, self.affine = inner.variables, inner.affine and gate.constant
        self.pools, self.counts = inner.pools or gate.pools, inner.counts or gate.counts
        self.remembers = gate.pools and not inner.pools
        self.stacks = inner.stacks and not self.pools and not self.counts

    @property
    def label(self) -> str:
        return f"{self.inner.label} behind {self.gate.kind}" + " per prompt" * self.gate.pools

    def openness(self, h: Hidden, origin: Origin | None = None) -> Float[Tensor, "*units 1"]:
        """`g` of each of the vectors that are to be edited."""
        with torch.autocast(h.device.type, enabled=False):
            return self.gate.open(h.to(self.working_dtype(h.dtype)), origin)

    def forward(
        self,
        h: Float[Tensor, "*units {self.d}"],
        strength: Strength = 1.0,
        basis: Tensor | None = None,
        source: Float[Tensor, "*units variables {self.d}"] | None = None,
        origin: Origin | None = None,
    ) -> Float[Tensor, "*units {self.d}"]:
        if isinstance(strength, int | float) and strength == 0:
            return h
        share = self.openness(h, origin)
        scale = strength.to(share) if isinstance(strength, Tensor) else strength
        return torch.where(share == 0, h, self.inner(h, share * scale, basis, source, origin))

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        return self.coded(h, basis, None, None)

    def coded(self, h: Tensor, basis: Tensor | None, source: Tensor | None, origin: Origin | None) -> Tensor:
        return self.openness(h, origin) * self.inner.coded(h, basis, source, origin)

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"] | None:
        return self.inner.basis()

    def anneal(self, progress: float) -> None:
        self.inner.anneal(progress)
        self.gate.anneal(progress)

    def penalty(self) -> Tensor | None:
        """The sum of those of both."""
        some = [p for p in (self.inner.penalty(), self.gate.penalty()) if p is not None]
        return torch.stack([p.to(some[0]) for p in some]).sum() if some else None

    def settings(self) -> dict[str, Any]:
        """Kind and settings of both."""
        parts = {"inner": self.inner, "gate": self.gate}
        return {name: {"kind": part.kind, "settings": part.settings()} for name, part in parts.items()}

    def extra_repr(self) -> str:
        return f"{self.inner.extra_repr()}; {self.gate.extra_repr()}"

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Both, the intervention first."""
        self.inner.reset(generator)
        self.gate.reset(generator)
