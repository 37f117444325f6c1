"""The principal frame: the principal axes of the edit over a data set, so that "direction 0" means something."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reftlens import figures
from reftlens.analysis.subspaces.geometry import site_index
from reftlens.analysis.subspaces.recorded import SiteEdits, edits_of
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class SiteFrame:
    """The principal frame of one site."""

    edits: SiteEdits
    """The edited tokens that it is the frame of."""
    basis: Float[Tensor, "d k"]
    """Orthonormal axes, the one along which the edit is largest first, each towards the mean edit."""
    rotation: Float[Tensor, "rank k"]
    """`basis` of the intervention `@ rotation` is the principal one; orthogonal for an orthonormal frame."""
    singular_values: Float[Tensor, " k"]
    """Of the matrix of edits `[tokens, d]`, not centred: its spectrum."""

    @property
    def site(self) -> Site:
        return self.edits.site

    @property
    def tokens(self) -> int:
        """How many tokens are edited."""
        return len(self.edits.rows)

    @property
    def mean_square(self) -> Float[Tensor, " k"]:
        """Mean squared edit along each axis, in squared units of the hidden state."""
        return self.singular_values.square() / self.tokens

    @property
    def shares(self) -> Float[Tensor, " k"]:
        """Of the mean squared edit; they sum to 1."""
        return self.mean_square / self.mean_square.sum()

    @property
    def effective_rank(self) -> float:
        """Participation ratio `(Σ λ)² / Σ λ²` of the mean squared edits λ: 1 if all edits are parallel."""
        return 1 / self.shares.square().sum().item()

    @property
    def entropy_rank(self) -> float:
        """`exp(-Σ p ln p)` of the shares p; as Roy and Vetterli 2007, who take singular values in place of λ."""
        return math.exp(torch.special.entr(self.shares).sum().item())


@dataclass(frozen=True, eq=False)
class PrincipalFrame:
    """The principal frames of an intervention, site by site."""

    sites: tuple[SiteFrame, ...]

    @property
    def data(self) -> Batch:
        """What the edits were read over."""
        return self.sites[0].edits.data

    @property
    def bases(self) -> dict[Site, Float[Tensor, "d k"]]:
        """The principal basis of each site."""
        return {frame.site: frame.basis for frame in self.sites}

    def __getitem__(self, site: Site | int) -> SiteFrame:
        """The frame of a site, given itself or by its index."""
        return self.sites[site if isinstance(site, int) else index_of([s.site for s in self.sites], site, "site")]

    def to_frame(self) -> DataFrame:
        """One row per site and direction; `rms` is the root mean squared edit along it, in the hidden state's units."""
        names, records = ("rms", "singular_value", "share", "cumulative"), []
        for frame in self.sites:
            ranks = {"effective_rank": frame.effective_rank, "entropy_rank": frame.entropy_rank}
            columns = frame.mean_square.sqrt(), frame.singular_values, frame.shares, frame.shares.cumsum(dim=0)
            for i, values in enumerate(torch.stack(columns, dim=1).tolist()):
                place = {"site": str(frame.site), "direction": i}
                records.append(place | dict(zip(names, values, strict=True)) | ranks)
        return figures.table(records)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """Share of the mean squared edit along each direction; dashed: an edit that is the same along all."""
        ax = figures.axes(ax)
        for frame in self.sites:
            name = figures.entry(ax, label, f"{frame.site}: effective rank {frame.effective_rank:.2f}")
            ax.plot(frame.shares.tolist(), marker="o", markersize=4, color=color, label=name)
            figures.level(ax, 1 / len(frame.shares))
        ax.set(xlabel="direction (principal axis of the edit)", ylabel="share of the mean squared edit", ylim=(0, 1.05))
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        lines = []
        for frame in self.sites:
            shares = ", ".join(f"{100 * s:.0f} %" for s in frame.shares[:8].tolist())
            lines.append(f"{frame.site}: effective rank {frame.effective_rank:.2f} of {len(frame.shares)} ({shares})")
        return "\n".join(lines)


def principal_frame(
    reft: ReFT, model: Bridge, data: Batch, *, batch_size: int = 16, progress: bool = True
) -> PrincipalFrame:
    """Principal axes of the edit `code @ basisᵀ` over the edited tokens of `data`, not centred.

    A frame and any rotation of it edit alike, and have the same principal frame. Where the edit along several axes is
    equally large, these are any axes of the space that they span; where it is nothing, too.

    Raises:
        ValueError: if a site chooses no token of `data` or edits nothing there, or an exchange has no source.
    """
    recorded = edits_of(reft, model, data, batch_size=batch_size, progress=progress)
    return PrincipalFrame(tuple(frame_of(edits) for edits in recorded))


def frame_of(recorded: SiteEdits) -> SiteFrame:
    """The principal frame of one site."""
    small = torch.linalg.qr(recorded.edits, mode="r").R  # the same singular values and axes, without the tokens
    _, values, right = torch.linalg.svd(small, full_matrices=True)
    count = len(recorded.rows)
    if not values[0] > 0:
        raise ValueError(f"{recorded.site}: the edit is zero at all {count} tokens, so it has no principal axes")
    axes = right.T
    mean = recorded.edits.mean(dim=0) @ axes
    peak = (recorded.span @ axes).gather(0, (recorded.span @ axes).abs().argmax(dim=0, keepdim=True))[0]
    towards = torch.where(mean.abs() > 1e-9 * values[0] / count**0.5, mean, peak)
    basis = recorded.span @ (axes * torch.where(towards < 0, -1.0, 1.0).double())
    spectrum = F.pad(values, (0, len(axes) - len(values)))
    return SiteFrame(recorded, basis, torch.linalg.pinv(recorded.basis) @ basis, spectrum)


def site_frame(
    reft: ReFT,
    model: Bridge,
    data: Batch | PrincipalFrame,
    site: Site | int | None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> SiteFrame:
    """The principal frame of one site, read over `data` unless that has been done; None stands for the only site.

    Raises:
        ValueError: for the frame of other sites, and as `principal_frame`.
    """
    index = site_index(reft, site)
    if isinstance(data, Batch):
        return frame_of(edits_of(reft, model, data, batch_size=batch_size, progress=progress)[index])
    if tuple(data.bases) != reft.sites:
        raise ValueError(f"a frame of {', '.join(map(str, data.bases))}, expected {', '.join(map(str, reft.sites))}")
    return data[index]


def directions_of(width: int, directions: Sequence[int] | None) -> list[int]:
    """Those of `width` directions that are named; all where none are, 16 at most.

    Raises:
        ValueError: for none, or one that is not there.
    """
    indices = list(range(min(16, width))) if directions is None else list(directions)
    if not indices or not all(0 <= i < width for i in indices):
        raise ValueError(f"directions={indices}, expected some of 0 to {width - 1}")
    return indices
