"""Tables out of stored predictions alone: scores with intervals, costs, and what is better than knowing nothing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.experiments.records import Prediction, finished_runs
from reftlens.experiments.scores import accuracy, difference
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, mean_of, over_two

MAJORITY, BASE = "majority answer", "base"
BASELINES = ((MAJORITY, ""), (BASE, "likelihood"), ("format-only", "written"))
"""Method and way of answering of what knows nothing of the task: the most frequent answer, the model as it is, and one
that was trained on the form of the answers alone, their labels dealt out anew."""

COSTS = ("parameters", "percent", "seconds_per_step", "peak_bytes", "bytes_on_disk")


@dataclass(frozen=True)
class Cell:
    """What one method answered to the test rows of one task in one way, with every seed."""

    recipe: str
    part: str
    method: str
    task: str
    way: str
    seeds: tuple[int, ...]
    answers: tuple[str, ...]
    given: tuple[tuple[str | None, ...], ...]
    """For each seed, for each row; nothing where a number of each row is reported."""
    rights: Float[Tensor, "seed row"]
    """1 where the answer is right; or the number of the row."""

    @property
    def name(self) -> str:
        """Method and way, in words."""
        return f"{self.method}, {self.way}" if self.way else self.method

    @property
    def score(self) -> Estimate:
        """Share of right answers, or mean of the numbers, with an interval over rows and, of several, seeds."""
        if len(self.rights) > 1:
            return over_two(self.rights)
        return accuracy(self.rights[0] == 1) if self.given else mean_of(self.rights[0])

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


@dataclass(frozen=True)
class Gain:
    """By how much more often a method is right than the best of what knows nothing of the task, paired by row."""

    task: str
    method: str
    to: str
    """The best of the `BASELINES` on this task."""
    difference: Estimate
    """With an interval by bootstrap over rows and seeds."""

    @property
    def better(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.difference.low > 0


@dataclass(frozen=True)
class Table:
    """Every method on every task."""

    cells: tuple[Cell, ...]
    costs: Mapping[str, Mapping[str, float]]
    """By `PART/METHOD`: trained parameters (without a head) and their share in percent, seconds per step, peak memory
    and size on disk in bytes; medians over the seeds."""

    def to_frame(self) -> DataFrame:
        """A row for each method, task and way of answering."""
        import pandas as pd

        rows = [
            {"recipe": c.recipe, "part": c.part, "method": c.method, "answered by": c.way, "task": c.task}
            | {"rows": len(c.answers), "seeds": len(c.seeds)}
            | c.score.as_columns("score")
            | dict(self.costs.get(f"{c.part}/{c.method}", {}))
            for c in self.cells
        ]
        return pd.DataFrame(rows)

    def gains(self, way: str = "written") -> tuple[Gain, ...]:
        """For each method and task the difference to the best of the `BASELINES` on it."""
        gains = []
        for task, cells in self._by_task().items():
            known = [c for c in cells if (c.method, c.way) in BASELINES]
            if not known:
                continue
            best = max(known, key=lambda c: c.rights.mean().item())
            for cell in cells:
                if cell.way == way and cell not in known and cell.method != BASE:
                    gains.append(Gain(task, cell.method, best.name, cell.less(best)))
        return tuple(gains)

    def to_markdown(self) -> str:
        """Scores and costs, a task in each column; then by how much methods are better than what knows nothing."""
        tasks = list(self._by_task())
        lines = ["| method | " + " | ".join(tasks) + " | mean | parameters | % | s per step |"]
        lines.append("|---" * (len(tasks) + 5) + "|")
        for name in dict.fromkeys(c.name for c in self.cells):
            mine = {c.task: c for c in self.cells if c.name == name}
            scores = [f"{mine[task].score:.3f}" if task in mine else "" for task in tasks]
            values = [c.score.value for c in mine.values()]
            mean = f"{sum(values) / len(values):.3f}" if len(values) == len(tasks) else ""
            lines.append(" | ".join([f"| {name}", *scores, mean, *self._cost_words(mine.values())]) + " |")
        return "\n".join([*lines, *_lines_of(self.gains())])

    def __repr__(self) -> str:
        lines = [f"{self.cells[0].recipe}: scores with 95 % intervals over rows and seeds"]
        for name in dict.fromkeys(c.name for c in self.cells):
            scores = ", ".join(f"{c.task} {c.score:.3f}" for c in self.cells if c.name == name)
            lines.append(f"{name}: {scores}")
        return figures.screenful(lines)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Scores with their intervals, tasks along the axis, a colour for each method and way of answering."""
        tasks = list(dict.fromkeys(c.task for c in self.cells if c.given))
        ax = figures.axes(ax)
        names = list(dict.fromkeys(c.name for c in self.cells if c.given))
        for i, name in enumerate(names):
            for cell in (c for c in self.cells if c.name == name):
                place = tasks.index(cell.task) + 0.8 * ((i + 0.5) / len(names) - 0.5)
                figures.interval(ax, place, cell.score, color=f"C{i}", label=name if cell.task == tasks[0] else None)
        ax.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        ax.set_ylabel("share of right answers")
        ax.legend(fontsize="small")
        return ax

    def _by_task(self) -> dict[str, list[Cell]]:
        tasks: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            tasks[cell.task].append(cell)
        return dict(tasks)

    def _cost_words(self, cells: Iterable[Cell]) -> list[str]:
        cost = next((self.costs[k] for c in cells if (k := f"{c.part}/{c.method}") in self.costs), {})
        number, percent, seconds = (cost.get(k) for k in ("parameters", "percent", "seconds_per_step"))
        return [
            "" if number is None else f"{number:,.0f}",
            "" if percent is None else f"{percent:.2g}",
            "" if seconds is None else f"{seconds:.2f}",
        ]


