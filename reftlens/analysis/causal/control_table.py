"""The table of a trained subspace beside its controls, and what it says of the claim."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from reftlens import figures
from reftlens.analysis.causal.ledger import COMPLETE, Ledger
from reftlens.analysis.causal.permutation import CANNOT
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate


@dataclass(frozen=True)
class Control:
    """One row of the table: a way to edit, and what it scores on the held-out pairs."""

    name: str
    accuracy: Estimate
    log_prob: Estimate
    """Log-probability of the expected answer, edited less unedited, in nats."""
    train_accuracy: float | None = None
    """Of those that are trained: interchange accuracy on their own training pairs."""


@dataclass(frozen=True)
class Controls:
    """The trained subspace beside its controls; `warnings` is what the claim does not survive."""

    rows: tuple[Control, ...]
    random: tuple[tuple[float, float], ...]
    """`(accuracy, log-probability gained)` of each norm-matched random subspace."""
    p: float
    """Share of the label shuffles that score as high, the subspace fixed (permutation test); NaN where none can."""
    shuffles: int
    selectivity: Estimate
    """Interchange accuracy less that of a subspace trained on arbitrary labels; paired bootstrap."""
    dimensions: tuple[int, ...]
    """Of the subspace at each site, and of the random ones: the rank it was given, or learned."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""
    ledger: Ledger = COMPLETE
    """Pairs that were left out, as they exchange other variables than the one that is looked at."""

    def __getitem__(self, name: str) -> Control:
        return self.rows[index_of([row.name for row in self.rows], name, "control")]

    @property
    def rank(self) -> int:
        """The trained subspace's place among the random ones by log-probability gained; 1 is best."""
        mine = self["trained"].log_prob.value
        return 1 + sum(gained >= mine for _, gained in self.random)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each control that the trained subspace does not clear."""
        return tuple(self._warnings())

    def _warnings(self) -> Iterator[str]:
        least = 1 / (1 + self.shuffles)
        if math.isnan(self.p):
            yield CANNOT
        elif least >= 0.05:
            yield f"{self.shuffles} shuffles are too few to tell: p cannot be below {least:.2g}"
        elif self.p >= 0.05:
            yield f"shuffled labels score as high (p = {self.p:.2g}): no evidence that the subspace carries them"
        if self.random and self.rank > 1 + len(self.random) // 20:
            yield f"rank {self.rank} of {len(self.random) + 1} among norm-matched random subspaces"
        if self.selectivity.low <= 0:
            yield f"arbitrary labels are fitted about as well (selectivity {self.selectivity})"
        accuracy = {row.name: row.accuracy for row in self.rows}
        trained, without = accuracy["trained"], accuracy["no edit"]
        if "random model" in accuracy and accuracy["random model"].high >= trained.low:
            yield f"a model with random weights reaches {accuracy['random model']}"
        if trained.low > accuracy["full vector"].high:
            yield "the subspace does more than the whole vector it is part of: look for a subspace illusion"
        for name in ("difference of means", "PCA"):
            if name in accuracy and accuracy[name].high >= trained.value:
                yield f"{name} of equal rank reaches {accuracy[name]} without training"
        if trained.low <= without.high:
            yield f"no edit at all reaches {without}"

    def to_frame(self) -> DataFrame:
        """One row per control."""
        records = []
        for row in self.rows:
            estimates = row.accuracy.as_columns("accuracy") | row.log_prob.as_columns("log_prob_gain")
            records.append({"control": row.name, **estimates, "train_accuracy": row.train_accuracy})
        return figures.table(records, "control")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Held-out accuracy of each row with its interval, the random subspaces as small grey dots."""
        ax = figures.axes(ax, width=6.4, height=0.42 * len(self.rows) + 1.4)
        for y, row in enumerate(self.rows):
            colour = figures.ORANGE if row.name == "trained" else figures.BLUE
            figures.interval(ax, y, row.accuracy, color=colour, horizontal=True)
        if self.random:
            y = [r.name for r in self.rows].index("random subspaces")
            ax.scatter([a for a, _ in self.random], [y] * len(self.random), s=6, color=figures.GREY, alpha=0.5)
        figures.level(ax, self["no edit"].accuracy.value, horizontal=False)
        ax.set_yticks(range(len(self.rows)), [r.name for r in self.rows])
        ax.invert_yaxis()
        ax.set(xlabel=f"held-out interchange accuracy{self.among} (95 % interval; dashed: no edit)", xlim=(-0.02, 1.02))
        return ax

    def __repr__(self) -> str:
        wide = max(len(r.name) for r in self.rows)
        lines = [f"{'control':<{wide}}  accuracy              log p gained (nats)     training"]
        for r in self.rows:
            train = "" if r.train_accuracy is None else f"{r.train_accuracy:.2f}"
            lines.append(f"{r.name:<{wide}}  {r.accuracy!s:<20}  {r.log_prob!s:<22}  {train}")
        if self.random:
            dimensions = ", ".join(map(str, self.dimensions))
            lines.append(
                f"rank {self.rank} of {len(self.random) + 1} among norm-matched random subspaces "
                f"(of dimension {dimensions}, as the trained one)"
            )
        lines.append(f"permutation p = {self.p:.3g} ({self.shuffles} shuffles of the held-out labels)")
        lines.append(f"accuracy{self.among} {self['trained'].accuracy}, selectivity {self.selectivity}")
        lines += self.ledger.lines
        lines += [f"warning: {w}" for w in self.warnings] or ["the claim survives these controls"]
        return "\n".join(lines)
