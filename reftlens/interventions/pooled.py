"""ReFT-r1: one direction that both detects a concept in a text and writes it."""

from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reftlens.interventions.base import Intervention, Origin
from reftlens.interventions.subspace import Frame
from reftlens.numbers import whole


class ReFTr1(Intervention):
    """`h' = h + strength · a w` with `a` the mean of the `k` largest `relu(h·w + b)` among a row's edited tokens.

    Rank-1 ReFT with a detector (Wu et al. 2025, AxBench, arXiv 2501.17148, eq. 5); `w` has unit length. The loss
    has `sparsity · mean(relu(h·w + b))` added, over the tokens that are not among the `k` largest.

    As the edit of a token depends on the others of its row, it acts on prompts only: in training, tokens still to be
    predicted would give themselves away. At generated tokens `reft_r1(…).as_steering()` adds `w` alone.
    """

    kind = "ReFTr1"
    stacks = False
    pools = True

    def __init__(
        self,
        d: SupportsIndex,
        *,
        k: SupportsIndex = 8,
        sparsity: float = 5e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d, 1)
        self.k, self.sparsity = whole(k, "k", 1), float(sparsity)
        self.frame, self.b = Frame(self.d, 1), nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.reset(generator)

    def latents(self, h: Float[Tensor, "*units {self.d}"]) -> Float[Tensor, " *units"]:
        """`relu(h·w + b)`: how much of the concept is in each token."""
        return torch.relu(h @ self.frame()[:, 0].to(h.dtype) + self.b.to(h.dtype))

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        raise ValueError(f"{self.kind} pools over the tokens of a row, and was not told which row each token is of")

    def coded(self, h: Tensor, basis: Tensor | None, source: Tensor | None, origin: Origin | None) -> Tensor:
        return super().coded(h, basis, source, origin) if origin is None else self.pooled(h, origin.rows)

    def pooled(self, h: Float[Tensor, "tokens {self.d}"], rows: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens 1"]:
        """The code of tokens that belong to these rows."""
        if self.training and torch.is_grad_enabled():
            self._seen.append((h.detach(), rows))
        latents, (_, group) = self.latents(h), torch.unique(rows, return_inverse=True)
        top = self._largest(latents, group)
        total = latents.new_zeros(int(group.max()) + 1).index_add(0, group, latents * top)
        return (total / torch.bincount(group, top.double()).to(total))[group, None]

    def _largest(self, latents: Tensor, group: Tensor) -> Float[Tensor, " tokens"]:
        """1 for the `k` largest of each group, else 0."""
        order = latents.detach().argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        counts = torch.bincount(group)
        begins = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - begins.repeat_interleave(counts)
        return torch.zeros_like(latents.detach()).scatter(0, order, (place < self.k).to(latents))

    def anneal(self, progress: float) -> None:
        self._seen.clear()

    def penalty(self) -> Tensor | None:
        if not self.sparsity or not self._seen:
            return None
        total, count = torch.zeros((), dtype=torch.float32), 0
        for h, rows in self._seen:
            latents = self.latents(h)
            rest = latents * (1 - self._largest(latents, torch.unique(rows, return_inverse=True)[1]))
            total, count = total.to(rest) + rest.sum(), count + len(rest)
        return self.sparsity * total / count

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.frame()

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "k": self.k, "sparsity": self.sparsity}

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """A direction drawn uniformly, no threshold."""
        self.frame.reset(generator)
        self.b.zero_()
        self._seen.clear()
