"""Principal angles and overlap between subspaces: seeds, ranks, layers, tasks, methods; beside the chance level."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis.projection_kernel import (
    SubspaceBasis,
    orthonormal_subspace,
    projection_kernel,
    random_projection_kernel_moments,
)

from reftlens import figures
from reftlens.analysis.subspaces.directions import Direction
from reftlens.analysis.subspaces.metrics import EUCLIDEAN, Metric
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.base import Intervention
from reftlens.interventions.gates import Gated
from reftlens.interventions.masks import GatedExchange

Subspace = ReFT | Intervention | Direction | Tensor
"""What spans a subspace; a tensor is `[d, k]`, its columns span it (the decoder of an autoencoder: transposed)."""


@dataclass(frozen=True)
class Chance:
    """Overlap of a fixed subspace with one drawn uniformly: mean and standard deviation."""

    mean: float
    spread: float

    def z(self, overlap: float) -> float:
        """Standard deviations above the mean; NaN where one of the two is the whole space."""
        return (overlap - self.mean) / self.spread if self.spread > 1e-12 else math.nan

    def as_columns(self, name: str, overlap: float) -> dict[str, float]:
        """`{name: overlap, "chance": …, "chance_sd": …, "z": …}`, for a data frame."""
        return {name: overlap, "chance": self.mean, "chance_sd": self.spread, "z": self.z(overlap)}


def chance_overlap(d: int, a: int, b: int) -> Chance:
    """Overlap of random subspaces of ranks `a` and `b` in `d` dimensions: mean `max(a, b) / d`.

    The projection kernel has mean `ab/d` and variance `2ab(d-a)(d-b) / (d²(d-1)(d+2))`: geometric means of what
    TransformerLens gives for equal ranks. Over `min(a, b)`, it is the overlap.
    """
    if d == 1:
        return Chance(1.0, 0.0)
    moments, least = [random_projection_kernel_moments(d, rank) for rank in (a, b)], min(a, b)
    mean, variance = math.prod(m.mean for m in moments) ** 0.5, math.prod(m.variance for m in moments) ** 0.5
    return Chance(mean / least, variance**0.5 / least)


def overlap_of(a: SubspaceBasis, b: SubspaceBasis) -> float:
    """Mean squared cosine of the principal angles, `‖UᵀV‖² / min(rank)`: 1 where one contains the other."""
    return projection_kernel(a, b).score.item() / min(a.rank, b.rank)


def span(columns: Float[Tensor, "d k"], *, name: str = "the basis") -> SubspaceBasis:
    """Orthonormal basis of the column space, to the rounding of float32; float64 on the CPU.

    Raises:
        ValueError: for columns that are all zero or not finite.
    """
    matrix = columns.detach().cpu().double()
    if not bool(matrix.isfinite().all()) or not bool(matrix.any()):
        raise ValueError(f"{name} is zero or not finite: it spans nothing")
    return orthonormal_subspace(matrix, rtol=max(matrix.shape) * torch.finfo(torch.float32).eps)


def columns_of(module: Intervention) -> Float[Tensor, "d k"]:
    """The directions along which an intervention edits; of a gated exchange, those that are open.

    Raises:
        ValueError: where a gated exchange has no open direction.
    """
    if isinstance(module, Gated):
        return columns_of(module.inner)
    if isinstance(module, GatedExchange) and not module.learned_rank:
        raise ValueError(f"{module.kind} has no open direction (learned rank 0): it edits along none")
    with torch.no_grad():
        basis = module.basis()
        columns = torch.eye(module.d, dtype=torch.float32) if basis is None else basis
        return columns[:, module.is_open().to(columns.device)] if isinstance(module, GatedExchange) else columns


def site_index(reft: ReFT, site: Site | int | None) -> int:
    """The index of a site of `reft`; None stands for its only one.

    Raises:
        ValueError: for None where there are several, or a site that `reft` does not edit.
    """
    sites = ", ".join(f"{i}: {s}" for i, s in enumerate(reft.sites))
    if site is None:
        if len(reft) > 1:
            raise ValueError(f"there are {len(reft)} sites, and the subspace of one is wanted: pass site= ({sites})")
        return 0
    index = site if isinstance(site, int) else next((i for i, s in enumerate(reft.sites) if s == site), -1)
    if not 0 <= index < len(reft):
        raise ValueError(f"site={site} is not among the sites of the intervention ({sites})")
    return index


@dataclass(frozen=True, eq=False)
class Overlap:
    """Each subspace against each; order as given."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    d: int
    overlap: Float[Tensor, "subspaces subspaces"]
    """Mean squared cosine of the principal angles; 1 where one contains the other."""
    angles: tuple[tuple[Float[Tensor, " _"], ...], ...]
    """Principal angles of each pair, in degrees, the smallest first."""
    metric: str = EUCLIDEAN.name
    """In which angles are measured; `d` counts the dimensions that have a length in it."""

    def chance(self, a: int, b: int) -> Chance:
        """Of random subspaces of the ranks of `a` and `b`, uniform in the metric."""
        return chance_overlap(self.d, self.ranks[a], self.ranks[b])

    def to_frame(self) -> DataFrame:
        """One row per pair; angles in degrees, `z` in standard deviations of random subspaces."""
        records = []
        for a, b in self._pairs():
            names = {"a": self.names[a], "b": self.names[b], "rank_a": self.ranks[a], "rank_b": self.ranks[b]}
            overlap = self.chance(a, b).as_columns("overlap", self.overlap[a, b].item())
            angles = {"smallest_angle": self.angles[a][b][0].item(), "largest_angle": self.angles[a][b][-1].item()}
            records.append({**names, **overlap, **angles, "metric": self.metric})
        return figures.table(records)

    def _pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.names)), 2))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Heat map; under each overlap the chance level, mean ± standard deviation of random subspaces."""
        count = len(self.names)
        ax = figures.axes(ax, width=2.4 + 0.9 * count, height=1.6 + 0.7 * count)
        image = ax.imshow(self.overlap, cmap="viridis", vmin=0, vmax=1)
        bar = figures.colour_bar(ax, image, f"mean squared cosine\n{self.metric}; small: chance")
        levels = [self.chance(a, b).mean for a, b in self._pairs()]
        for level in levels if len({round(x, 9) for x in levels}) == 1 else ():
            bar.axhline(level, color="white", linewidth=1.5)
        for a in range(count):
            for b in range(count):
                value, chance = self.overlap[a, b].item(), self.chance(a, b)
                style: dict[str, Any] = {"color": "black" if value > 0.6 else "white", "ha": "center", "va": "center"}
                ax.text(b, a - 0.1, f"{value:.2f}", fontsize=9, **style)
                ax.text(b, a + 0.22, f"{chance.mean:.2g}±{chance.spread:.1g}", fontsize=6, **style)
        labels = [f"{name} ({rank})" for name, rank in zip(self.names, self.ranks, strict=True)]
        ax.set_xticks(range(count), labels, rotation=30, ha="right")
        ax.set_yticks(range(count), self.names)
        ax.set(xlabel=f"subspace (rank) of {self.d} dimensions\n{self.metric}")
        ax.grid(visible=False)
        return ax

    def __repr__(self) -> str:
        lines = []
        for a, b in self._pairs():
            value, chance = self.overlap[a, b].item(), self.chance(a, b)
            lines.append(
                f"{self.names[a]} | {self.names[b]}: overlap {value:.3f}, chance {chance.mean:.3f} ± "
                f"{chance.spread:.3f} (z = {chance.z(value):.1f}), smallest angle {self.angles[a][b][0].item():.1f}°"
            )
        return figures.screenful([f"{self.metric}, {self.d} dimensions", *lines])


def overlap(
    subspaces: Mapping[str, Subspace], *, site: Site | int | None = None, metric: Metric = EUCLIDEAN
) -> Overlap:
    """Overlap `‖UᵀV‖² / min(rank)` and principal angles of each pair (projection kernel of TransformerLens).

    The spans are compared: any basis of a subspace gives the same, and columns that depend on others count once.
    Chance is of subspaces drawn uniformly, `max(rank) / d` on average; trained ones that have nothing to do with each
    other can lie above it where activations fill a few directions only.

    Args:
        subspaces: by name: a `ReFT`, an intervention, a `Direction`, or columns `[d, k]`. Of a `ReFT` with several
            sites each is an entry of its own, unless `site` (itself, or its index) chooses one.
        metric: `causal_metric(model)` compares directions of the residual stream by what they do to the logits: the
            formula is then that of `U` and `V` orthonormal in it, and chance of subspaces drawn uniformly in it (see
            `Metric.effective_dimensions` for those drawn uniformly in the Euclidean one).

    Raises:
        ValueError: for subspaces of different widths, or one that spans nothing; for a site that the metric is not of.
    """
    if not isinstance(subspaces, Mapping):
        raise TypeError(f"subspaces is a {type(subspaces).__name__}, expected {{name: subspace}}")
    columns: dict[str, Tensor] = {}
    for name, subspace in subspaces.items():
        columns |= _columns(name, subspace, site, metric)
    if not columns:
        raise ValueError("subspaces={}, expected one or more by name")
    widths = {name: len(c) for name, c in columns.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"subspaces of different spaces have no angles; they have width {widths}")
    spans = [span(metric.coordinates(c, repr(name)), name=repr(name)) for name, c in columns.items()]
    kernels = [[projection_kernel(a, b) for b in spans] for a in spans]
    overlap = torch.stack([torch.stack([k.score / min(k.rank_a, k.rank_b) for k in row]) for row in kernels])
    angles = tuple(tuple(torch.rad2deg(k.angles) for k in row) for row in kernels)
    return Overlap(tuple(columns), tuple(s.rank for s in spans), spans[0].ambient_dim, overlap, angles, metric.name)


def _columns(name: str, subspace: Subspace, site: Site | int | None, metric: Metric) -> dict[str, Tensor]:
    """What spans a subspace, by name: an entry for each site of a `ReFT` with several."""
    if isinstance(subspace, ReFT):
        wanted = subspace.sites if site is None else [subspace.sites[site_index(subspace, site)]]
        for each in wanted:
            metric.check(each)
        if len(wanted) == 1:
            return {name: columns_of(subspace[wanted[0]])}
        return {f"{name}, {place}": columns_of(module) for place, module in subspace.items()}
    if isinstance(subspace, Intervention):
        return {name: columns_of(subspace)}
    columns = subspace.basis if isinstance(subspace, Direction) else subspace
    if columns.ndim != 2:
        raise ValueError(f"{name!r} has shape {list(columns.shape)}, expected [d, k]: columns that span it")
    return {name: columns}
