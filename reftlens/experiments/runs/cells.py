"""What one method answered to the rows of one task, with every seed, and its score."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.experiments.answers.scores import difference, score_over_runs
from reftlens.experiments.rows.families.glue import metrics_of
from reftlens.experiments.rows.loading import TASKS
from reftlens.experiments.runs.records import Prediction
from reftlens.scoring.statistics import Estimate, mean_of, over_two

MAJORITY = "majority answer"


@dataclass(frozen=True)
class Cell:
    """What one method answered to the test rows of one task in one way, with every seed."""

    recipe: str
    part: str
    method: str
    task: str
    way: str
    metric: str
    """"accuracy", "f1", …; "mean" where a number of each row is reported."""
    seeds: tuple[int, ...]
    answers: tuple[str, ...]
    given: tuple[tuple[str | None, ...], ...]
    """For each seed, for each row; nothing where a number of each row is reported."""
    rights: Float[Tensor, "seed row"]
    """1 where the answer is right; or the number of the row."""
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Method and way, in words."""
        return f"{self.method}, {self.way}" if self.way else self.method

    @property
    def column(self) -> str:
        """Task, and by what it is judged where that is no accuracy."""
        return self.task if self.metric == "accuracy" else f"{self.task} ({self.metric})"

    @property
    def score(self) -> Estimate:
        """With an interval over rows and, of several, seeds."""
        if self.given:
            return score_over_runs(self.metric, self.given, self.answers, self.choices)
        return over_two(self.rights) if len(self.rights) > 1 else mean_of(self.rights[0])

    def less(self, other: "Cell") -> Estimate:
        """By how much it is right more often, paired by row and, where both have several, by seed.

        Raises:
            ValueError: where they answered different rows, or share no seed.
        """
        if self.answers != other.answers:
            raise ValueError(f"{self.name} and {other.name} answered other rows of {self.task}: score both on the same")
        if 1 in (len(self.seeds), len(other.seeds)):
            return difference(self.rights, other.rights)
        both = [seed for seed in self.seeds if seed in other.seeds]
        if not both:
            raise ValueError(f"{self.name} and {other.name} share no seed on {self.task}: run both with the same")
        ours, theirs = ([cell.seeds.index(seed) for seed in both] for cell in (self, other))
        return difference(self.rights[ours], other.rights[theirs])


def cells_of(
    recipe: str,
    part: str,
    method: str,
    task: str,
    way: str,
    by_seed: Mapping[int, list[Prediction]],
    choices: tuple[str, ...] | None,
) -> list[Cell]:
    """One for each metric of the task; `choices` is empty of values, and None where nothing is told of them."""
    seeds, rows = tuple(sorted(by_seed)), [sorted(by_seed[s], key=lambda p: p.index) for s in sorted(by_seed)]
    if any([(p.index, p.answer) for p in r] != [(p.index, p.answer) for p in rows[0]] for r in rows):
        raise ValueError(f"the seeds of {method} answered different rows of {task}: give them folders of their own")
    answers = tuple(p.answer for p in rows[0])
    given = tuple(tuple(p.given[way] for p in r) for r in rows) if way in rows[0][0].given else ()
    numbers = [[float(p.given[way] == p.answer) if given else p.measures[way] for p in r] for r in rows]
    unknown = ("accuracy",) if choices is None else metrics_of(task, choices)
    known = (TASKS[task].metrics if task in TASKS else unknown) if given else ("mean",)
    where, found = (recipe, part, method, task, way), (seeds, answers, given, torch.tensor(numbers).double())
    return [Cell(*where, metric, *found, choices or ()) for metric in known]


def majorities(cells: Iterable[Cell]) -> list[Cell]:
    """Of each task whose answers repeat, the answer that is right most often, given to every row."""
    found = {}
    for cell in cells:
        counts = {a: cell.answers.count(a) for a in dict.fromkeys(cell.answers)}
        answer = max(counts, key=lambda a: counts[a])
        if cell.metric == "accuracy" and len(counts) <= len(cell.answers) / 4 and cell.task not in found:
            rights = torch.tensor([[float(a == answer) for a in cell.answers]]).double()
            given = ((answer,) * len(cell.answers),)
            where = (cell.recipe, cell.part, MAJORITY, cell.task, "", "accuracy")
            found[cell.task] = Cell(*where, (0,), cell.answers, given, rights, cell.choices)
    return list(found.values())
