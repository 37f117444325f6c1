"""The search for the dose that spends a budget of divergence, in a few evaluations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


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
    measured: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (0 < self.budget < math.inf and 0 < self.high < math.inf and 0 < self.tolerance < 1):
            raise ValueError(
                f"budget={self.budget}, high={self.high}, tolerance={self.tolerance}: expected a budget above 0 nats, "
                "a high that is not 0, and a tolerance between 0 and 1"
            )

    def tell(self, dose: float, kl: float) -> bool:
        """Take note of a dose's KL; whether none before was as near to the budget."""
        self.measured.append((dose, kl))
        return all(self._off(kl) < self._off(other) for _, other in self.measured[:-1])

    def _off(self, kl: float) -> float:
        """How far from the budget, as a factor's logarithm; ∞ for none and for what is no number."""
        return abs(math.log(kl / self.budget)) if 0 < kl < math.inf else math.inf

    @property
    def met(self) -> bool:
        return any(abs(kl - self.budget) <= self.tolerance * self.budget for _, kl in self.measured)

    @property
    def bracket(self) -> tuple[float, float | None]:
        """The first dose over the budget (None so far), and the last one below it under the budget (0 so far)."""
        over = min((s for s, kl in self.measured if not kl < self.budget), default=None)
        under = max((s for s, kl in self.measured if kl < self.budget and (over is None or s < over)), default=0.0)
        return under, over

    @property
    def problem(self) -> str:
        """Why the budget is not met, or ""."""
        if self.met:
            return ""
        reached = f"the budget is {self.budget:g} nats per token, and KL is "
        under, over = self.bracket
        if over is None and under >= self.high:
            most = dict(self.measured)[under]
            return reached + f"only {most:.3g} at strength {self.high:g}: raise high, or lower budget"
        every = ", ".join(f"{kl:.3g} at {s:.3g}" for s, kl in sorted(self.measured))
        return reached + f"{every}: allow more evaluations, or a larger tolerance"

    def next(self) -> float | None:
        """The dose to measure, or None when there is nothing more to ask."""
        if not self.measured:
            return min(0.1, self.high)
        under, over = self.bracket
        if self.met or (over is None and under >= self.high):
            return None
        guess = self._predicted(under, self.high if over is None else over)
        if guess is None or any(abs(guess / dose - 1) < 1e-3 for dose, _ in self.measured):
            guess = 10 * under if over is None else math.sqrt(under * over) if under else over / 10
        return min(guess, self.high)

    def _predicted(self, low: float, high: float) -> float | None:
        """Where the interpolated KL is the budget, between `low` and `high`; None where it is not there."""
        finite = [point for point in self.measured if 0 < point[1] < math.inf]
        ends = [point for point in finite if point[0] in (low, high)]
        others = sorted((p for p in finite if p not in ends), key=lambda p: self._off(p[1]))
        for count in (3, 2) if finite else ():
            curve = _through([(math.sqrt(s), math.log(kl / s**2)) for s, kl in [*ends, *others][:count]])
            root = self._root(curve, max(low, high * 1e-6), high)
            if root is not None:
                return root
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
    """The polynomial through up to three points."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(dim=1)
    coefficients = torch.linalg.solve(x[:, None] ** torch.arange(len(x)), y).tolist()
    return lambda at: sum(c * at**power for power, c in enumerate(coefficients))
