"""How far edited activations lie from natural ones, and how far natural ones lie from each other."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens import figures
from reftlens.analysis.subspaces.recorded import read_edited
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.figures import Axes, DataFrame
from reftlens.numbers import seeded, whole
from reftlens.scoring.statistics import holm, shrunk_covariance
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class SiteDistance:
    """Edited against natural activations at one site."""

    site: Site
    edited: Float[Tensor, " tokens"]
    """Mahalanobis distance of each edited activation over `√d`, about 1 or 2 for natural ones."""
    natural: Float[Tensor, " tokens"]
    """The same of those tokens unedited; mean and covariance come from other rows."""
    energy: float
    """Energy distance of edited activations from natural ones of other rows."""
    null: Float[Tensor, " splits"]
    """Energy distance of natural activations from natural ones, for random halves of the rows."""

    @property
    def percentiles(self) -> Float[Tensor, " tokens"]:
        """Share of natural distances at or below each edited one, 0 to 100; evenly spread for natural activations."""
        ordered = self.natural.sort().values
        return 100 * torch.searchsorted(ordered, self.edited, right=True).double() / len(ordered)

    @property
    def p(self) -> float:
        """`(1 + #{null ≥ energy}) / (1 + splits)`: how often natural halves differ as much."""
        return (1 + int((self.null >= self.energy).sum())) / (1 + len(self.null))

    @property
    def ratio(self) -> float:
        """Energy distance over the mean of the null: 1 for natural activations."""
        return self.energy / self.null.mean().item()

    @property
    def beyond(self) -> float:
        """Share of edited activations farther out than 95 % of the natural ones; 0.05 for natural ones."""
        return (self.percentiles > 95).double().mean().item()


@dataclass(frozen=True, eq=False)
class ManifoldDistance:
    """One entry for each site."""

    rows: tuple[SiteDistance, ...]
    strength: float

    @property
    def p(self) -> Float[Tensor, " sites"]:
        """Of each site, corrected for their number (Holm)."""
        return holm(torch.tensor([row.p for row in self.rows], dtype=torch.float64))

    def to_frame(self) -> DataFrame:
        """One row per site."""
        records = []
        for row, corrected in zip(self.rows, self.p.tolist(), strict=True):
            tokens = {"strength": self.strength, "tokens": len(row.edited)}
            percentiles = {"median_percentile": row.percentiles.median().item(), "beyond_95": row.beyond}
            energy = {"energy": row.energy, "natural_energy": row.null.mean().item(), "ratio": row.ratio}
            records.append({"site": str(row.site), **tokens, **percentiles, **energy, "p": row.p, "p_holm": corrected})
        return figures.table(records, "site")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the percentiles, one line per site; grey: natural activations, by construction even."""
        ax = figures.axes(ax)
        bins = list(range(0, 101, 10))
        even = {"weights": [0.1] * 10, "color": figures.GREY, "alpha": 0.4}
        ax.hist([b + 5 for b in bins[:-1]], bins=bins, label="natural", **even)
        for i, row in enumerate(self.rows):
            line = {"color": (figures.ORANGE, figures.BLUE, figures.GREEN)[i % 3], "linewidth": 1.5}
            weights = [1 / len(row.edited)] * len(row.edited)
            ax.hist(
                row.percentiles.tolist(), bins, weights=weights, histtype="step", label=f"edited: {row.site}", **line
            )
        ax.set(xlabel="percentile among natural activations (Mahalanobis distance)", ylabel="share of tokens")
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        lines = []
        for row, corrected in zip(self.rows, self.p.tolist(), strict=True):
            verdict = "off the natural manifold" if corrected < 0.05 else "no sign of leaving the natural manifold"
            if corrected >= 0.05 and row.beyond > 0.25:
                verdict = "one by one farther out than natural ones, as a whole not shown to be: no verdict"
            lines.append(
                f"{row.site}: median percentile {row.percentiles.median().item():.0f}, {100 * row.beyond:.0f} % beyond "
                f"the natural 95th; {row.ratio:.1f} times as far from natural activations as they are from each other "
                f"(p = {corrected:.2g}): {verdict}"
            )
        return figures.screenful(lines)


