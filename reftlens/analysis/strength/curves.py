"""What a dose-response curve says in a few numbers: slope of each example, and the dose of half the effect."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftlens.scoring.statistics import Estimate, mean_of, resampled_means, share_of


@dataclass(frozen=True, eq=False)
class Slopes:
    """Least-squares slope of each example's effect over strength (Tan et al. 2024, arXiv 2407.12404)."""

    values: Float[Tensor, " example"]
    """Nats per target token and unit of strength."""

    @property
    def mean(self) -> Estimate:
        """With a bootstrap interval over examples."""
        return mean_of(self.values)

    @property
    def wrong(self) -> Estimate:
        """Share of examples that a stronger edit moves the wrong way, Clopper-Pearson.

        Slopes within a twentieth of the mean size of all slopes count as not moving.
        """
        return share_of(self.values < -0.05 * self.values.abs().mean())

    @property
    def still(self) -> Estimate:
        """Share of examples that hardly move."""
        return share_of(self.values.abs() <= 0.05 * self.values.abs().mean())

    def __str__(self) -> str:
        return (
            f"slope {self.mean} nats per unit of strength; share that moves the wrong way {self.wrong}, share that "
            f"hardly moves {self.still}"
        )


@dataclass(frozen=True)
class HalfEffect:
    """EC50: the strength at which half of the effect at a reference strength is reached."""

    strength: Estimate
    """NaN where half the effect is never reached; the interval is open (infinite) where resamples do not reach it."""
    reference: float
    """The strength whose effect counts as all of it."""
    half: float
    """Half of the mean effect there."""
    reason: str = ""
    """Why there is none."""

    def __str__(self) -> str:
        return self.reason or f"half of the effect at strength {self.reference:g} is reached at {self.strength}"


def slopes_of(strengths: Sequence[float], effect: Float[Tensor, "strength example"]) -> Slopes:
    """Slopes with an intercept of their own.

    Raises:
        ValueError: for fewer than two different strengths.
    """
    x = torch.tensor(strengths, dtype=torch.float64)
    if len(x.unique()) < 2:
        raise ValueError(f"strengths {list(strengths)}: a slope needs two different ones or more")
    x = x - x.mean()
    return Slopes(x @ effect.double() / x.square().sum())


def half_effect(
    strengths: Sequence[float], effect: Float[Tensor, "strength example"], reference: float, *, seed: int = 0
) -> HalfEffect:
    """Where the mean effect first reaches half of that at `reference`, with a bootstrap interval over examples.

    The curve starts in 0 at strength 0; between measured strengths it is linear, and where it falls it is held (the
    running maximum).

    Raises:
        ValueError: if the effect at `reference` was not measured, or it is 0.
    """
    if reference == 0.0 or reference not in strengths:
        raise ValueError(f"reference={reference:g}, expected one of the strengths that is not 0: {list(strengths)}")
    measured = sorted((s / reference, i) for i, s in enumerate(strengths) if 0 < s / reference <= 1)
    share = torch.tensor([0.0, *(s for s, _ in measured)], dtype=torch.float64)
    curve = effect[[i for _, i in measured]].double()
    curve = torch.cat([torch.zeros_like(curve[:1]), curve])
    count = curve.shape[1]
    means = torch.cat([curve.mean(dim=1)[None], resampled_means(curve.T, "half effect", seed)])
    crossings = _crossing(share, means)
    half = means[0, -1].item() / 2
    if crossings[0].isinf():
        reason = f"the mean effect at strength {reference:g} is {2 * half:.3g}: there is no half of it to reach"
        return HalfEffect(Estimate(torch.nan, torch.nan, torch.nan, count), reference, half, reason)
    low = torch.quantile(crossings[1:], 0.025, interpolation="lower").item() * reference
    high = torch.quantile(crossings[1:], 0.975, interpolation="higher").item() * reference
    value = crossings[0].item() * reference
    return HalfEffect(Estimate(value, min(low, high), max(low, high), count), reference, half)


def _crossing(share: Float[Tensor, " points"], means: Float[Tensor, "curves points"]) -> Float[Tensor, " curves"]:
    """Where each curve's running maximum first reaches half of the curve's last value; ∞ if that is not above 0."""
    half, highest = means[:, -1:] / 2, means.cummax(dim=1).values
    after = (highest >= half).long().argmax(dim=1, keepdim=True).clamp(min=1)
    y0, y1 = highest.gather(1, after - 1), highest.gather(1, after)
    x0, x1 = share[after - 1], share[after]
    crossing = x0 + (x1 - x0) * (half - y0) / (y1 - y0).clamp_min(1e-300)
    return torch.where(half > 0, crossing, torch.inf)[:, 0]


def not_dominated(costs: Float[Tensor, "point cost"]) -> Bool[Tensor, " point"]:
    """Which points no other is as good as in every cost and better in one."""
    no_worse = (costs[None] <= costs[:, None]).all(dim=-1)
    better = (costs[None] < costs[:, None]).any(dim=-1)
    return ~(no_worse & better).any(dim=1)
