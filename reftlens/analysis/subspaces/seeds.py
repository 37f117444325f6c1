"""Whether seeds find one subspace, and how the frame gets there during training; beside the chance level."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis.projection_kernel import SubspaceBasis, projection_kernel

from reftlens import figures
from reftlens.analysis.subspaces.geometry import Chance, chance_overlap, columns_of, overlap_of, span
from reftlens.analysis.subspaces.metrics import EUCLIDEAN, Metric
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame
from reftlens.numbers import whole
from reftlens.scoring.statistics import Estimate, student_t
from reftlens.training.run import Step


@dataclass(frozen=True, eq=False)
class SiteStability:
    """One site over several seeds."""

    site: Site
    overlaps: Float[Tensor, " pairs"]
    """Of each pair of seeds: (0, 1), (0, 2), …, (1, 2), …"""
    mean: Estimate
    """Mean over pairs; the interval counts seeds (jackknife), and is NaN for fewer than three."""
    chance: Chance
    """Of one pair of random subspaces."""

    @property
    def z(self) -> float:
        """Of the mean, against as many random subspaces, whose pairs are uncorrelated."""
        return self.chance.z(self.mean.value) * len(self.overlaps) ** 0.5


@dataclass(frozen=True)
class Stability:
    """Overlap between seeds, site by site."""

    sites: tuple[SiteStability, ...]
    metric: str = EUCLIDEAN.name

    def to_frame(self) -> DataFrame:
        """One row per site."""
        records = []
        for s in self.sites:
            chance = {"chance": s.chance.mean, "chance_sd": s.chance.spread, "z": s.z}
            place = {"site": str(s.site), "seeds": s.mean.count}
            records.append({**place, **s.mean.as_columns("overlap"), **chance, "metric": self.metric})
        return figures.table(records, "site")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Every pair of seeds as a dot, their mean with its interval; grey: random subspaces ± 2 deviations."""
        ax = figures.axes(ax, width=6.4, height=0.6 * len(self.sites) + 1.4)
        for y, s in enumerate(self.sites):
            low, high = s.chance.mean - 2 * s.chance.spread, s.chance.mean + 2 * s.chance.spread
            ax.plot([max(0.0, low), min(1.0, high)], [y, y], color=figures.GREY, linewidth=6, alpha=0.5)
            ax.scatter(s.overlaps.tolist(), [y] * len(s.overlaps), s=12, color=figures.BLUE, alpha=0.5)
            figures.interval(ax, y, s.mean, color=figures.ORANGE, marker="D", horizontal=True)
        ax.set_yticks(range(len(self.sites)), [figures.short(s.site) for s in self.sites])
        ax.set(xlabel=f"overlap between seeds (mean squared cosine)\n{self.metric}", xlim=(-0.02, 1.02))
        ax.set_ylim(len(self.sites) - 0.5, -0.5)
        handles = [ax.lines[0], ax.collections[0], ax.containers[0]]
        ax.legend(handles, ["chance ± 2 sd", "pair of seeds", "mean, 95 % interval"], frameon=False, fontsize=7)
        return ax

    def __repr__(self) -> str:
        return "\n".join(
            f"{s.site}: overlap of {s.mean.count} seeds {s.mean} ({self.metric}), "
            f"chance {s.chance.mean:.3f} ± {s.chance.spread:.3f} (z = {s.z:.1f})"
            for s in self.sites
        )


def stability(runs: Mapping[str, ReFT] | Sequence[ReFT], *, metric: Metric = EUCLIDEAN) -> Stability:
    """Mean overlap of the learned subspaces over pairs of seeds, site by site.

    The interval is from the jackknife over seeds (a mean over pairs is a U-statistic: Arvesen 1969) and Student's t.

    Args:
        runs: trained from several seeds, all with the same sites: `fit_many(reft.seeds([0, 1, 2]), …)` trains them.
        metric: see `overlap`.

    Raises:
        ValueError: for fewer than two, other sites, or a site that the metric is not of.
    """
    refts = list(runs.values() if isinstance(runs, Mapping) else runs)
    if len(refts) < 2:
        raise ValueError(f"{len(refts)} run(s), expected two or more to compare: fit_many trains several")
    for reft in refts[1:]:
        if reft.sites != refts[0].sites:
            raise ValueError(
                f"the runs have other sites ({', '.join(map(str, reft.sites))} and "
                f"{', '.join(map(str, refts[0].sites))}): compare them by overlap"
            )
    for site in refts[0].sites:
        metric.check(site)
    spans = {s: [span(metric.coordinates(columns_of(r[s]))) for r in refts] for s in refts[0].sites}
    return Stability(tuple(_site(site, every) for site, every in spans.items()), metric.name)


