"""Interventions with a source: what a subspace holds is exchanged for what it holds in another row."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.errors import index_of
from reftlens.interventions.base import Intervention, Origin
from reftlens.interventions.subspace import Frame
from reftlens.numbers import tensor_of, whole

Sources = Float[Tensor, "*units variables d"]


class Exchange(Intervention):
    """An intervention that takes one source vector per token and variable; NaN stands for "leave this variable"."""

    variables: tuple[str, ...] = ("source",)

    @abstractmethod
    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        """The code, from `away = source - h` (`[*units, variables, d]`, zero where a variable is left)."""

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        raise ValueError(
            f"{self.kind} exchanges {', '.join(map(repr, self.variables))} and was given no source: pass "
            "data.with_sources(…)"
        )

    def coded(self, h: Tensor, basis: Tensor | None, source: Tensor | None, origin: Origin | None) -> Tensor:
        if source is None:
            return self.code(h, basis)
        if tuple(source.shape) != (*h.shape[:-1], len(self.variables), self.d):
            raise ValueError(
                f"{self.kind} got sources of shape {list(source.shape)} for hidden states of shape {list(h.shape)} "
                f"and {len(self.variables)} variable(s)"
            )
        away = source.to(h.dtype) - h.unsqueeze(-2)
        return self.exchanged(h, basis, torch.where(source.isnan(), 0.0, away))


class Interchange(Exchange):
    """Vanilla interchange, `h' = h + strength · (source - h)`: the whole vector is exchanged. Nothing is trained.

    The ceiling of what any subspace of the site can carry.
    """

    kind = "Interchange"

    def __init__(self, d: SupportsIndex) -> None:
        super().__init__(d, d)

    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        return away[..., 0, :]

    def basis(self) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {"d": self.d}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Nothing is trained, so nothing changes."""


class DAS(Exchange):
    """Distributed alignment search, `h' = h + strength · (source - h) B Bᵀ` with `B` orthonormal and trained.

    Low-rank interchange in a learned subspace (Geiger et al. 2023, arXiv 2303.02536; the DII of the ReFT paper,
    eq. 1). `strength` may be one number per direction.

    Args:
        d: width of what is edited, such as `model.cfg.d_model`.
        rank: width of the subspace of the one variable `"source"`; needed, unless `basis` or `variables` tell it.
        basis: orthonormal columns to start from, say `pca(x, 2).basis`, which give the rank; else drawn uniformly.
        variables: instead of `rank`, several variables that share one frame: `{"op1": 2, "op2": 2}`. Each has a
            source of its own, and takes the next so many columns.
        frozen: the basis is not trained, and `reset` leaves it.
    """

    kind = "DAS"

    def __init__(
        self,
        d: SupportsIndex,
        rank: SupportsIndex | None = None,
        *,
        basis: Float[Tensor, "_ _"] | None = None,
        variables: Mapping[str, SupportsIndex] | None = None,
        frozen: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if basis is not None:
            basis = tensor_of(basis, "basis")
        if rank is None and variables is None and basis is not None:
            rank = basis.shape[1]
        if (rank is None) == (variables is None):
            raise ValueError(
                "DAS needs rank=…, basis=…, or variables={name: rank, …} for several, and not both rank and variables"
            )
        named = dict(variables or {}) if rank is None else {"source": rank}
        if not named:
            raise ValueError("variables={}, expected at least one")
        widths = {name: whole(width, f"rank of variable {name!r}", 1) for name, width in named.items()}
        super().__init__(d, sum(widths.values()))
        self.widths = widths
        self.variables = tuple(widths)
        self.frame = Frame(self.d, self.rank)
        self.frame.reset(generator)
        if basis is not None:
            self.frame.set(basis.detach())
        self.frozen = frozen
        self.frame.matrix.requires_grad_(not frozen)

    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        assert basis is not None
        columns = basis.split(list(self.widths.values()), dim=1)
        return torch.cat([away[..., v, :] @ part for v, part in enumerate(columns)], dim=-1)

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.frame()

    def subspace(self, variable: str) -> Float[Tensor, "{self.d} width"]:
        """The columns of the basis that belong to one variable."""
        return self.basis().split(list(self.widths.values()), dim=1)[index_of(self.variables, variable, "variable")]

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "variables": self.widths, "frozen": self.frozen}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """A frame drawn uniformly, unless it is frozen."""
        if not self.frozen:
            self.frame.reset(generator)
