"""The dose that spends a budget of divergence from the unedited model, found in a few evaluations."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.statistics import Estimate, mean_of
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.editing.site import Where
from reftlens.scoring.responses import responses
from reftlens.text.batch import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Dose:
    """A strength and what it costs: mean per-token KL(edited ‖ unedited) on the data."""

    strength: float
    """Relative to the edit as trained."""
    budget: float
    """Nats per token."""
    kl: Float[Tensor, " example"]
    """Mean over the example's target tokens, nats per token."""
    effect: Float[Tensor, " example"]
    """Log-probability of the targets gained, nats per target token."""
    evaluations: tuple[tuple[float, float], ...]
    """Every `(strength, mean KL)` that was measured, in order."""
    problem: str = ""
    """Why the budget is not met, or ""."""

    @property
    def cost(self) -> Estimate:
        """Mean KL, bootstrapped over examples."""
        return mean_of(self.kl)

    def to_frame(self) -> "DataFrame":
        """One row per evaluation."""
        import pandas as pd

        return pd.DataFrame(self.evaluations, columns=["strength", "kl"]).rename_axis("evaluation")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """KL over strength, both on logarithmic scales: what was measured, and the budget."""
        ax = figures.axes(ax)
        x, y = zip(*((abs(s), kl) for s, kl in sorted(self.evaluations, key=lambda e: abs(e[0]))), strict=True)
        ax.plot(x, y, color=figures.BLUE, marker="o", label="evaluation")
        ax.axhline(self.budget, color=figures.GREY, linestyle="--", linewidth=1, label="budget")
        ax.plot([abs(self.strength)], [self.kl.mean().item()], color=figures.ORANGE, marker="o", label="dose")
        ax.set(xscale="log", yscale="log", xlabel="|strength| (1: as trained)", ylabel="KL (nats per token)")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        said = f"strength {self.strength:.4g} costs {self.kl.mean().item():.4g} of {self.budget:g} nats per token"
        return f"{said}; effect {mean_of(self.effect)} nats per target token{'; ' * bool(self.problem)}{self.problem}"


