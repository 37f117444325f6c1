"""The ReFT family of the paper (arXiv 2404.03592): six kinds that differ in their code and basis only.

`R = basisᵀ` in the paper's letters; `f` is the activation function (the paper's experiments use none).
"""

from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from reftlens.errors import check_one_of
from reftlens.interventions.base import Intervention
from reftlens.interventions.subspace import Frame

Init = Literal["paper", "identity"]


class _Family(Intervention):
    """`h' = h + Bᵀ( source - B h )`, or without `- B h`, where `B = basisᵀ` and `source = f(W h + b)`, or `b` alone."""

    orthonormal: bool
    """Whether the rows of `B` are: then `B` is called `R`, else `W2`."""
    reads: bool
    """Whether `source` depends on `h`."""
    replaces: bool
    """Whether `B h` is taken away, so that `source` takes its place."""

    def __init__(
        self,
        d: SupportsIndex,
        rank: SupportsIndex = 4,
        *,
        activation: str = "linear",
        dropout: SupportsFloat = 0.0,
        init: Init = "paper",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d, rank, dropout)
        if activation not in ACT2FN:
            raise ValueError(f"unknown activation {activation!r}, expected one of {', '.join(sorted(ACT2FN))}")
        check_one_of("init", init, ("paper", "identity"))
        self.activation, self.init = activation, init
        self._f = ACT2FN[activation]
        if any(True for _ in self._f.parameters()):
            raise ValueError(f"{activation} has parameters of its own, which are neither counted nor reset here")
        if activation != "linear" and not self.reads:
            raise ValueError(f"{self.kind} reads nothing from h, so activation={activation!r} would do nothing")
        self.frame = Frame(self.d, self.rank) if self.orthonormal else None
        if self.frame is None:
            if not 1 <= self.rank <= self.d:
                raise ValueError(f"rank={rank} does not fit into d={d}: need 1 <= rank <= d")
            self.W2 = nn.Parameter(torch.empty(self.rank, self.d, dtype=torch.float32))
        if self.reads:
            self.W = nn.Parameter(torch.empty(self.rank, self.d, dtype=torch.float32))
        self.b = nn.Parameter(torch.empty(self.rank, dtype=torch.float32))
        self.affine = activation == "linear"
        self.reset(generator)

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.W2.T if self.frame is None else self.frame()

    def settings(self) -> dict[str, Any]:
        return {
            "d": self.d,
            "rank": self.rank,
            "activation": self.activation,
            "dropout": self.dropout.p,
            "init": self.init,
        }

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """`paper`: frame uniform, `W`, `W2` and `b` uniform in ±1/√d (`b` in [0, 1) where nothing is read).
        `identity`: the edit is exactly zero, and learning can start from there.
        """
        bound = self.d**-0.5
        if self.frame is not None:
            self.frame.reset(generator)
        else:
            self.W2.copy_(_uniform(self.W2, -bound, bound, generator))
        if self.reads:
            self.W.copy_(_uniform(self.W, -bound, bound, generator))
            self.b.copy_(_uniform(self.b, -bound, bound, generator))
        else:
            self.b.copy_(_uniform(self.b, 0.0, 1.0, generator))
        if self.init == "identity":
            self._make_identity()

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        assert basis is not None
        b = self.b.to(h.dtype)
        if self.reads and self.replaces and self.activation == "linear":
            # (W - B) h + b: one product, and exactly 0 at the identity start
            return F.linear(h, self.W.to(h.dtype) - basis.T, b)
        source = self._f(F.linear(h, self.W.to(h.dtype), b)) if self.reads else b.expand(*h.shape[:-1], self.rank)
        return source - h @ basis if self.replaces else source

    def _make_identity(self) -> None:
        if self.replaces and not self.reads:
            raise ValueError(f'{self.kind} sets a constant and so has no identity start: use init="paper"')
        if self.replaces and self.activation != "linear":
            raise ValueError(
                f'{self.kind} with activation={self.activation!r} has no identity start: use init="paper" or '
                'activation="linear"'
            )
        if self.replaces:
            self.W.copy_(self.basis().T)
        elif self.reads:
            self._require_a_zero()
            self.W.zero_()
        self.b.zero_()

    def _require_a_zero(self) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            zero = torch.zeros(1, dtype=torch.float32, requires_grad=True)
            value = self._f(zero)
            (slope,) = torch.autograd.grad(value.sum(), zero)
        if value.item() != 0.0 or slope.item() == 0.0:
            raise ValueError(
                f"{self.kind} has an identity start where f(0) = 0, and learns from there where f'(0) is not 0; "
                f'{self.activation} has f(0) = {value.item():.3g} and f\'(0) = {slope.item():.3g}: use init="paper"'
            )


class LoReFT(_Family):
    """`h' = h + Rᵀ( f(W h + b) - R h )`, R orthonormal (paper, eq. 2).

    Args:
        d: width of the hidden states.
        rank: directions that are edited, rows of `R`.
        activation: `f`, by its name in transformers.
        dropout: share of the edited numbers that are dropped in training.
        init: `"paper"` draws `R`, `W` and `b`, so that an edit acts before it is trained; with `"identity"` it does
            nothing at first. Other kinds have the same choice where they can begin so.
        generator: of what is drawn.
    """

    kind = "LoReFT"
    orthonormal, reads, replaces = True, True, True


class DiReFT(_Family):
    """`h' = h + W2ᵀ f(W h + b)`, W2 free (paper, eq. 3; in pyreft's code: `NodireftIntervention`)."""

    kind = "DiReFT"
    orthonormal, reads, replaces = False, True, False


class OrthoDiReFT(_Family):
    """`h' = h + Rᵀ f(W h + b)`, R orthonormal: the paper's ablation (pyreft's class `DireftIntervention`)."""

    kind = "OrthoDiReFT"
    orthonormal, reads, replaces = True, True, False


class NoReFT(_Family):
    """`h' = h + W2ᵀ( f(W h + b) - W2 h )`, W2 free (paper, Table 17)."""

    kind = "NoReFT"
    orthonormal, reads, replaces = False, True, True


class ConsReFT(_Family):
    """`h' = h + Rᵀ( b - R h )`, R orthonormal: the subspace is set to a constant (paper, section 4)."""

    kind = "ConsReFT"
    orthonormal, reads, replaces = True, False, True


class LobiReFT(_Family):
    """`h' = h + Rᵀ b`, R orthonormal: a bias in a low-rank subspace."""

    kind = "LobiReFT"
    orthonormal, reads, replaces = True, False, False


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low
