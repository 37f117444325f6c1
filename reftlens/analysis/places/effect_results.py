"""What `effects` measured: of each variant of an edit; of each part of it, alone and left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftlens import figures
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, difference_of, mean_of, sign_flip_table

GAINED = "log-probability gained\n(nats per target token)"


def name_ticks(ax: Axes, names: Sequence[str], *, turned: bool) -> None:
    """Names below the x-axis, shortened; turned where they are long."""
    rotation, aligned = (20, "right") if turned else (0, "center")
    ax.set_xticks(range(len(names)), list(map(figures.short, names)), rotation=rotation, ha=aligned)


@dataclass(frozen=True, eq=False)
class VariantEffects:
    """Effect of each variant of an edit.

    An effect is the log-probability of the targets gained over the unedited model: the mean over an example's targets,
    then over the examples, in nats per target token. A row in which a variant edits no token is not counted for it.
    """

    labels: tuple[str, ...]
    edited: Bool[Tensor, "variant example"]
    """Rows in which the variant edits a token."""
    gained: Float[Tensor, "variant example"]
    accuracy: Float[Tensor, "variant example"]
    """Share of an example's targets that are the most likely token."""
    seed: int = 0
    """Of the permutation tests."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    def effect(self, label: str) -> Estimate:
        """Of one variant, over the rows that it edits."""
        i = index_of(self.labels, label, "variant")
        return mean_of(self.gained[i, self.edited[i]])

    def difference(self, label: str, other: str) -> Estimate:
        """Effect of one variant less that of another, paired over the rows that both edit."""
        i, j = (index_of(self.labels, name, "variant") for name in (label, other))
        rows = self.edited[i] & self.edited[j]
        return difference_of(self.gained[i, rows], self.gained[j, rows])

    @cached_property
    def tests(self) -> tuple[Float[Tensor, " variant"], Float[Tensor, " variant"]]:
        """Sign-flip p of each effect, and the same corrected for their number (Holm)."""
        return sign_flip_table(self.gained, self.edited, seed=self.seed)

    def to_frame(self) -> DataFrame:
        """One row per variant: its rows `n`, effect with interval, mean accuracy, sign-flip p and Holm's p."""
        records = []
        for i, (label, p, corrected) in enumerate(zip(self.labels, *map(torch.Tensor.tolist, self.tests), strict=True)):
            rows = self.edited[i]
            accuracy, effect = self.accuracy[i, rows].mean().item(), self.effect(label).as_columns("effect")
            record = {"variant": label, "n": int(rows.sum()), **effect, "accuracy": accuracy}
            records.append(record | {"p": p, "p_holm": corrected})
        return figures.table(records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The effect of each variant with its 95 % interval."""
        ax = figures.axes(ax, width=max(4.0, 2.0 + 0.45 * len(self.labels)))
        ax.axhline(0, color="black", linewidth=0.8)
        for x, label in enumerate(self.labels):
            figures.interval(ax, x, self.effect(label), color=figures.BLUE)
        name_ticks(ax, self.labels, turned=True)
        ax.set(xlabel="variant", ylabel=GAINED + self.among)
        return ax

    def __repr__(self) -> str:
        wide = max(map(len, self.labels))
        lines = [f"{label:<{wide}}  {e} ({e.count} examples)" for label in self.labels if (e := self.effect(label))]
        return figures.screenful([f"log-probability gained, nats per target token{self.among}", *lines])


@dataclass(frozen=True, eq=False)
class PartEffects:
    """Effect of a whole edit, of each of its parts alone, and of the edit with that part left out.

    An effect is that of `VariantEffects`. A row in which a part edits no token is not counted for it.
    """

    kind: str
    """`"position"` or `"site"`."""
    parts: tuple[str, ...]
    edited: Bool[Tensor, "part example"]
    """Rows in which the part edits a token."""
    whole: Float[Tensor, " example"]
    alone: Float[Tensor, "part example"]
    left_out: Float[Tensor, "part example"]
    unedited_accuracy: Float[Tensor, " example"]
    """Share of an example's targets that are the most likely token, here and below."""
    whole_accuracy: Float[Tensor, " example"]
    alone_accuracy: Float[Tensor, "part example"]
    left_out_accuracy: Float[Tensor, "part example"]
    seed: int = 0
    """Of the permutation tests."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    def effect(self, part: str) -> Estimate:
        """Of the part alone."""
        i, rows = self._at(part)
        return mean_of(self.alone[i, rows])

    def effect_without(self, part: str) -> Estimate:
        """Of the edit with the part left out."""
        i, rows = self._at(part)
        return mean_of(self.left_out[i, rows])

    def lost_without(self, part: str) -> Estimate:
        """Effect of the whole edit less that with the part left out, paired."""
        i, rows = self._at(part)
        return difference_of(self.whole[rows], self.left_out[i, rows])

    def _at(self, part: str) -> tuple[int, Bool[Tensor, " example"]]:
        """The number of a part, and the rows that it edits."""
        i = index_of(self.parts, part, self.kind)
        return i, self.edited[i]

    @cached_property
    def tests(self) -> tuple[Float[Tensor, "two part"], Float[Tensor, "two part"]]:
        """Sign-flip p of each part alone (first row) and of what is lost without it; then the same after Holm."""
        values = torch.stack([self.alone, self.whole - self.left_out])
        return sign_flip_table(values, self.edited.expand_as(values), seed=self.seed)

    def to_frame(self) -> DataFrame:
        """One row per part: its rows `n`, effects with intervals, mean accuracies, sign-flip p and Holm's p."""
        accuracies = {
            "unedited": self.unedited_accuracy.expand_as(self.alone),
            "alone": self.alone_accuracy,
            "left_out": self.left_out_accuracy,
            "whole": self.whole_accuracy.expand_as(self.alone),
        }
        p, corrected = self.tests
        records = []
        for i, part in enumerate(self.parts):
            rows = self.edited[i]
            record: dict[str, str | float] = {self.kind: part, "n": int(rows.sum())}
            record |= self.effect(part).as_columns("alone") | self.effect_without(part).as_columns("left_out")
            record |= self.lost_without(part).as_columns("lost") | mean_of(self.whole[rows]).as_columns("whole")
            record |= {f"{name}_accuracy": table[i, rows].mean().item() for name, table in accuracies.items()}
            for n, name in enumerate(("p_alone", "p_lost")):
                record |= {name: p[n, i].item(), f"{name}_holm": corrected[n, i].item()}
            records.append(record)
        return figures.table(records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Each part alone and left out with 95 % intervals, beside the whole edit (dashed, band: its interval)."""
        ax = figures.axes(ax, width=max(4.0, 2.0 + 0.45 * len(self.parts)))
        whole = mean_of(self.whole)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.axhspan(whole.low, whole.high, color=figures.GREY, alpha=0.15, linewidth=0)
        figures.level(ax, whole.value, "whole edit")
        ways = (("alone", self.effect, figures.BLUE, -0.1), ("left out", self.effect_without, figures.ORANGE, 0.1))
        for name, estimate, colour, shift in ways:
            for x, part in enumerate(self.parts):
                figures.interval(ax, x + shift, estimate(part), color=colour, label=name if x == 0 else None)
        name_ticks(ax, self.parts, turned=self.kind != "position")
        ax.set(xlabel=self.kind, ylabel=GAINED + self.among)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        wide = max(map(len, self.parts))
        lines = [f"whole edit {mean_of(self.whole)} nats per target token{self.among}, {len(self.whole)} examples"]
        for part in self.parts:
            alone = self.effect(part)
            lines.append(
                f"{part:<{wide}}  alone {alone}, left out {self.effect_without(part)} ({alone.count} examples)"
            )
        return figures.screenful(lines)
