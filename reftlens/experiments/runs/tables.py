"""Tables out of stored predictions alone: scores with intervals, costs, and what is better than knowing nothing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reftlens import figures
from reftlens.experiments.runs.alike import check_alike
from reftlens.experiments.runs.cells import MAJORITY, Cell, cells_of, majorities
from reftlens.experiments.runs.letter_tables import LetterTable, letter_table
from reftlens.experiments.runs.records import Prediction, add_seed, finished_runs, unpacked
from reftlens.experiments.runs.searching import searches_in
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate

BASE = "base"
BASELINES = ((MAJORITY, ""), (BASE, "likelihood"), ("format-only", "written"))
"""Method and way of answering of what knows nothing of the task: the most frequent answer, the model as it is, and one
that was trained on the form of the answers alone, their labels dealt out anew."""

COSTS = ("parameters", "percent", "seconds_per_step", "peak_bytes", "bytes_on_disk")


@dataclass(frozen=True)
class Gain:
    """By how much more often a method is right than another, paired by row."""

    recipe: str
    task: str
    method: str
    to: str
    """The best of the `BASELINES` on this task, or what was asked for; with its way of answering."""
    difference: Estimate
    """With an interval by bootstrap over rows and seeds."""

    @property
    def better(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.difference.low > 0

    @property
    def worse(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Table:
    """Every method on every task."""

    cells: tuple[Cell, ...]
    costs: Mapping[str, Mapping[str, float]]
    """By `RECIPE/PART/METHOD`: trained parameters (without a head) and their share in percent, seconds per step, peak
    memory and size on disk in bytes; medians over the seeds."""
    searches: tuple[str, ...] = ()
    """Of each method whose settings were chosen first, what was tried and taken, a sentence."""
    letters: LetterTable | None = None
    """What was answered with the options rotated, where it was asked."""

    def to_frame(self) -> DataFrame:
        """A row for each method, task and way of answering."""
        import pandas as pd

        rows = [
            {"recipe": c.recipe, "part": c.part, "method": c.method, "answered by": c.way, "task": c.task}
            | {"metric": c.metric, "rows": len(c.answers), "seeds": len(c.seeds)}
            | c.score.as_columns("score")
            | dict(self.costs.get(f"{c.recipe}/{c.part}/{c.method}", {}))
            for c in self.cells
        ]
        return pd.DataFrame(rows)

    def gains(self, way: str = "written") -> tuple[Gain, ...]:
        """For each method and task the difference to the best of the `BASELINES` on it, whatever the recipe."""
        gains = list[Gain]()
        columns: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            columns[cell.column].append(cell)
        for cells in columns.values():
            known = [c for c in cells if (c.method, c.way) in BASELINES and c.metric == "accuracy"]
            if not known:
                continue
            best = max(known, key=lambda c: c.rights.mean().item())
            for cell in cells:
                if cell.way == way and cell not in known and cell.method != BASE:
                    gains.append(Gain(cell.recipe, cell.task, cell.method, best.name, cell.less(best)))
        return tuple(gains)

    def against(self, method: str) -> tuple[Gain, ...]:
        """For each task what every other method has more than `method`, answering in the same way: accuracy, or the
        mean of a number of each row; paired by row and seed. Correlations have no difference row by row.

        Raises:
            ValueError: for a method that is not here, or one that answered other rows or has none of the seeds.
        """
        if method not in (names := dict.fromkeys(c.method for c in self.cells)):
            raise ValueError(f"no method {method!r} in this table, expected one of {', '.join(names)}")
        paired = [c for c in self.cells if c.metric in ("accuracy", "mean")]
        others = {(c.recipe, c.part, c.column, c.way): c for c in paired if c.method == method}
        return tuple(
            Gain(cell.recipe, cell.column, cell.name, other.name, cell.less(other))
            for cell in paired
            if (other := others.get((cell.recipe, cell.part, cell.column, cell.way))) and cell.method != method
        )

    def to_markdown(self, against: str | None = None) -> str:
        """Scores, a task in each column, with their mean, to which a task with several scores gives its first; costs,
        from the least to the most of several parts; gains over what knows nothing of the task, and over the method
        `against`; `letters`."""
        tasks = list(dict.fromkeys(c.column for c in self.cells))
        lines = ["| method | " + " | ".join(tasks) + " | mean | parameters | % | s per step |"]
        lines.append("|---" * (len(tasks) + 5) + "|")
        for name, cells in self._by_row().items():
            mine = {c.column: f"{c.score:.3f}" for c in cells}
            values = [*(mine.get(task, "") for task in tasks), self._mean(cells), *self._cost_words(cells)]
            lines.append(" | ".join([f"| {name}", *values]) + " |")
        if self.searches:
            lines += ["", "Settings were chosen for these, for the others they are the recipe's:", ""]
            lines += [f"- {line}" for line in self.searches]
        letters = ["", self.letters.to_markdown()] if self.letters else []
        lines += self._gain_lines(self.gains(), "the best that knows nothing of the task")
        lines += self._gain_lines(self.against(against), against) if against else []
        return "\n".join([*lines, *letters])

    def __repr__(self) -> str:
        recipes = ", ".join(dict.fromkeys(c.recipe for c in self.cells))
        lines = [f"{recipes}: scores with 95 % intervals over rows and seeds"]
        for name, cells in self._by_row().items():
            lines.append(f"{name}: {', '.join(f'{c.column} {c.score:.3f}' for c in cells)}")
        return figures.screenful(lines)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Scores with their intervals, tasks along the axis, a colour and marker for each method and way."""
        tasks = list(dict.fromkeys(c.column for c in self.cells if c.given))
        answered = {name: [c for c in cells if c.given] for name, cells in self._by_row().items()}
        names = {name: cells for name, cells in answered.items() if cells}
        size = {"width": max(6.0, 3.0 + 0.12 * len(tasks) * len(names)), "height": max(3.6, 1.0 + 0.2 * len(names))}
        ax = figures.axes(ax, **size)  # with room for the legend beside it
        for i, (name, cells) in enumerate(names.items()):
            color, marker = figures.look(i)
            for cell in cells:
                place = tasks.index(cell.column) + 0.8 * ((i + 0.5) / len(names) - 0.5)
                label = name if cell is cells[0] else None
                figures.interval(ax, place, cell.score, color=color, marker=marker, label=label)
        ax.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        ax.set_ylabel("score")
        if names:
            ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        return ax

    def _by_row(self) -> dict[str, list[Cell]]:
        """By method and way of answering; and by recipe, where there are several."""
        rows: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            rows[cell.name if cell.method == MAJORITY else f"{self._prefix(cell.recipe)}{cell.name}"].append(cell)
        return dict(rows)

    def _prefix(self, recipe: str) -> str:
        return f"{recipe}: " if len({c.recipe for c in self.cells}) > 1 else ""

    def _mean(self, cells: Sequence[Cell]) -> str:
        """Over tasks, each by the first of its scores; empty where a task of the recipe was not answered."""
        firsts = {c.task: c.score.value for c in reversed(cells) if c.given}
        asked = {c.task for c in self.cells if c.given and c.recipe == cells[0].recipe}
        return f"{sum(firsts.values()) / len(firsts):.3f}" if firsts.keys() == asked and firsts else ""

    def _cost_words(self, cells: Iterable[Cell]) -> list[str]:
        """Of parts that cost differently, from the least to the most."""
        names = dict.fromkeys(f"{c.recipe}/{c.part}/{c.method}" for c in cells)
        costs = [self.costs[name] for name in names if name in self.costs]
        words = []
        for column, form in (("parameters", ",.0f"), ("percent", ".2g"), ("seconds_per_step", ".2f")):
            values = sorted(cost[column] for cost in costs if column in cost)
            ends = dict.fromkeys(format(value, form) for value in (*values[:1], *values[-1:]))
            words.append(" to ".join(ends))
        return words

    def _gain_lines(self, gains: Sequence[Gain], to: str) -> list[str]:
        lines = ["", f"| method | task | less {to} | which | better |", "|---|---|---|---|---|"]
        for gain in gains:
            word = "yes" if gain.better else "no, worse" if gain.worse else "not shown"
            name = f"{self._prefix(gain.recipe)}{gain.method}"
            lines.append(f"| {name} | {gain.task} | {gain.difference:+.3f} | {gain.to} | {word} |")
        return lines if gains else []


