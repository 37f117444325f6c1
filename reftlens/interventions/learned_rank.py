"""DAS that learns its rank: gates over the directions of a trained frame."""

from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.interventions.masks import GatedExchange, LogitGates, Temperature
from reftlens.interventions.subspace import Frame
from reftlens.numbers import whole


class BoundlessDAS(GatedExchange):
    """DAS that learns its width (Boundless DAS, Wu et al. 2023, arXiv 2305.08809), within `rank` directions.

    `h' = h + strength · (m ⊙ (source - h) B) Bᵀ`, `B` orthonormal and trained, `m_i = σ((w · rank - i - ½) / T)` for
    `i = 0 … rank - 1`: the first `w · rank` directions are open. In place of a d × d rotation there is a frame of
    `rank` columns, and the gate's lower edge is left out: it would hold direction 0 half shut at any width.

    Args:
        temperature: of the gate, first and last, in directions; by default `(rank / 2, 0.1)`.
        sparsity: price of an open direction in nats, added to the loss.
    """

    kind = "BoundlessDAS"

    def __init__(
        self,
        d: SupportsIndex,
        rank: SupportsIndex,
        *,
        temperature: Temperature | None = None,
        sparsity: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d, rank, temperature or (max(whole(rank, "rank") / 2, 0.1), 0.1), sparsity)
        self.frame = Frame(self.d, self.rank)
        self.width = nn.Parameter(torch.tensor(0.5, dtype=torch.float32))
        self.reset(generator)

    def gate_logits(self) -> Float[Tensor, " {self.rank}"]:
        edges = torch.arange(self.rank, device=self.width.device, dtype=torch.float32) + 0.5
        return self.width * self.rank - edges

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.frame()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """A frame drawn uniformly, half of it open."""
        self.frame.reset(generator)
        self.width.fill_(0.5)
        self.anneal(0.0)


class MaskedDAS(LogitGates):
    """DAS that learns its rank, up to `rank`: a mask over the directions of a trained frame (DBM-DAS of causalab).

    `h' = h + strength · (m ⊙ (source - h) B) Bᵀ`, `B` orthonormal and trained, `m = σ(l / T)`, the logits `l` trained
    from 0. A direction stays open where it lowers the loss by more than its price; where the source tells nothing that
    is worth it, all are shut: `learned_rank` is 0, and `h' = h`. `docs/learned_rank.md` has what was learned on
    networks whose rank is known, at prices from 0.5 to 2 nats: a third of what a direction is worth is a good price,
    and what `Interchange` of the whole vector gains is the most that all of them can be worth.

    Args:
        rank: the most that can be learned.
        temperature: of the gate, first and last; the last makes it all but binary.
        sparsity: price of an open direction in nats, added to the loss.
    """

    kind = "MaskedDAS"

    def __init__(
        self,
        d: SupportsIndex,
        rank: SupportsIndex,
        *,
        temperature: Temperature = (1.0, 0.01),
        sparsity: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d, rank, temperature, sparsity)
        self.frame = Frame(self.d, self.rank)
        self.reset(generator)

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.frame()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """A frame drawn uniformly, every direction half open."""
        super().reset(generator)
        self.frame.reset(generator)
