"""Whether an answer follows the option or its letter: the same questions with their options rotated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reftlens import figures
from reftlens.experiments.answers.scores import accuracy
from reftlens.experiments.rows.families.commonsense import rotated
from reftlens.experiments.rows.task import Row
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, mean_of


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

    def __repr__(self) -> str:
        named = ", ".join(f"{name} {share}" for name, share in self.shares.items())
        right = ", ".join(str(one) for one in self.accuracies)
        return (
            f"shares of answers: {named}\naccuracy by rotation: {right}\nthe same option each time: {self.consistent}"
        )

    def to_frame(self) -> DataFrame:
        """A row for each name and each rotation."""
        import pandas as pd

        named = [{"of": name, **share.as_columns("share")} for name, share in self.shares.items()]
        right = [{"of": f"rotation {i}", **one.as_columns("accuracy")} for i, one in enumerate(self.accuracies)]
        return pd.DataFrame([*named, *right, {"of": "same option", **self.consistent.as_columns("share")}])

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
    if len(counts) != 1:
        raise ValueError(f"rows with {sorted(counts)} choices, expected rows with one number of them")
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
    names = rows[0][0].choices
    named = {n: torch.tensor([[a == n for a in part] for part in answers]).double().mean(dim=0) for n in names}
    right = [
        torch.tensor([a == row.answer for row, a in zip(*pair, strict=True)])
        for pair in zip(rows, answers, strict=True)
    ]
    options = [[_option(row, a) for row, a in zip(*pair, strict=True)] for pair in zip(rows, answers, strict=True)]
    same = torch.tensor([None not in each and len(set(each)) == 1 for each in zip(*options, strict=True)])
    return LetterBias(
        {name: mean_of(shares) for name, shares in named.items()}, tuple(map(accuracy, right)), accuracy(same)
    )


def _option(row: Row, answer: str | None) -> str | None:
    """The text of the option that an answer names."""
    return row.fields["options"][row.choices.index(answer)] if answer in row.choices else None
