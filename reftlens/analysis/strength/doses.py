"""Dose and response: what an edit does, costs and breaks as its strength grows."""

import math
from dataclasses import dataclass
from textwrap import fill

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.strength.curves import HalfEffect, Slopes, half_effect, not_dominated, slopes_of
from reftlens.analysis.strength.texts import Written
from reftlens.errors import check_one_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.openness import Openness
from reftlens.scoring.responses import Responses
from reftlens.scoring.statistics import Estimate, accuracy_of, mean_of

MEASURES = {
    "effect": "log-probability gained (nats per target token)",
    "accuracy": "share of target tokens that are most likely",
    "kl": "KL(edited ‖ unedited) (nats per token)",
    "edit_size": "‖edit‖ / ‖activation‖ at strength, mean over sites",
    "drift": "KL on unrelated prompts (nats per token)",
    "perplexity": "perplexity of what is written, unedited model",
    "repetition": "share of 3-grams that repeat",
    "score": "score of what is written",
}
"""What is measured at every strength, with its unit; the first three on the data, among its answers if it has any."""


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """One entry per strength and example. Strength is relative to the edit as trained: 1 is that edit, 0 is none."""

    strengths: tuple[float, ...]
    on_data: Responses
    """Effect, accuracy and KL on the examples, one plan per strength."""
    unit_size: Float[Tensor, "site example"]
    """‖h' - h‖ / ‖h‖ of each site's own edit of the unedited activation at strength 1; see `edit_size`."""
    unrelated: Responses | None
    """The same as `on_data` on unrelated prompts."""
    text: Written | None
    """What is written at each strength."""
    gates: tuple[Openness, ...] = ()
    """How far the gates of the edit, if it has any, are open on the data at strength 1."""

    @property
    def computation(self) -> str:
        """What was computed for each strength, and what was reused; or why everything was computed."""
        return self.on_data.computation

    def _tables(self) -> dict[str, Float[Tensor, "strength _"] | None]:
        """Each of `MEASURES`, None where it was not measured."""
        strengths, text = torch.tensor(self.strengths, dtype=torch.float64), self.text
        sizes = strengths.abs()[:, None] * self.unit_size.nanmean(dim=0)
        return {
            "effect": self.on_data.effect,
            "accuracy": self.on_data.accuracy,
            "kl": self.on_data.kl,
            "edit_size": sizes.where(strengths[:, None] != 0, 0.0),  # of an edit that overflows, too
            "drift": None if self.unrelated is None else self.unrelated.kl,
            **{m: None if text is None else getattr(text, m) for m in ("perplexity", "repetition", "score")},
        }

    def measure(self, name: str) -> Float[Tensor, "strength _"]:
        """One of `MEASURES`, for each strength and example (or unrelated prompt, or prompt).

        Raises:
            ValueError: if it is none of them, or was not measured.
        """
        check_one_of("measure", name, MEASURES)
        if (table := self._tables()[name]) is None:
            needs = {"drift": "unrelated=", "score": "prompts= and score="}.get(name, "prompts=")
            raise ValueError(f"{name} was not measured: pass {needs} to dose_response")
        return table

    def unit(self, name: str) -> str:
        """What a measure is, with its unit, as axes say it."""
        return MEASURES[name] + self.on_data.among * (name in ("effect", "accuracy", "kl"))

    @property
    def measured(self) -> list[str]:
        """Names of what was measured."""
        return [name for name, table in self._tables().items() if table is not None]

    def estimate(self, name: str) -> list[Estimate]:
        """Mean of a measure at each strength, bootstrapped over examples; of perplexity the geometric mean.

        Of an accuracy that is 0 or 1 on every example, the interval is exact (Clopper-Pearson).

        Raises:
            ValueError: where it is no number on any example.
        """
        if name != "perplexity":
            mean = accuracy_of if name == "accuracy" else mean_of
            known = [row[~row.isnan()] for row in self.measure(name)]
            for strength, row in zip(self.strengths, known, strict=True):
                if not len(row):
                    raise ValueError(
                        f"{name} is no number on any example at strength {strength:g}: leave that strength out"
                    )
            return [mean(row) for row in known]
        logs = [mean_of(row.log()) for row in self.measure(name)]
        return [Estimate(math.exp(e.value), math.exp(e.low), math.exp(e.high), e.count) for e in logs]

    @property
    def slopes(self) -> Slopes:
        """Slope of each example's effect over all strengths given, and the share that moves the wrong way."""
        return slopes_of(self.strengths, self.on_data.effect)

    def ec50(self, measure: str = "effect", *, reference: float | None = None, seed: int = 0) -> HalfEffect:
        """The strength of half the effect at `reference` (default: 1 where it was measured, else the largest).

        Of another measure than `effect`: half of its change from strength 0, which then has to be among the strengths.
        """
        values = self.measure(measure)
        if measure != "effect":
            if 0.0 not in self.strengths:
                raise ValueError(f"the change of {measure} is from strength 0: give 0 among the strengths")
            values = values - values[self.strengths.index(0.0)]
        reference = (1.0 if 1.0 in self.strengths else max(self.strengths, key=abs)) if reference is None else reference
        half = half_effect(self.strengths, values, reference, seed=seed)
        if not half.reason and not any(0 < s / reference < 1 for s in self.strengths):
            raise ValueError(f"half of the effect at {reference:g}: give strengths between 0 and {reference:g}, too")
        return half

    def by_strength(self) -> DataFrame:
        """One row per strength: mean of everything measured, with 95 % intervals over examples."""
        rows = [{"strength": strength} for strength in self.strengths]
        for name in self.measured:
            for row, estimate in zip(rows, self.estimate(name), strict=True):
                row.update(estimate.as_columns(name))
        return figures.table(rows, "strength")

    def frontier(self, measure: str = "effect") -> DataFrame:
        """The strengths that no other beats: `measure` (more is better), KL and, if measured, perplexity (less is)."""
        names = [measure, "kl", *(["perplexity"] if "perplexity" in self.measured else [])]
        means = {name: [estimate.value for estimate in self.estimate(name)] for name in names}
        costs = torch.tensor([[-v for v in means[measure]], *(means[n] for n in names[1:])], dtype=torch.float64).T
        frame = figures.table({"strength": self.strengths, **means}).loc[not_dominated(costs).tolist()]
        return frame.sort_values("kl", kind="stable", ignore_index=True)

    def to_frame(self) -> DataFrame:
        """Tidy: one row per strength, kind of row (data, unrelated, prompts) and row; what it lacks is missing."""
        groups = {"data": ("effect", "accuracy", "kl", "edit_size"), "unrelated": ("drift",)}
        groups |= {"prompts": ("perplexity", "repetition", "score")}
        records = []
        for group, names in groups.items():
            columns = {name: self.measure(name).tolist() for name in names if name in self.measured}
            columns |= {"log_prob": self.on_data.log_prob.tolist()} if group == "data" else {}
            columns |= {"text": self.text.texts} if group == "prompts" and self.text is not None else {}
            for v, strength in enumerate(self.strengths if columns else ()):
                for row, values in enumerate(zip(*(column[v] for column in columns.values()), strict=True)):
                    record = dict(zip(columns, values, strict=True))
                    records.append({"row": row, **record, "strength": strength, "rows": group})
        return figures.table(records)

    def plot(
        self, ax: Axes | None = None, *, measure: str = "effect", label: str | None = None, color: str | None = None
    ) -> Axes:
        """A measure over strength: mean with its 95 % band; of the effect also each example, in grey."""
        ax = figures.axes(ax)
        columns = zip(self.strengths, self.estimate(measure), self.measure(measure).tolist(), strict=True)
        x, estimates, examples = zip(*sorted(columns, key=lambda column: column[0]), strict=True)
        if measure == "effect":
            ax.plot(x, examples, color=figures.GREY, linewidth=0.5, alpha=0.4)
        figures.curve(ax, x, estimates, label or "mean", color)
        if measure != "perplexity":
            figures.level(ax, 0.0)
        ax.set(xlabel="strength (0: unedited, 1: as trained)", ylabel=fill(self.unit(measure), 40))
        ax.legend(frameon=False)
        return ax

    def plot_frontier(self, ax: Axes | None = None, *, measure: str = "effect", cost: str = "kl") -> Axes:
        """A measure over its cost, with both intervals at each strength; orange: those on the `frontier`."""
        ax = figures.axes(ax)
        best = set(self.frontier(measure)["strength"])
        for strength, gain, price in zip(self.strengths, self.estimate(measure), self.estimate(cost), strict=True):
            colour = figures.ORANGE if strength in best else figures.GREY
            figures.interval(ax, price.value, gain, color=colour)
            figures.interval(ax, gain.value, price, color=colour, horizontal=True)
            where = (price.value, gain.value)
            ax.annotate(f"{strength:g}", where, textcoords="offset points", xytext=(4, 4), fontsize=8)
        figures.level(ax, 0.0)
        ax.set(xlabel=self.unit(cost), ylabel=fill(self.unit(measure), 40))
        return ax

    def __repr__(self) -> str:
        each = zip(self.strengths, self.estimate("effect"), self.estimate("kl"), strict=True)
        units = f"nats per target token{self.on_data.among}", f"nats per token{self.on_data.among}"
        lines = [f"strength {s:g}: effect {e} {units[0]}, KL {k.value:.3g} {units[1]}" for s, e, k in each]
        lines += [str(self.slopes)] if len(set(self.strengths)) > 1 else []
        return figures.screenful([*lines, *map(str, self.gates)])
