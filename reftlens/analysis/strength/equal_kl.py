"""What interventions do side by side, each at the dose that spends a budget of divergence from the unedited model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.errors import check_one_of, index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, accuracy_of, difference_of, mean_of, sign_flip_tests


@dataclass(frozen=True, eq=False)
class Dose:
    """A strength and what it costs: mean per-token KL(edited ‖ unedited), where the budget is spent."""

    strength: float
    """Relative to the edit as trained."""
    budget: float
    """Nats per token."""
    kl: Float[Tensor, " example"]
    """Mean over the example's target tokens, nats per token."""
    effect: Float[Tensor, " _"]
    """Log-probability of the targets gained on each example of the data, nats per target token; NaN if not met."""
    hits: Float[Tensor, " _"]
    """Share of each example's targets that are the most likely token; NaN if not met."""
    evaluations: tuple[tuple[float, float], ...]
    """Every `(strength, mean KL)` that was measured, in order."""
    problem: str = ""
    """Why the budget is not met, or ""."""
    opposite: "Dose | None" = None
    """The dose of the other sign, where both were searched and this one was better."""

    @property
    def cost(self) -> Estimate:
        """Mean KL, bootstrapped over examples."""
        return mean_of(self.kl)

    @property
    def accuracy(self) -> Estimate:
        """Share of targets that are the most likely token; exact (Clopper-Pearson) where examples are 0 or 1."""
        return accuracy_of(self.hits)

    def estimate(self, measure: Literal["effect", "accuracy"]) -> Estimate:
        """Mean effect, bootstrapped over examples, or the accuracy."""
        return self.accuracy if measure == "accuracy" else mean_of(self.effect)

    def to_frame(self) -> DataFrame:
        """One row per evaluation."""
        strengths, kl = zip(*self.evaluations, strict=True)
        return figures.table({"strength": strengths, "kl": kl}, "evaluation")

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """KL over strength, both on logarithmic scales: what was measured, the dose (star), and the budget (dashed)."""
        ax = figures.axes(ax)
        x, y = zip(*((abs(s), kl) for s, kl in sorted(self.evaluations, key=lambda e: abs(e[0]))), strict=True)
        (line,) = ax.plot(x, y, color=color, marker="o", label=figures.entry(ax, label or "evaluation"))
        figures.level(ax, self.budget, "budget")
        star = {"color": line.get_color(), "marker": "*", "markersize": 14, "linestyle": ""}
        ax.plot([abs(self.strength)], [self.kl.mean().item()], **star, label=figures.entry(ax, label, "dose"))
        figures.logarithmic(ax, "x")
        figures.logarithmic(ax, "y")
        ax.set(xlabel="|strength| (1: as trained)", ylabel="KL (nats per token)")
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        cost = f"strength {self.strength:.4g} costs {self.kl.mean().item():.4g} of {self.budget:g} nats per token"
        gained = f"effect {mean_of(self.effect)} nats per target token, accuracy {self.accuracy}"
        other = f"; the opposite edit: {' '.join(str(self.opposite).split())}" if self.opposite else ""
        return figures.screenful([f"{cost}; {self.problem or gained}{other}"])


