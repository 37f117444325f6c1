"""Fixed directions from labelled activations, one call each: what a trained subspace is to be compared with.

Each raises `ValueError` for activations that are no `[examples, d]`, labels or pairs that do not match them, and fewer
directions in the data than are to be taken, and `NotFinite` for NaN or infinity.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.tools.analysis.interchange import random_basis

from reftlens import figures
from reftlens.analysis.subspaces.labelled import Activations, Labels, checked, class_means, paired_differences
from reftlens.bridge.protocol import Bridge, gradients_on
from reftlens.cone.reuse import Reuse
from reftlens.editing.reading import activations
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.fixed import Ablation, SteeringVector
from reftlens.interventions.interchange import DAS
from reftlens.interventions.pooled import ReFTr1
from reftlens.scoring.statistics import shrunk_covariance
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit


@dataclass(frozen=True, eq=False)
class Direction:
    """A fixed subspace of activations, and how far examples lie apart along it."""

    name: str
    basis: Float[Tensor, "d rank"]
    """Orthonormal columns, the most telling first, each pointing towards the later class."""
    scale: Float[Tensor, " rank"]
    """Distance of the class means along each column, or the standard deviation where there are no classes."""
    threshold: float = 0.0
    """Of ReFT-r1: below it along the first column, nothing is detected."""

    def as_steering(self) -> SteeringVector:
        """Adds the first direction, as long as its scale."""
        return SteeringVector(len(self.basis), (self.basis[:, 0] * self.scale[0]).float())

    def as_exchange(self) -> DAS:
        """Exchanges the coordinates in this subspace; not trained unless `fit` is called on it."""
        return DAS(len(self.basis), basis=self.basis)

    def as_ablation(self, reference: Float[Tensor, " d"] | None = None) -> Ablation:
        """Sets the coordinates in this subspace to those of `reference`, or to zero."""
        d = len(self.basis)
        return Ablation(
            d, torch.zeros(d, dtype=torch.float32) if reference is None else reference.float(), self.basis.float()
        )

    def to_frame(self) -> DataFrame:
        """One row per direction."""
        return figures.table({"name": self.name, "scale": self.scale.tolist()}, "direction")

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """How far examples lie apart along each direction."""
        ax = figures.axes(ax)
        name = figures.entry(ax, label or self.name)
        ax.plot(self.scale.tolist(), color=color, marker="o", linestyle="", label=name)
        ax.set(xlabel=f"direction ({self.name})", ylabel="scale (in units of the activations)", ylim=(0, None))
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        scales = ", ".join(f"{scale:.3g}" for scale in self.scale.tolist()[:8]) + ", …" * (len(self.scale) > 8)
        return f"{self.name}: {self.basis.shape[1]} of {len(self.basis)} dimensions, scale {scales}"


def difference_of_means(x: Activations, labels: Labels) -> Direction:
    """Span of the class means about their centre: `mean₁ - mean₀` for two classes, rank `classes - 1` for more.

    Several classes: singular directions of the centred means, the widest spread first.

    Args:
        x: one row for each label, such as `activations(model, batch, resid_post(15, "last"))`.
        labels: classes in the order of their numbers, or of the alphabet: with `"bad"` and `"good"`, towards good.
    """
    _, means = class_means(x, labels)
    return _directed("difference of means", (means - means.mean(dim=0)).T, means)


def caa(positive: Activations, negative: Activations) -> Direction:
    """Mean of paired differences (contrastive activation addition, Rimsky et al. 2023, arXiv 2312.06681)."""
    mean = paired_differences(positive, negative).mean(dim=0)
    norm = mean.norm()
    if norm == 0:
        raise ValueError("the pairs do not differ on average: no direction")
    return Direction("CAA", (mean / norm)[:, None], norm[None])


def pca(x: Activations, rank: int = 1) -> Direction:
    """Principal components of centred activations; the largest entry of each is positive."""
    data = checked(x)
    return _components("PCA", data - data.mean(dim=0), rank, len(data))


def repe(positive: Activations, negative: Activations, rank: int = 1) -> Direction:
    """Principal components of paired differences, not centred (RepE reading vectors, Zou et al. 2023, 2310.01405).

    Each points from negative to positive.
    """
    differences = paired_differences(positive, negative)
    components = _components("RepE", differences, rank, len(differences))
    sign = torch.where(components.basis.T @ differences.mean(dim=0) < 0, -1.0, 1.0).double()
    return replace(components, basis=components.basis * sign)


def linear_probe(x: Activations, labels: Labels, *, l2: float = 1e-3) -> Direction:
    """Weights of a logistic regression on standardised length, L2-penalised, made orthonormal.

    Minimises mean cross-entropy + `l2`·‖W‖²/2 by L-BFGS in float64 from zero, so that the result is unique. With more
    than two classes: the span of the centred class weights.
    """
    classes, means = class_means(x, labels)
    data = checked(x)
    centre, size = data.mean(dim=0), data.std(dim=0).mean().clamp_min(1e-12)
    z, target = (data - centre) / size, classes
    weight = torch.zeros(data.shape[1], len(means), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(means), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with gradients_on():
            loss = F.cross_entropy(z @ weight + bias, target) + l2 * weight.square().sum() / 2
            loss.backward()
        return loss

    optimizer.step(closure)
    return _directed("linear probe", (weight - weight.mean(dim=1, keepdim=True)).detach(), means)


def lda(x: Activations, labels: Labels, *, shrinkage: float = 0.1) -> Direction:
    """Fisher's discriminant, span of `Σ⁻¹ (means - centre)`, with `Σ` the within-class covariance.

    `Σ = (1 - shrinkage) S + shrinkage · tr(S)/d · I`.
    """
    classes, means = class_means(x, labels)
    within = checked(x) - means[classes]
    if not within.any():
        raise ValueError("the activations of a class are all the same: no covariance within the classes")
    covariance = shrunk_covariance(within, len(within) - len(means), shrinkage)
    return _directed("LDA", torch.linalg.solve(covariance, (means - means.mean(dim=0)).T), means)


def random_subspace(d: int, rank: int = 1, *, seed: int = 0) -> Direction:
    """A subspace drawn uniformly; its scale is 1."""
    return Direction("random", random_basis(d, rank, seed).double(), torch.ones(rank, dtype=torch.float64))


def mean_ablation(x: Activations) -> Ablation:
    """Sets the whole vector to the mean of `x`."""
    mean = checked(x).mean(dim=0).float()
    return Ablation(len(mean), mean)


def _components(name: str, x: Float[Tensor, "n d"], rank: int, count: int) -> Direction:
    if not 1 <= rank <= min(x.shape):
        raise ValueError(f"rank={rank}, expected 1 to {min(x.shape)} for {count} examples of width {x.shape[1]}")
    _, spread, right = torch.linalg.svd(x, full_matrices=False)
    _check_spread(spread, rank, "the examples")
    basis = right[:rank].T
    peak = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return Direction(name, basis * torch.where(peak < 0, -1.0, 1.0).double(), spread[:rank] / count**0.5)


def _directed(name: str, columns: Float[Tensor, "d classes"], means: Float[Tensor, "classes d"]) -> Direction:
    """The span of columns that sum to nothing, widest first, each direction pointing from the first classes on."""
    basis, spread, _ = torch.linalg.svd(columns, full_matrices=False)
    _check_spread(spread, len(means) - 1, "the classes")
    basis = basis[:, : len(means) - 1]
    along = means @ basis
    ranks = torch.arange(len(means), dtype=torch.float64) - (len(means) - 1) / 2
    basis = basis * torch.where(ranks @ along < 0, -1.0, 1.0).double()
    return Direction(name, basis, along.amax(dim=0) - along.amin(dim=0))


def _check_spread(spread: Float[Tensor, " k"], rank: int, what: str) -> None:
    """Raise where rounding alone would choose some of `rank` directions."""
    wide = int((spread > 1e-6 * spread.max().clamp_min(torch.finfo(torch.float64).tiny)).sum())
    if wide < rank:
        raise ValueError(f"{what} differ along {wide} direction(s), and {rank} are to be taken: the rest is noise")


_CONFIG = FitConfig(epochs=3, lr=1e-2, batch_size=6)


def reft_r1(
    model: Bridge,
    positive: Batch,
    negative: Batch,
    site: Site,
    *,
    k: int = 8,
    sparsity: float = 5e-3,
    config: FitConfig = _CONFIG,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Direction:
    """Train `ReFTr1` at `site` on examples with a concept and without (AxBench, Wu et al. 2025, arXiv 2501.17148).

    Its scale is the largest `relu(h·w + b)` at the positive examples, the unit of strength of that benchmark, and its
    `threshold` is `-b`: `relu(x @ basis - threshold)` says how much of the concept is in activations `x`. The default
    settings are the benchmark's.

    Args:
        positive: prompts about the concept, with completions that show it.
        negative: prompts and completions without it.

    Raises:
        ValueError: for a site that reaches past the prompt, as `fit`, and where nothing in the positive examples
            excites the direction.
    """
    x = activations(model, positive, site, progress=False)
    module = ReFTr1(x.shape[1], k=k, sparsity=sparsity, generator=torch.Generator().manual_seed(config.seed))
    reft = ReFT({site: module})
    fit(reft, model, Batch.join([positive, negative]), config, reuse=reuse, progress=progress)
    with torch.no_grad():
        largest = module.cpu().latents(x).max().double()
    if largest == 0:
        raise ValueError("the trained direction is not excited by any positive example: train longer, or elsewhere")
    return Direction("ReFT-r1", module.frame().detach().double(), largest[None], -module.b.item())