@torch.no_grad()
def manifold_distance(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    strength: float = 1.0,
    shrinkage: float = 0.1,
    splits: int = 999,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> ManifoldDistance:
    """Distance of edited activations from natural ones at each site, with natural against natural as the null.

    The rows are split in two halves by `seed`. Edited activations of one half are compared with the natural ones of
    the other, so that an edit is judged as an unseen natural row would be:

    - Mahalanobis distance `√((h - μ)ᵀ Σ⁻¹ (h - μ) / d)`, `Σ = (1 - shrinkage) S + shrinkage · tr(S)/d · I`; percentile
      among the same tokens unedited.
    - energy distance `2 E‖x - y‖ - E‖x - x'‖ - E‖y - y'‖` (Székely and Rizzo 2013), each coordinate in units of its
      standard deviation over both halves; null: the same for `splits` random halves of the natural rows.

    An edit may be off the manifold and right, or on it and wrong: this says only whether the model has met such
    activations on `data`. Pairwise distances are kept: memory grows with the square of the tokens.

    Args:
        data: prompts, with sources for an exchange; what is natural is what the unedited model holds there.

    Raises:
        ValueError: for fewer than four rows with an edited token at a site.
    """
    splits = whole(splits, "splits", 1, hint=" (999 for a p of 0.001)")
    natural, edited = (
        read_edited(reft, model, data, Variant(number), batch_size=batch_size, progress=progress)
        for number in (0.0, strength)
    )
    rows = []
    for site, x, y in zip(reft.sites, natural, edited, strict=True):
        owner = site.positions.mask(data.view).nonzero()[:, 0].cpu()
        rows.append(_site_distance(site, x, y, owner, shrinkage, splits, seed))
    return ManifoldDistance(tuple(rows), strength)


def _site_distance(
    site: Site,
    natural: Float[Tensor, "tokens d"],
    edited: Float[Tensor, "tokens d"],
    owner: Int[Tensor, " tokens"],
    shrinkage: float,
    splits: int,
    seed: int,
) -> SiteDistance:
    """The distances of one site; `owner` says which row each token is of, rows are split as a whole."""
    rows, which = owner.unique(return_inverse=True)
    if len(rows) < 4:
        raise ValueError(f"{site} is edited in {len(rows)} row(s), and four or more are needed to split natural ones")
    generator = seeded(seed)
    drawn = torch.rand(splits + 1, len(rows), generator=generator, dtype=torch.float64)
    halves = (drawn.argsort(dim=1) < len(rows) // 2)[:, which]
    mine = halves[0]
    energy = _energies(torch.where(mine[:, None], edited, natural), halves[:1])[0].item()
    null = _energies(natural, halves[1:])
    of_edited, of_natural = (_mahalanobis(x[mine], natural[~mine], shrinkage) for x in (edited, natural))
    return SiteDistance(site, of_edited, of_natural, energy, null)


def _energies(x: Float[Tensor, "n d"], halves: Bool[Tensor, "splits n"]) -> Float[Tensor, " splits"]:
    """Energy distance between the tokens in each half and the others, coordinates in standard deviations of all."""
    scaled = x / x.std(dim=0).clamp_min(1e-12)
    apart = torch.cdist(scaled, scaled)
    inside, outside = (mask.double() / mask.sum(dim=1, keepdim=True) for mask in (halves, ~halves))
    to_inside, to_outside = inside @ apart, outside @ apart
    return (2 * to_inside * outside - to_inside * inside - to_outside * outside).sum(dim=1)


def _mahalanobis(x: Float[Tensor, "n d"], others: Float[Tensor, "m d"], shrinkage: float) -> Float[Tensor, " n"]:
    """Distance of `x` from the mean of others in their shrunk covariance, over `√d`."""
    mean = others.mean(dim=0)
    factor = torch.linalg.cholesky(shrunk_covariance(others - mean, len(others) - 1, shrinkage))
    return torch.linalg.solve_triangular(factor, (x - mean).T, upper=False).norm(dim=0) / x.shape[1] ** 0.5
