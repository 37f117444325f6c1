"""RED, an edit of each number of `h` by itself: no directions are learned, so there is no rank to choose."""

from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.interventions.base import Intervention


class RED(Intervention):
    """`h' = s ⊙ h + b`, `s` and `b` of width `d`, trained from `s = 1`, `b = 0`, which change nothing.

    In the one formula, `code(h) = (s - 1) ⊙ h + b` in the standard basis: strength has one number per coordinate, and
    strength 1/2 is half way from `h` to `s ⊙ h + b`. Source: Wu et al. 2024, Advancing Parameter Efficiency in
    Fine-tuning via Representation Editing (arXiv 2402.15179), section 3.2.
    """

    kind = "RED"
    affine = True

    def __init__(self, d: SupportsIndex, *, dropout: SupportsFloat = 0.0) -> None:
        super().__init__(d, d, dropout)
        self.scale = nn.Parameter(torch.ones(self.d, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(self.d, dtype=torch.float32))

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        return (self.scale.to(h.dtype) - 1) * h + self.bias.to(h.dtype)

    def basis(self) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "dropout": self.dropout.p}

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """The identity: nothing is drawn."""
        self.scale.fill_(1.0)
        self.bias.zero_()
