"""Several edits at once: what each does to each metric, and how far their effects add up."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.places.effect_results import GAINED
from reftlens.analysis.places.effect_tables import heat_map, write_cell
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.responses import responses
from reftlens.scoring.statistics import Estimate, mean_of, sign_flip_tests
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Composition:
    """Effect of each edit on each metric, alone and together: log-probability gained, in nats per target token."""

    edits: tuple[str, ...]
    metrics: tuple[str, ...]
    alone: tuple[Float[Tensor, "edit _"], ...]
    """For each metric its examples."""
    together: tuple[Float[Tensor, " _"], ...]
    """Of all edits at once."""
    seed: int = 0
    """Of the permutation tests."""
    among: tuple[str, ...] = ()
    """Of each metric, among how many answers its targets were scored, in words; "" for all tokens."""

    def effect(self, edit: str, metric: str) -> Estimate:
        """Of one edit on one metric."""
        return mean_of(self.alone[self._index(metric)][index_of(self.edits, edit, "edit")])

    def joint(self, metric: str) -> Estimate:
        """Of all edits at once."""
        return mean_of(self.together[self._index(metric)])

    def predicted(self, metric: str) -> Estimate:
        """The additive prediction: the sum of the effects of each edit alone."""
        return mean_of(self.alone[self._index(metric)].sum(dim=0))

    def error(self, metric: str) -> Estimate:
        """What all edits do at once less the additive prediction, paired."""
        return mean_of(self._errors(self._index(metric)))

    def _index(self, metric: str) -> int:
        return index_of(self.metrics, metric, "metric")

    def _label(self, metric: str) -> str:
        return metric + (self.among[self._index(metric)] if self.among else "")

    def _errors(self, j: int) -> Float[Tensor, " example"]:
        return self.together[j] - self.alone[j].sum(dim=0)

    def to_frame(self) -> DataFrame:
        """One row per metric and edit, "together", "sum of effects" and "error".

        `p` by sign flips, `p_holm` corrected: for the number of edits × metrics, and for the number of errors.
        """
        effects = torch.stack(sign_flip_tests([row for table in self.alone for row in table], seed=self.seed))
        effects = effects.unflatten(1, (len(self.metrics), len(self.edits)))
        errors = torch.stack(sign_flip_tests(list(map(self._errors, range(len(self.metrics)))), seed=self.seed))
        untested = torch.full((2,), torch.nan, dtype=torch.float32)
        records = []
        for j, metric in enumerate(self.metrics):
            rows = [(edit, self.effect(edit, metric), effects[:, j, i]) for i, edit in enumerate(self.edits)]
            rows += [("together", self.joint(metric), untested), ("sum of effects", self.predicted(metric), untested)]
            for name, estimate, (p, corrected) in [*rows, ("error", self.error(metric), errors[:, j])]:
                record = {"metric": metric, "edit": name, "n": estimate.count, **estimate.as_columns("effect")}
                records.append(record | {"p": p.item(), "p_holm": corrected.item()})
        return figures.table(records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Edits × metrics about 0, and all of them together beside the sum; value and 95 % interval in each cell."""
        rows = ["sum of effects", "together", *reversed(self.edits)]
        ax = figures.axes(ax, width=3.2 + 1.2 * len(self.metrics), height=1.5 + 0.55 * len(rows))
        estimates = [list(map(self.predicted, self.metrics)), list(map(self.joint, self.metrics))]
        estimates += [[self.effect(edit, metric) for metric in self.metrics] for edit in rows[2:]]
        table = torch.tensor([[estimate.value for estimate in row] for row in estimates], dtype=torch.float32)
        heat_map(ax, table, GAINED)
        for y, row in enumerate(estimates):
            for x, estimate in enumerate(row):
                write_cell(ax, x, y, estimate)
        ax.set_xticks(range(len(self.metrics)), list(map(self._label, self.metrics)))
        ax.set_yticks(range(len(rows)), rows)
        ax.set(xlabel="metric", ylabel="edit")
        return ax

    def __repr__(self) -> str:
        lines = []
        for metric in self.metrics:
            each = ", ".join(f"{edit} {self.effect(edit, metric)}" for edit in self.edits)
            both = f"together {self.joint(metric)}, sum {self.predicted(metric)}, error {self.error(metric)}"
            lines.append(f"{self._label(metric)} (nats per target token): {each}; {both}")
        return figures.screenful(lines)


def composition(
    edits: Mapping[str, ReFT],
    model: Bridge,
    metrics: Mapping[str, Batch],
    *,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Composition:
    """What each of `edits` gains on the targets of each of `metrics`, what all do at once, and how far they add up.

    At one hook the edits act in the order given (`edit | other`). A metric needs the sources that any edit exchanges.

    Args:
        seed: of the permutation tests.

    Raises:
        ValueError: for fewer than two edits, no metric, a row without a target, or an edit that acts on no token of
            a metric.
    """
    if not isinstance(edits, Mapping) or not isinstance(metrics, Mapping):
        raise TypeError("expected {name: edit} and {name: batch}, so that the table can name them")
    if len(edits) < 2 or not metrics:
        raise ValueError(f"{len(edits)} edit(s) and {len(metrics)} metric(s), expected two edits and a metric or more")
    plans = {name: Plan(reft) for name, reft in edits.items()} | {" | ".join(edits): Plan(reduce(or_, edits.values()))}
    effects = [
        responses(
            model, data, plans, batch_size=batch_size, reuse=Reuse.of(reuse), progress=progress, describe=name
        ).effect
        for name, data in metrics.items()
    ]
    alone, together = tuple(table[:-1] for table in effects), tuple(table[-1] for table in effects)
    return Composition(tuple(edits), tuple(metrics), alone, together, seed, tuple(d.among for d in metrics.values()))