def table(folders: Iterable[str | Path]) -> Table:
    """The table of the finished runs in these folders, or zip files of such, from what is stored there alone.

    Raises:
        FileNotFoundError: where a folder holds no finished run.
        StoreMismatch: where the runs are of different models, or the seeds of a method have different settings.
        ValueError: where two seeds of a method answered different rows, or two runs are of one method and seed.
    """
    groups: dict[tuple[str, str, str, str, str], dict[int, list[Prediction]]] = defaultdict(dict)
    costs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    choices: dict[str, tuple[str, ...]] = {}
    with unpacked(folders) as paths:
        searches = tuple(
            f"{file.parent.relative_to(path)}: {search.summary}" for path in paths for file, search in searches_in(path)
        )
        runs = finished_runs(paths)
        check_alike((run.path, run.config()) for run in runs)
        letters = letter_table(runs)
        for run in runs:
            config = run.config()
            recipe, part, method, seed = (config[k] for k in ("recipe", "part", "method", "seed"))
            costs[f"{recipe}/{part}/{method}"].append(run.metrics())
            choices |= {task: tuple(names) for task, names in config.get("choices", {}).items()}
            answered: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
            for prediction in run.answered():
                for way in (*prediction.given, *prediction.measures):
                    answered[prediction.task, way].append(prediction)
            for (task, way), predictions in answered.items():
                add_seed(groups[recipe, part, method, task, way], seed, predictions, run)
    cells = [cell for key, by_seed in groups.items() for cell in cells_of(*key, by_seed, choices.get(key[3]))]
    medians = {name: _medians(every) for name, every in costs.items()}
    return Table((*majorities(cells), *cells), medians, searches, letters)


def _medians(metrics: list[dict[str, Any]]) -> dict[str, float]:
    columns = {name: [m[name] for m in metrics if m.get(name) is not None] for name in COSTS}
    return {name: torch.tensor(values).double().median().item() for name, values in columns.items() if values}
