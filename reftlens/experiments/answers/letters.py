"""Whether an answer follows the option or its letter: the same questions with their options rotated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from reftlens import figures
from reftlens.experiments.answers.scores import Answers, accuracy
from reftlens.experiments.rows.families.commonsense import rotated
from reftlens.experiments.rows.task import Row
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, mean_of, over_two


@dataclass(frozen=True)
class LetterBias:
    """What was answered to questions asked once for each rotation of their options.

    Over all rotations each name is right equally often, so `shares` that differ are a liking for names.
    """

    shares: dict[str, Estimate]
    """Of each name ("answer1", …) the share of answers that gave it; the rest gave none."""
    accuracies: tuple[Estimate, ...]
    """Of each rotation, the first as the questions stand."""
    consistent: Estimate
    """Share of questions to which every rotation was answered by the same option."""
    accuracy: Estimate
    """Over all rotations, with an interval over questions and, of several, runs."""

    def __repr__(self) -> str:
        named = ", ".join(f"{name} {share}" for name, share in self.shares.items())
        right = ", ".join(str(one) for one in self.accuracies)
        return (
            f"shares of answers: {named}\naccuracy: {self.accuracy}, by rotation: {right}\n"
            f"the same option each time: {self.consistent}"
        )

    def to_frame(self) -> DataFrame:
        """A row for each name and each rotation."""
        import pandas as pd

        named = [{"of": name, **share.as_columns("share")} for name, share in self.shares.items()]
        right = [{"of": f"rotation {i}", **one.as_columns("accuracy")} for i, one in enumerate(self.accuracies)]
        every = [{"of": "all rotations", **self.accuracy.as_columns("accuracy")}]
        return pd.DataFrame([*named, *right, *every, {"of": "same option", **self.consistent.as_columns("share")}])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The share of each name, beside that of answers that do not care for names."""
        ax = figures.axes(ax)
        for place, share in enumerate(self.shares.values()):
            figures.interval(ax, place, share)
        ax.axhline(1 / len(self.shares), color=figures.GREY, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(self.shares)), list(self.shares))
        ax.set_ylabel("share of answers, over all rotations")
        return ax


def rotations(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows as they stand, and with their options moved on by one place, by two, …

    Raises:
        ValueError: for rows without options, or with different numbers of them.
    """
    counts = {len(row.choices) for row in rows}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"rows with {sorted(counts)} choices, expected rows with some, all with as many")
    return [[rotated(row, by) for row in rows] for by in range(*counts)]


def letter_bias(rows: Sequence[Sequence[Row]], answers: Sequence[Sequence[str | None]]) -> LetterBias:
    """The bias that the answers to all `rotations` of some rows show."""
    if (
        not rows
        or [len(part) for part in rows] != [len(part) for part in answers]
        or len(rows) != len(rows[0][0].choices)
    ):
        raise ValueError(
            f"answers to {[len(part) for part in answers]} rows, expected them to {[len(part) for part in rows]}, all "
            "rotations of some rows"
        )
    return bias_of(rows[0][0].choices, [answers], [[row.answer for row in part] for part in rows])


def bias_of(names: Sequence[str], runs: Sequence[Sequence[Answers]], gold: Sequence[Sequence[str]]) -> LetterBias:
    """The bias of one run or several.

    Args:
        runs: for each run and rotation the answers to the questions, in one order.
        gold: for each rotation the right ones.
    """
    places = {name: place for place, name in enumerate(names)}
    given = torch.tensor([[[places.get(a or "", -1) for a in part] for part in run] for run in runs])
    right = given == torch.tensor([[places[name] for name in part] for part in gold])
    moved = torch.arange(len(names))[:, None]
    options = torch.where(given < 0, -1, (given + moved) % len(names))
    same = ((options == options[:, :1]) & (options >= 0)).all(dim=1)
    return LetterBias(
        {name: _over((given == place).double().mean(dim=1)) for name, place in places.items()},
        tuple(_over(right[:, by]) for by in range(len(names))),
        _over(same),
        _over(right.double().mean(dim=1)),
    )


def _over(values: Shaped[Tensor, "run question"]) -> Estimate:
    """The mean, with an interval over questions and, of several, runs."""
    if len(values) > 1:
        return over_two(values.double())
    return accuracy(values[0]) if values.dtype == torch.bool else mean_of(values[0])