def _site(site: Site, spans: list[SubspaceBasis]) -> SiteStability:
    pairs = list(combinations(range(len(spans)), 2))
    overlaps = torch.tensor([overlap_of(spans[a], spans[b]) for a, b in pairs], dtype=torch.float64)
    levels = [chance_overlap(spans[a].ambient_dim, spans[a].rank, spans[b].rank) for a, b in pairs]
    # Equal for all pairs, unless gates opened to other widths.
    chance = Chance(fmean(c.mean for c in levels), fmean(c.spread**2 for c in levels) ** 0.5)
    return SiteStability(site, overlaps, _jackknifed(overlaps, pairs, len(spans)), chance)


def _jackknifed(overlaps: Float[Tensor, " pairs"], pairs: list[tuple[int, int]], count: int) -> Estimate:
    value = overlaps.mean().item()
    if count < 3:
        return Estimate(value, math.nan, math.nan, count)
    without = torch.stack([overlaps[[i not in pair for pair in pairs]].mean() for i in range(count)])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt().item()
    reach = error * student_t(count - 1)
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach), count)


class FramePath:
    """Records the subspaces of an intervention as it trains: `path = FramePath(reft)`, `fit(…, on_step=path)`.

    The first frame is that of the moment when the path is made, the last that of the last step seen.

    Args:
        every: optimizer steps from one recorded frame to the next.
        metric: in which overlaps and angles are, see `overlap`.
    """

    def __init__(self, reft: ReFT, *, every: int = 10, metric: Metric = EUCLIDEAN) -> None:
        self.every, self.sites, self.metric = whole(every, "every", 1), reft.sites, metric
        for site in reft.sites:
            metric.check(site)
        self._frames: dict[int, list[SubspaceBasis]] = {0: _spans(reft)}
        self._latest = 0

    def __call__(self, step: Step) -> None:
        if self._latest % self.every and self._latest != step.step:
            del self._frames[self._latest]  # it stood here only as long as it was the last
        self._frames[step.step], self._latest = _spans(step.reft), step.step

    @property
    def steps(self) -> list[int]:
        """Optimizer steps done at each recorded frame."""
        return sorted(self._frames)

    def bases(self, site: int = 0) -> Float[Tensor, "steps d rank"]:
        """The recorded frames of a site, orthonormal, by its index."""
        return torch.stack([self._frames[n][site].basis for n in self.steps])

    def overlap(self, other: int = -1, *, site: int = 0) -> Float[Tensor, " steps"]:
        """Of each recorded frame with the last one, or with that of another place in `steps`: 0 is the first."""
        fixed = self._span(self.steps[other], site)
        overlaps = [overlap_of(self._span(n, site), fixed) for n in self.steps]
        return torch.tensor(overlaps, dtype=torch.float64)

    def to_frame(self) -> DataFrame:
        """One row per site and recorded step; `largest_angle` is to the last frame, in degrees."""
        records = []
        for i, site in enumerate(self.sites):
            last, chance = self._span(self.steps[-1], i), {"chance": self._chance(i).mean}
            to_first, to_last = (self.overlap(other, site=i).tolist() for other in (0, -1))
            for n, step in enumerate(self.steps):
                angle = torch.rad2deg(projection_kernel(self._span(step, i), last).angles.max()).item()
                overlaps = {"to_first": to_first[n], "to_last": to_last[n], "largest_angle": angle}
                records.append({"site": str(site), "step": step, **overlaps, **chance, "metric": self.metric.name})
        return figures.table(records)

    def __repr__(self) -> str:
        last = self.steps[-1]
        lines = [f"{len(self.steps)} frames, of optimizer steps 0 to {last} ({self.metric.name})"]
        for i, site in enumerate(self.sites):
            share = self.overlap(0, site=i)[-1].item()
            lines.append(f"{site}: overlap of the last with the first {share:.3f}, chance {self._chance(i).mean:.3f}")
        return figures.screenful(lines)

    def _span(self, step: int, site: int) -> SubspaceBasis:
        frame = self._frames[step][site]
        return frame if self.metric.root is None else span(self.metric.coordinates(frame.basis))

    def _chance(self, site: int) -> Chance:
        last = self._span(self.steps[-1], site)
        return chance_overlap(last.ambient_dim, last.rank, last.rank)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """Overlap with the last frame (solid) and with the first (dotted) over the steps; dashed: chance."""
        ax = figures.axes(ax)
        for i, site in enumerate(self.sites):
            to_first, to_last = (self.overlap(other, site=i).tolist() for other in (0, -1))
            last, first = (f"{figures.short(site)}: with the {which}" for which in ("last", "first"))
            (line,) = ax.plot(self.steps, to_last, color=color, label=figures.entry(ax, label, last))
            style = {"color": line.get_color(), "linestyle": ":"}
            ax.plot(self.steps, to_first, **style, label=figures.entry(ax, label, first))
            figures.level(ax, self._chance(i).mean)
        ax.set(xlabel="optimizer step", ylabel=f"overlap (mean squared cosine)\n{self.metric.name}", ylim=(-0.02, 1.02))
        ax.legend(frameon=False, fontsize=7)
        return ax


def _spans(reft: ReFT) -> list[SubspaceBasis]:
    return [span(columns_of(module), name=f"the basis of {module.kind} at {site}") for site, module in reft.items()]
