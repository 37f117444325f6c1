"""Dose and response of one edit trained from several seeds: the mean curve, and how far seeds and examples move it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.strength.doses import MEASURES, DoseResponse
from reftlens.errors import check_one_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, over_two

_SHARE, _SIZE = (0.0, 1.0), (0.0, math.inf)
_RANGES = {"accuracy": _SHARE, "repetition": _SHARE, "kl": _SIZE, "edit_size": _SIZE, "drift": _SIZE}
"""Between which limits a measure can lie; a stretched interval may reach further."""


@dataclass(frozen=True, eq=False)
class PooledDoses:
    """Dose responses of several runs (seeds), at the same strengths on the same rows.

    `PooledDoses({name: rl.dose_response(reft, model, data, doses) for name, reft in trained.items()})`, where
    `rl.fit_many(trained := reft.seeds([0, 1, 2]), model, train)` trained them.

    Raises:
        ValueError: for fewer than two runs, or other strengths in one than in another.
    """

    runs: Mapping[str, DoseResponse]
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        strengths = {run.strengths for run in self.runs.values()}
        if len(self.runs) < 2 or len(strengths) > 1:
            raise ValueError(
                f"{len(self.runs)} run(s) at {len(strengths)} sets of strengths, expected two or more, all at the same"
            )

    def __getitem__(self, name: str) -> DoseResponse:
        check_one_of("run", name, self.runs)
        return self.runs[name]

    @property
    def strengths(self) -> tuple[float, ...]:
        """Relative to each edit as trained."""
        return next(iter(self.runs.values())).strengths

    @property
    def measured(self) -> list[str]:
        """Names of what was measured in every run."""
        return [name for name in MEASURES if all(name in run.measured for run in self.runs.values())]

    def measure(self, name: str) -> Float[Tensor, "strength run _"]:
        """One of `measured`, for each strength, run and example (or unrelated prompt, or prompt).

        Raises:
            ValueError: if it was not measured, or on other numbers of rows in one run than in another.
        """
        tables = [run.measure(name) for run in self.runs.values()]
        if len({table.shape for table in tables}) > 1:
            raise ValueError(f"{name} is of {[table.shape[1] for table in tables]} rows: pool runs on the same rows")
        return torch.stack(tables, dim=1)

    def estimate(self, name: str) -> list[Estimate]:
        """Mean of a measure at each strength over runs and rows, with the 95 % interval of both (see `over_two`).

        It holds the mean of further runs on further rows: variance between seeds and between examples are both in it,
        and crossed, as every run is scored on the same rows. Of perplexity it is the geometric mean.
        """
        table = self.measure(name)
        if name != "perplexity":
            estimates = [over_two(values, self.seed) for values in table]
            low, high = _RANGES.get(name, (-math.inf, math.inf))
            return [replace(e, low=max(e.low, low), high=min(e.high, high)) for e in estimates]
        logs = [over_two(values.log(), self.seed) for values in table]
        return [Estimate(math.exp(e.value), math.exp(e.low), math.exp(e.high), e.count) for e in logs]

    def spread(self, name: str) -> Float[Tensor, " strength"]:
        """Standard deviation between runs of their mean over rows, at each strength."""
        return self.measure(name).nanmean(dim=2).std(dim=1)

    def by_strength(self) -> DataFrame:
        """One row per strength: mean of everything measured with its interval, and the spread between runs."""
        rows = [{"strength": strength, "runs": len(self.runs)} for strength in self.strengths]
        for name in self.measured:
            for row, estimate, spread in zip(rows, self.estimate(name), self.spread(name).tolist(), strict=True):
                row.update({**estimate.as_columns(name), f"{name}_spread": spread})
        return figures.table(rows, "strength")

    def to_frame(self) -> DataFrame:
        """Those of the runs below each other, with the name of each."""
        import pandas as pd

        return pd.concat([run.to_frame().assign(run=name) for name, run in self.runs.items()], ignore_index=True)

    def plot(
        self, ax: Axes | None = None, *, measure: str = "effect", label: str | None = None, color: str | None = None
    ) -> Axes:
        """A measure over strength: the mean of each run, thin, and that of all with its 95 % band."""
        ax = figures.axes(ax)
        order = sorted(range(len(self.strengths)), key=lambda i: self.strengths[i])
        x, estimates = [self.strengths[i] for i in order], self.estimate(measure)
        figures.curve(ax, x, [estimates[i] for i in order], label or f"mean of {len(self.runs)} seeds", color)
        logs = measure == "perplexity"
        means = self.measure(measure).log().nanmean(dim=2).exp() if logs else self.measure(measure).nanmean(dim=2)
        ax.plot(x, means[order].tolist(), color=ax.lines[-1].get_color(), linewidth=0.7, alpha=0.7)
        if not logs:
            figures.level(ax, 0.0)
        named = next(iter(self.runs.values())).unit(measure)
        ax.set(xlabel="strength (0: unedited, 1: as trained)", ylabel=named)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        rows = self.measure("effect").shape[2]
        lines = [f"{len(self.runs)} runs on {rows} examples, intervals over both; ± is between runs:"]
        columns = zip(
            self.strengths, *(self.estimate(n) for n in ("effect", "kl")), self.spread("effect").tolist(), strict=True
        )
        lines += [
            f"strength {s:g}: effect {effect} (± {spread:.2f}) nats per target token, KL {kl:.3g} nats per token"
            for s, effect, kl, spread in columns
        ]
        return figures.screenful(lines)