def largest_dose(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    budget: float,
    *,
    high: float = 10.0,
    tolerance: float = 0.02,
    evaluations: int = 6,
    among: Where | None = None,
    sites: Sequence[int] | None = None,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Dose:
    """The strength between 0 and `high` (negative: of the opposite edit) at which mean KL per token is `budget` nats.

    The mean is over examples, of each the mean over its target tokens. Up to `tolerance` (relative) either way. Where
    KL rises and falls again, the first crossing: below it every measured dose is within the budget.

    Raises:
        ValueError: if KL at `high` is still below the budget, or it was not met in so many evaluations.
    """
    (dose,) = doses_at(
        {"": reft}, model, data, budget, variant=Variant(1.0, among, sites), high=high, tolerance=tolerance,
        evaluations=evaluations, batch_size=batch_size, reuse=Reuse.of(reuse), progress=progress,
    ).values()  # fmt: skip
    if dose.problem:
        raise ValueError(dose.problem)
    return dose


def doses_at(
    refts: Mapping[str, ReFT],
    model: Bridge,
    data: Batch,
    budget: float,
    *,
    variant: Variant,
    high: float,
    tolerance: float,
    evaluations: int,
    batch_size: int,
    reuse: Reuse | None,
    progress: bool,
) -> dict[str, Dose]:
    """`largest_dose` of several interventions side by side, one sweep for each round; what fails says so."""
    if evaluations < 1:
        raise ValueError(f"evaluations={evaluations}, expected 1 or more")
    searches = {name: Search(budget, abs(high), tolerance) for name in refts}
    sign = math.copysign(1.0, high)
    best: dict[str, tuple[float, Tensor, Tensor]] = {}
    for number in range(1, evaluations + 1):
        asked = {name: dose for name, search in searches.items() if (dose := search.next()) is not None}
        if not asked:
            break
        plans = {
            name: Plan(refts[name], Variant(sign * dose, variant.among, variant.sites)) for name, dose in asked.items()
        }
        found = responses(
            model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe=f"dose {number}"
        )
        reuse = replace(reuse, verify=False) if reuse and found.reused else None  # checked once is enough
        for (name, dose), kl, effect in zip(asked.items(), found.kl, found.effect, strict=True):
            if searches[name].tell(dose, kl.mean().item()):
                best[name] = sign * dose, kl, effect
    return {
        name: Dose(
            best[name][0], budget, *best[name][1:], tuple((sign * s, kl) for s, kl in search.told), search.problem
        )
        for name, search in searches.items()
    }


@dataclass
class Search:
    """Asks for doses until the KL of one is the budget.

    KL grows with the square of small doses, so `log(KL / s²)` is nearly flat there and smooth beyond. It is
    interpolated over `√s`, through the ends of the bracket and the dose nearest the budget, and the next dose is where
    it predicts the budget; where it predicts none, the (geometric) middle of the bracket.
    """

    budget: float
    high: float
    tolerance: float
    told: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (0 < self.budget < math.inf and 0 < self.high < math.inf and 0 < self.tolerance < 1):
            raise ValueError(
                f"budget={self.budget}, high={self.high}, tolerance={self.tolerance}: expected a budget above 0 nats, "
                "a high that is not 0, and a tolerance between 0 and 1"
            )

    def tell(self, dose: float, kl: float) -> bool:
        """Take note of a dose's KL; whether none before was as near to the budget."""
        self.told.append((dose, kl))
        return all(self._off(kl) < self._off(other) for _, other in self.told[:-1])

    def _off(self, kl: float) -> float:
        """How far from the budget, as a factor's logarithm; ∞ for none and for what is no number."""
        return abs(math.log(kl / self.budget)) if 0 < kl < math.inf else math.inf

    @property
    def met(self) -> bool:
        return any(abs(kl - self.budget) <= self.tolerance * self.budget for _, kl in self.told)

    @property
    def bracket(self) -> tuple[float, float | None]:
        """The first dose over the budget (None so far), and the last one below it under the budget (0 so far)."""
        over = min((s for s, kl in self.told if not kl < self.budget), default=None)
        under = max((s for s, kl in self.told if kl < self.budget and (over is None or s < over)), default=0.0)
        return under, over

    @property
    def problem(self) -> str:
        """Why the budget is not met, or ""."""
        if self.met:
            return ""
        reached = f"the budget is {self.budget:g} nats per token, and KL is "
        under, over = self.bracket
        if over is None and under >= self.high:
            return reached + f"only {dict(self.told)[under]:.3g} at strength {self.high:g}: raise high, or lower budget"
        seen = ", ".join(f"{kl:.3g} at {s:.3g}" for s, kl in sorted(self.told))
        return reached + f"{seen}: allow more evaluations, or a larger tolerance"

    def next(self) -> float | None:
        """The dose to measure, or None when there is nothing more to ask."""
        if not self.told:
            return min(0.1, self.high)
        under, over = self.bracket
        if self.met or (over is None and under >= self.high):
            return None
        guess = self._predicted(under, self.high if over is None else over)
        if guess is None or any(abs(guess / dose - 1) < 1e-3 for dose, _ in self.told):
            guess = 10 * under if over is None else math.sqrt(under * over) if under else over / 10
        return min(guess, self.high)

    def _predicted(self, low: float, high: float) -> float | None:
        """Where the interpolated KL is the budget, between `low` and `high`; None where it is not there."""
        finite = [point for point in self.told if 0 < point[1] < math.inf]
        ends = [point for point in finite if point[0] in (low, high)]
        others = sorted((p for p in finite if p not in ends), key=lambda p: self._off(p[1]))
        for count in (3, 2) if finite else ():
            curve = _through([(math.sqrt(s), math.log(kl / s**2)) for s, kl in [*ends, *others][:count]])
            found = self._root(curve, max(low, high * 1e-6), high)
            if found is not None:
                return found
        return None

    def _root(self, curve: Callable[[float], float], low: float, high: float) -> float | None:
        def excess(s: float) -> float:
            return curve(math.sqrt(s)) + 2 * math.log(s) - math.log(self.budget)

        if not excess(low) < 0 < excess(high):
            return None
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return math.sqrt(low * high)


def _through(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """The polynomial through up to three points (Lagrange)."""

    def value(x: float) -> float:
        return sum(
            y * math.prod((x - other) / (at - other) for k, (other, _) in enumerate(points) if k != i)
            for i, (at, y) in enumerate(points)
        )

    return value
