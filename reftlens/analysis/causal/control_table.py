"""The table of a trained subspace beside its controls, and what it says of the claim."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reftlens import figures
from reftlens.analysis.causal.permutation import CANNOT
from reftlens.analysis.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


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
    selectivity: Estimate | None
    """Interchange accuracy less that of a subspace trained on arbitrary labels; paired bootstrap."""
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> Control:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no control {name!r}, there are: {', '.join(row.name for row in self.rows)}")

    @property
    def rank(self) -> int:
        """The trained subspace's place among the random ones by log-probability gained; 1 is best."""
        mine = self["trained"].log_prob.value
        return 1 + sum(gained >= mine for _, gained in self.random)

    def to_frame(self) -> "DataFrame":
        """One row per control."""
        import pandas as pd

        records = [
            {"control": r.name, **r.accuracy.as_columns("accuracy"), **r.log_prob.as_columns("log_prob_gain"),
             "train_accuracy": r.train_accuracy}
            for r in self.rows
        ]  # fmt: skip
        return pd.DataFrame(records).set_index("control")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Held-out accuracy of each row with its interval, the random subspaces as small grey dots."""
        ax = figures.axes(ax, width=6.4, height=0.42 * len(self.rows) + 1.4)
        for y, row in enumerate(self.rows):
            one, colour = row.accuracy, figures.ORANGE if row.name == "trained" else figures.BLUE
            ax.errorbar(one.value, y, xerr=[[one.value - one.low], [one.high - one.value]], fmt="o", color=colour)
        if self.random:
            y = [r.name for r in self.rows].index("random subspaces")
            ax.scatter([a for a, _ in self.random], [y] * len(self.random), s=6, color=figures.GREY, alpha=0.5)
        floor = self["no edit"].accuracy.value
        ax.axvline(floor, color=figures.GREY, linestyle="--", linewidth=1)
        ax.set_yticks(range(len(self.rows)), [r.name for r in self.rows])
        ax.invert_yaxis()
        ax.set(xlabel="held-out interchange accuracy (95 % interval; dashed: no edit)", xlim=(-0.02, 1.02))
        return ax

    def __str__(self) -> str:
        wide = max(len(r.name) for r in self.rows)
        lines = [f"{'control':<{wide}}  accuracy              log p gained (nats)     training"]
        for r in self.rows:
            train = "" if r.train_accuracy is None else f"{r.train_accuracy:.2f}"
            lines.append(f"{r.name:<{wide}}  {r.accuracy!s:<20}  {r.log_prob!s:<22}  {train}")
        if self.random:
            lines.append(f"rank {self.rank} of {len(self.random) + 1} among norm-matched random subspaces")
        lines.append(f"permutation p = {self.p:.3g} ({self.shuffles} shuffles of the held-out labels)")
        if self.selectivity is not None:
            lines.append(f"accuracy {self['trained'].accuracy}, selectivity {self.selectivity}")
        lines += [f"warning: {w}" for w in self.warnings] or ["the claim survives these controls"]
        return "\n".join(lines)


def warnings_of(found: Controls) -> list[str]:
    """A sentence for each control that the trained subspace does not clear."""
    trained, said = found["trained"], []
    if math.isnan(found.p):
        said.append(CANNOT)
    elif 1 / (1 + found.shuffles) >= 0.05:
        said.append(f"{found.shuffles} shuffles are too few to tell: p cannot be below {1 / (1 + found.shuffles):.2g}")
    elif found.p >= 0.05:
        said.append(f"shuffled labels score as high (p = {found.p:.2g}): no evidence that the subspace carries them")
    if found.random and found.rank > 1 + len(found.random) // 20:
        said.append(f"rank {found.rank} of {len(found.random) + 1} among norm-matched random subspaces")
    if found.selectivity is not None and found.selectivity.low <= 0:
        said.append(f"arbitrary labels are fitted about as well (selectivity {found.selectivity})")
    names = {row.name for row in found.rows}
    if "random model" in names and found["random model"].accuracy.high >= trained.accuracy.low:
        said.append(f"a model with random weights reaches {found['random model'].accuracy}")
    if trained.accuracy.low > found["full vector"].accuracy.high:
        said.append("the subspace does more than the whole vector it is part of: look for a subspace illusion")
    for name in ("difference of means", "PCA"):
        if name in names and found[name].accuracy.high >= trained.accuracy.value:
            said.append(f"{name} of equal rank reaches {found[name].accuracy} without training")
    if trained.accuracy.low <= found["no edit"].accuracy.high:
        said.append(f"no edit at all reaches {found['no edit'].accuracy}")
    return said
