"""Interventions side by side, each at the dose that spends a budget of divergence from the unedited model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.strength.dose_search import Search
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.numbers import whole
from reftlens.scoring.responses import Responses, responses
from reftlens.scoring.statistics import Estimate, accuracy_of, difference_of, mean_of, sign_flip_tests
from reftlens.text.batch import Batch


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

    @property
    def cost(self) -> Estimate:
        """Mean KL, bootstrapped over examples."""
        return mean_of(self.kl)

    @property
    def accuracy(self) -> Estimate:
        """Share of targets that are the most likely token; exact (Clopper-Pearson) where examples are 0 or 1."""
        return accuracy_of(self.hits)

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
        ax.set(xscale="log", yscale="log", xlabel="|strength| (1: as trained)", ylabel="KL (nats per token)")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        cost = f"strength {self.strength:.4g} costs {self.kl.mean().item():.4g} of {self.budget:g} nats per token"
        gained = f"effect {mean_of(self.effect)} nats per target token, accuracy {self.accuracy}"
        return figures.screenful([f"{cost}; {self.problem or gained}"])

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class EqualKL:
    """One dose per intervention, all at the same KL, and how their effects compare."""

    doses: Mapping[str, Dose]
    """Of each intervention: its strength, or why it has none at this budget."""
    seed: int = 0
    """Of the sign flips."""

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
            records.append(record | {"problem": dose.problem})
        return figures.table(records, "name")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effect of each intervention with its 95 % interval, the largest on top; orange: the best."""
        ax = figures.axes(ax, width=6.4, height=0.42 * len(self.doses) + 1.4)
        order = self._order()
        for y, name in enumerate(order):
            if self[name].problem:
                ax.annotate("budget not met", (0.0, y), fontsize=8, color=figures.GREY, va="center")
            else:
                colour = figures.BLUE if y else figures.ORANGE
                figures.interval(ax, y, mean_of(self[name].effect), color=colour, horizontal=True)
        figures.level(ax, 0.0, horizontal=False)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.5, -0.5)
        budget = self[order[0]].budget
        ax.set(xlabel=f"log-probability gained at KL {budget:g} nats per token (nats per target token)")
        return ax

    def __str__(self) -> str:
        p, lines = self.p(), []
        for name, dose in self.doses.items():
            beside = f"; {self.difference(name)} to {self.best}, the best (p = {p[name]:.2g})" if name in p else ""
            lines.append(f"{name}: {' '.join(str(dose).split())}{beside}")
        return figures.screenful(lines)

    __repr__ = __str__


def at_kl(
    budget: float,
    refts: Mapping[str, ReFT | Plan],
    model: Bridge,
    data: Batch,
    *,
    spent_on: Batch | None = None,
    high: float = 10.0,
    tolerance: float = 0.02,
    evaluations: int = 6,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> EqualKL:
    """The effect of each of `{name: reft}` on `data` at the strength where its mean KL per token is `budget` nats.

    The mean is over examples, of each the mean over its target tokens. All search side by side, in rounds of one sweep
    each. Where KL rises and falls again, the first crossing: below it every measured dose is within the budget.

    Args:
        refts: a `Plan` in place of a ReFT says at which tokens and sites it acts; its strength is the unit of the dose.
        spent_on: where the KL is measured, by default on `data`; unrelated prompts make it a budget of side effects.
        high: the largest strength that is tried (negative: of the opposite edit); what stays below the budget there is
            named and left out.
        tolerance: how far KL may be off the budget either way, relative to it.
        evaluations: how many strengths of each are tried, at most.
        seed: of the sign flips.

    Raises:
        ValueError: for no ReFT, or if none meets the budget.
    """
    if not isinstance(refts, Mapping) or not refts:
        raise TypeError(f"got {refts!r:.60}, expected {{name: reft}}, one or more")
    evaluations = whole(evaluations, "evaluations", 1)
    plans = {name: reft if isinstance(reft, Plan) else Plan(reft) for name, reft in refts.items()}
    searches = {name: Search(budget, abs(high), tolerance) for name in plans}
    score, sign = partial(responses, model, batch_size=batch_size, progress=progress), math.copysign(1.0, high)
    signed = {name: _scaled(plan, sign) for name, plan in plans.items()}
    spent = (data if spent_on is None else spent_on).among_answers(None)
    nearest = _nearest(partial(score, spent), signed, searches, evaluations, Reuse.of(reuse))
    met = [name for name, search in searches.items() if search.met]
    if not met:
        raise ValueError("; ".join(f"{name}: {search.problem}" for name, search in searches.items()))
    gains = {name: nearest[name][2:] for name in met}
    if spent_on is not None or data.answers:
        dosed = {name: _scaled(signed[name], nearest[name][0]) for name in met}
        scored = score(data, dosed, reuse=Reuse.of(reuse), describe="equal KL")
        gains = dict(zip(met, zip(scored.effect, scored.accuracy, strict=True), strict=True))
    nothing = torch.full((2, len(data)), math.nan, dtype=torch.float64)
    doses = {}
    for name, search in searches.items():
        tried = tuple((sign * strength, kl) for strength, kl in search.measured)
        strength, kl, *_ = nearest[name]
        effect, hits = gains.get(name, nothing)
        doses[name] = Dose(sign * strength, budget, kl, effect, hits, tried, search.problem)
    return EqualKL(doses, seed)


def _nearest(
    score: Callable[..., Responses],
    plans: Mapping[str, Plan],
    searches: Mapping[str, Search],
    evaluations: int,
    reuse: Reuse | None,
) -> dict[str, tuple[float, Tensor, Tensor, Tensor]]:
    """Of each plan the dose whose KL is nearest to the budget, with its KL, effect and accuracy on each example."""
    nearest: dict[str, tuple[float, Tensor, Tensor, Tensor]] = {}
    for number in range(1, evaluations + 1):
        doses = {name: dose for name, search in searches.items() if (dose := search.next()) is not None}
        if not doses:
            break
        dosed = {name: _scaled(plans[name], dose) for name, dose in doses.items()}
        measured = score(dosed, reuse=reuse, describe=f"dose {number}", finite=False)  # NaN is over any budget
        reuse = reuse if measured.reused else None
        for i, (name, dose) in enumerate(doses.items()):
            if searches[name].tell(dose, measured.kl[i].mean().item()):
                nearest[name] = dose, measured.kl[i], measured.effect[i], measured.accuracy[i]
    return nearest


def _scaled(plan: Plan, factor: float) -> Plan:
    """A plan with so many times its strength."""
    strength = plan.variant.strength
    scaled = tuple(factor * s for s in strength) if isinstance(strength, tuple) else factor * strength
    return Plan(plan.reft, replace(plan.variant, strength=scaled))
