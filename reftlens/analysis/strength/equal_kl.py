"""Methods side by side at the same divergence from the unedited model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.statistics import Estimate, difference_of, mean_of, sign_flip_tests
from reftlens.analysis.strength.budget import Dose, doses_at
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.scoring.responses import responses
from reftlens.text.batch import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class EqualKL:
    """One entry per method, each at its own dose, all at the same KL."""

    doses: Mapping[str, Dose]
    """Of each method: its strength, or why it has none at this budget."""
    effect: Float[Tensor, "method example"]
    """Log-probability of the targets gained, nats per target token; NaN for a method without a dose."""
    seed: int = 0
    """Of the sign flips."""

    @property
    def best(self) -> str:
        """The method with the largest mean effect."""
        return list(self.doses)[int(self.effect.mean(dim=1).nan_to_num(nan=-torch.inf).argmax())]

    def difference(self, name: str, other: str | None = None) -> Estimate:
        """Mean effect of a method less that of another (default: the best), paired bootstrap over examples."""
        names = list(self.doses)
        return difference_of(self.effect[names.index(name)], self.effect[names.index(other or self.best)])

    def p(self) -> dict[str, float]:
        """Of each method's difference to the best: paired sign-flip p, Holm-corrected over all pairs of methods.

        Over all pairs, as which of them is best was read from the same examples.
        """
        met = [n for n, dose in enumerate(self.doses.values()) if not dose.problem]
        pairs = [(a, b) for a in met for b in met if a < b]
        names, best = list(self.doses), list(self.doses).index(self.best)
        if not pairs:
            return {}
        _, corrected = sign_flip_tests([self.effect[a] - self.effect[b] for a, b in pairs], seed=self.seed)
        found = dict(zip(pairs, corrected.tolist(), strict=True))
        return {names[n]: found[min(n, best), max(n, best)] for n in met if n != best}

    def to_frame(self) -> "DataFrame":
        """One row per method, the largest effect first; `p` is of the difference to the best."""
        import pandas as pd

        p, records = self.p(), []
        for (name, dose), effect in zip(self.doses.items(), self.effect, strict=True):
            record = {"method": name, "strength": dose.strength, "kl": dose.kl.mean().item()}
            if not dose.problem:
                record |= mean_of(effect).as_columns("effect")
                record |= self.difference(name).as_columns("difference") | {"p": p.get(name, torch.nan)}
            records.append(record | {"problem": dose.problem})
        frame = pd.DataFrame(records).set_index("method")
        return frame.sort_values("effect", ascending=False) if "effect" in frame else frame

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Effect of each method with its 95 % interval, the largest on top; orange: the best."""
        ax = figures.axes(ax, width=6.4, height=0.42 * len(self.doses) + 1.4)
        order = self.effect.mean(dim=1).nan_to_num(nan=-torch.inf).argsort(descending=True).tolist()
        names = list(self.doses)
        for y, n in enumerate(order):
            if self.doses[names[n]].problem:
                ax.annotate("budget not met", (0.0, y), fontsize=8, color=figures.GREY, va="center")
                continue
            one, colour = mean_of(self.effect[n]), figures.BLUE if y else figures.ORANGE
            ax.errorbar(one.value, y, xerr=[[one.value - one.low], [one.high - one.value]], fmt="o", color=colour)
        ax.axvline(0.0, color=figures.GREY, linestyle="--", linewidth=1)
        ax.set_yticks(range(len(names)), [names[n] for n in order])
        ax.set_ylim(len(names) - 0.5, -0.5)
        budget = next(iter(self.doses.values())).budget
        ax.set(xlabel=f"log-probability gained at KL {budget:g} nats per token (nats per target token)")
        return ax

    def __str__(self) -> str:
        p, lines = self.p(), []
        for (name, dose), effect in zip(self.doses.items(), self.effect, strict=True):
            if dose.problem:
                lines.append(f"{name}: {dose.problem}")
                continue
            said = "the best" if name == self.best else f"{self.difference(name)} to the best (p = {p[name]:.2g})"
            lines.append(
                f"{name}: strength {dose.strength:.3g}, effect {mean_of(effect)} nats per target token, {said}"
            )
        return "\n".join(lines)


def compare_at_equal_kl(
    refts: Mapping[str, ReFT],
    model: Bridge,
    data: Batch,
    budget: float,
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

    All methods search side by side (`largest_dose`), in rounds of one sweep each.

    Args:
        spent_on: where the KL is measured, by default on `data`; unrelated prompts make it a budget of side effects.
        high: the largest strength that is tried; a method that stays below the budget there is named and left out.

    Raises:
        ValueError: for no method, or if none meets the budget.
    """
    if not refts:
        raise ValueError("no methods: give {name: reft}, one or more")
    doses = doses_at(
        refts, model, data if spent_on is None else spent_on, budget, variant=Variant(),
        high=high, tolerance=tolerance, evaluations=evaluations, batch_size=batch_size, reuse=Reuse.of(reuse),
        progress=progress,
    )  # fmt: skip
    met = [name for name, dose in doses.items() if not dose.problem]
    if not met:
        raise ValueError("no method meets the budget: " + "; ".join(f"{n}: {d.problem}" for n, d in doses.items()))
    effect = torch.full((len(refts), len(data)), torch.nan, dtype=torch.float64)
    where = [list(refts).index(name) for name in met]
    if spent_on is None:
        effect[where] = torch.stack([doses[name].effect for name in met])
    else:
        plans = {name: Plan(refts[name], Variant(doses[name].strength)) for name in met}
        effect[where] = responses(
            model, data, plans, batch_size=batch_size, reuse=Reuse.of(reuse), progress=progress, describe="equal KL"
        ).effect
    return EqualKL(doses, effect, seed)