@dataclass(frozen=True, eq=False)
class EqualKL:
    """One dose per intervention, all at the same KL, and how their effects compare."""

    doses: Mapping[str, Dose]
    """Of each intervention: its strength, or why it has none at this budget."""
    seed: int = 0
    """Of the sign flips."""
    chosen_on: tuple[int, ...] = ()
    """Rows of the data on which signs were chosen, where both were searched; all numbers are of the others."""

    def __getitem__(self, name: str) -> Dose:
        names = list(self.doses)
        return self.doses[names[index_of(names, name, "intervention")]]

    @property
    def effect(self) -> Float[Tensor, "intervention example"]:
        """Log-probability of the targets gained, nats per target token; NaN where the budget is not met."""
        return torch.stack([dose.effect for dose in self.doses.values()])

    @property
    def best(self) -> str:
        """The intervention with the largest mean effect."""
        return self._order()[0]

    def _order(self) -> list[str]:
        """The names, the largest mean effect first."""
        return sorted(self.doses, key=lambda name: -self[name].effect.mean().nan_to_num(nan=-math.inf).item())

    def difference(self, name: str, other: str | None = None) -> Estimate:
        """Mean effect of one less that of another (default: the best), paired bootstrap over examples."""
        return difference_of(self[name].effect, self[other or self.best].effect)

    def p(self) -> dict[str, float]:
        """Of each one's difference to the best: paired sign-flip p, Holm-corrected over all pairs.

        Over all pairs, as which of them is best was read from the same examples.
        """
        met = [name for name, dose in self.doses.items() if not dose.problem]
        pairs = list(combinations(met, 2))
        if not pairs:
            return {}
        _, corrected = sign_flip_tests([self[a].effect - self[b].effect for a, b in pairs], seed=self.seed)
        p = dict(zip(map(frozenset, pairs), corrected.tolist(), strict=True))
        return {name: p[frozenset((name, self.best))] for name in met if name != self.best}

    def to_frame(self) -> DataFrame:
        """One row per intervention, the largest effect first; `p` is of the difference to the best."""
        p, records = self.p(), []
        for name in self._order():
            dose = self[name]
            record: dict[str, str | float] = {"name": name, "strength": dose.strength, "kl": dose.kl.mean().item()}
            if not dose.problem:
                record |= mean_of(dose.effect).as_columns("effect") | dose.accuracy.as_columns("accuracy")
                record |= self.difference(name).as_columns("difference") | {"p": p.get(name, math.nan)}
            if dose.opposite is not None:
                record |= {"opposite_strength": dose.opposite.strength}
                record |= {"opposite_effect": dose.opposite.effect.mean().item()}
            records.append(record | {"problem": dose.problem})
        return figures.table(records, "name")

    def plot(self, ax: Axes | None = None, *, measure: Literal["effect", "accuracy"] = "effect") -> Axes:
        """Effect or accuracy of each intervention with its 95 % interval, the largest effect on top; orange: the best.

        A hollow mark is the opposite edit, where both signs were searched.
        """
        check_one_of("measure", measure, ("effect", "accuracy"))
        ax = figures.axes(ax, width=6.4, height=0.42 * len(self.doses) + 1.4)
        order = self._order()
        for y, name in enumerate(order):
            if self[name].problem:
                ax.annotate("budget not met", (0.0, y), fontsize=8, color=figures.GREY, va="center")
            else:
                colour = figures.BLUE if y else figures.ORANGE
                figures.interval(ax, y, self[name].estimate(measure), color=colour, horizontal=True)
            other = self[name].opposite
            if other is not None and not other.problem:
                value = other.estimate(measure).value
                entry = None if ax.get_legend_handles_labels()[1] else "opposite edit"
                ax.scatter([value], [y], facecolors="none", edgecolors=figures.GREY, label=entry)
        figures.level(ax, 0.0, horizontal=False)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.5, -0.5)
        if self.chosen_on:
            ax.legend(frameon=False, fontsize=7)
        units = {"effect": "log-probability gained (nats per target token)", "accuracy": "share of targets most likely"}
        ax.set(xlabel=f"{units[measure]}\nat KL {self[order[0]].budget:g} nats per token")
        return ax

    def __repr__(self) -> str:
        p, lines = self.p(), []
        if self.chosen_on:
            count = len(next(iter(self.doses.values())).effect)
            lines = [f"signs chosen by mean effect on {len(self.chosen_on)} rows; numbers of the other {count}:"]
        for name, dose in self.doses.items():
            beside = f"; {self.difference(name)} to {self.best}, the best (p = {p[name]:.2g})" if name in p else ""
            lines.append(f"{name}: {' '.join(str(dose).split())}{beside}")
        return figures.screenful(lines)