def _lines_of(gains: Sequence[Gain]) -> list[str]:
    if not gains:
        return []
    lines = [
        "",
        "| method | task | less the best that knows nothing of the task | which | better |",
        "|---|---|---|---|---|",
    ]
    for gain in gains:
        word = "yes" if gain.better else "not shown"
        lines.append(f"| {gain.method} | {gain.task} | {gain.difference:+.3f} | {gain.to} | {word} |")
    return lines


def table(folders: Iterable[str | Path]) -> Table:
    """The table of the finished runs in these folders, from what is stored there alone.

    Raises:
        FileNotFoundError: where a folder holds no finished run.
        ValueError: where two seeds of a method answered different rows.
    """
    runs = finished_runs(folders)
    groups: dict[tuple[str, str, str, str, str], dict[int, list[Prediction]]] = defaultdict(dict)
    costs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        config = run.config()
        recipe, part, method, seed = (config[k] for k in ("recipe", "part", "method", "seed"))
        costs[f"{part}/{method}"].append(run.metrics())
        for prediction in run.predictions():
            for way in (*prediction.given, *prediction.measures):
                groups[recipe, part, method, prediction.task, way].setdefault(seed, []).append(prediction)
    cells = [_cell(*key, by_seed) for key, by_seed in groups.items()]
    return Table((*_majorities(cells), *cells), {name: _medians(every) for name, every in costs.items()})


def _cell(recipe: str, part: str, method: str, task: str, way: str, by_seed: Mapping[int, list[Prediction]]) -> Cell:
    seeds, rows = tuple(sorted(by_seed)), [sorted(by_seed[s], key=lambda p: p.index) for s in sorted(by_seed)]
    if any([(p.index, p.answer) for p in r] != [(p.index, p.answer) for p in rows[0]] for r in rows):
        raise ValueError(f"the seeds of {method} answered different rows of {task}: give them folders of their own")
    answers = tuple(p.answer for p in rows[0])
    given = tuple(tuple(p.given[way] for p in r) for r in rows) if way in rows[0][0].given else ()
    rights = [[float(p.given[way] == p.answer) if given else p.measures[way] for p in r] for r in rows]
    return Cell(recipe, part, method, task, way, seeds, answers, given, torch.tensor(rights).double())


def _majorities(cells: Iterable[Cell]) -> list[Cell]:
    """Of each task whose answers repeat, the answer that is right most often, given to every row."""
    found = {}
    for cell in cells:
        counts = {a: cell.answers.count(a) for a in dict.fromkeys(cell.answers)}
        answer = max(counts, key=lambda a: counts[a])
        if cell.given and len(counts) <= len(cell.answers) / 4 and cell.task not in found:
            rights = torch.tensor([[float(a == answer) for a in cell.answers]]).double()
            given = ((answer,) * len(cell.answers),)
            where = (cell.recipe, cell.part, MAJORITY, cell.task, "")
            found[cell.task] = Cell(*where, (0,), cell.answers, given, rights)
    return list(found.values())


def _medians(metrics: list[dict[str, Any]]) -> dict[str, float]:
    columns = {name: [m[name] for m in metrics if m.get(name) is not None] for name in COSTS}
    return {name: torch.tensor(values).double().median().item() for name, values in columns.items() if values}
