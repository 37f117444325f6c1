"""What answers to rotated rows say of every method: a liking for the name of an option, or knowing the option."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from reftlens import figures
from reftlens.experiments.answers.letters import LetterBias, bias_of
from reftlens.experiments.runs.records import RunFolder, add_seed
from reftlens.experiments.runs.rotating import Turned, turned
from reftlens.figures import Axes, DataFrame


@dataclass(frozen=True)
class Letters:
    """What one method answered to all rotations of the rows of one task in one way, with every seed."""

    recipe: str
    part: str
    method: str
    task: str
    way: str
    seeds: tuple[int, ...]
    questions: int
    """Those that every seed answered in every rotation."""
    pending: int
    """Those that some seed was not asked in some rotation yet; they are not counted."""
    left_out: int
    """Rows that have not as many options as most of the task; they are not asked."""
    bias: LetterBias | None
    """None where no question was asked in every rotation yet."""

    @property
    def name(self) -> str:
        """Method and way, in words."""
        return f"{self.method}, {self.way}"


@dataclass(frozen=True)
class LetterTable:
    """The liking for names of every method whose rows were asked in every rotation."""

    lines: tuple[Letters, ...]

    def to_frame(self) -> DataFrame:
        """A row for each method, way and task, and what is told of its answers: see `LetterBias.to_frame`."""
        import pandas as pd

        frames = []
        for one in self.lines:
            where = {"recipe": one.recipe, "part": one.part, "method": one.method, "answered by": one.way}
            where |= {"task": one.task, "questions": one.questions, "seeds": len(one.seeds)}
            where |= {"pending": one.pending, "left out": one.left_out}
            told = pd.DataFrame([{}]) if one.bias is None else one.bias.to_frame()
            frames.append(pd.DataFrame([where] * len(told)).join(told))
        return pd.concat(frames, ignore_index=True)

    def to_markdown(self) -> str:
        """A row for each method, way of answering and task, the names of options in their order along it."""
        count = max((len(one.bias.shares) for one in self.lines if one.bias), default=0)
        names = [f"option {i} named" for i in range(1, count + 1)]
        columns = ["method", "task", "rows", *names, "no option named", "accuracy over rotations", "same option in all"]
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for one in self.lines:
            if one.bias:
                shares = [f"{share:.2f}" for share in one.bias.shares.values()]
                values = [one.name, one.task, str(one.questions), *shares, *[""] * (count - len(shares))]
                values += [f"{_silent(one.bias):.2f}", f"{one.bias.accuracy:.3f}", f"{one.bias.consistent:.2f}"]
                lines.append("| " + " | ".join(values) + " |")
        return "\n".join([*lines, *(["", *(f"- {note}" for note in self.notes)] if self.notes else [])])

    @property
    def notes(self) -> list[str]:
        """What is not in the table, in sentences."""
        left = {one.task: one.left_out for one in self.lines if one.left_out}
        notes = [f"{task}: {n} left out, with not as many options as most of its rows" for task, n in left.items()]
        pending = [f"{one.name}, {one.task}: {one.pending}" for one in self.lines if one.pending]
        notes += [f"not asked in every rotation yet, and not counted: {'; '.join(pending)}"] if pending else []
        return notes

    def __repr__(self) -> str:
        lines = ["options rotated: shares of answers that name the first, the second, …, with 95 % intervals"]
        for one in self.lines:
            if one.bias:
                shares = ", ".join(str(share) for share in one.bias.shares.values())
                lines.append(
                    f"{one.name}, {one.task}: {shares}; accuracy {one.bias.accuracy}; the same option in all rotations "
                    f"{one.bias.consistent}; {one.questions} rows"
                )
        return figures.screenful([*lines, *self.notes])

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Shares of names with intervals, method by method along the axis, a colour for each place of an option."""
        ax = figures.axes(ax)
        known = [(one, one.bias) for one in self.lines if one.bias]
        for place, (_, bias) in enumerate(known):
            for i, share in enumerate(bias.shares.values()):
                beside = place + 0.6 * ((i + 0.5) / len(bias.shares) - 0.5)
                label = f"option {i + 1}" if place == 0 else None
                figures.interval(ax, beside, share, color=figures.look(i)[0], label=label)
            level = 1 / len(bias.shares)
            ax.plot([place - 0.4, place + 0.4], [level, level], color=figures.GREY, linestyle="--", linewidth=1)
        names = [f"{one.name}\n{one.task}" for one, _ in known]
        ax.set_xticks(range(len(known)), names, rotation=30, ha="right", fontsize="small")
        ax.set_ylabel("share of answers, over all rotations")
        if known:
            ax.legend(fontsize="small")
        return ax


def letter_table(runs: Iterable[RunFolder]) -> LetterTable | None:
    """The table of runs, from what is stored alone; None where no row was rotated.

    Raises:
        ValueError: where two of the runs are of one method and seed.
    """
    groups: dict[tuple[str, str, str, str, str], dict[int, _Given]] = defaultdict(dict)
    for run in runs:
        config = run.config()
        recipe, part, method, seed = (config[k] for k in ("recipe", "part", "method", "seed"))
        for (task, way), given in _given(run).items():
            add_seed(groups[recipe, part, method, task, way], seed, given, run)
    return LetterTable(tuple(_letters(*key, by_seed) for key, by_seed in groups.items())) if groups else None


@dataclass(frozen=True)
class _Given:
    """What one run answered to the rows of one task in one way."""

    names: tuple[str, ...]
    answers: dict[tuple[int, int], tuple[str, str | None]]
    """By row and rotation: the right answer, and the one that was given."""
    left_out: int

    @property
    def whole(self) -> set[int]:
        """Rows that were asked in every rotation."""
        rows = {row for row, _ in self.answers}
        return {row for row in rows if all((row, by) in self.answers for by in range(len(self.names)))}


def _given(run: RunFolder) -> dict[tuple[str, str], _Given]:
    """By task and way of answering; only ways in which rotated rows were asked."""
    stored = turned(run)
    left = {(one.prediction.task, one.prediction.index) for one in stored if one.left_out}
    asked = [one for one in stored if not one.left_out]
    names = {(one.prediction.task, one.prediction.index): one.choices for one in asked}
    first = [
        Turned(0, names[key], p) for p in (run.predictions() if stored else []) if (key := (p.task, p.index)) in names
    ]
    found: dict[tuple[str, str], _Given] = {}
    for one in asked:
        p = one.prediction
        for way in p.given:
            empty = _Given(one.choices, {}, sum(task == p.task for task, _ in left))
            found.setdefault((p.task, way), empty)
    for one in (*first, *asked):
        p = one.prediction
        for way, answer in p.given.items():
            if (p.task, way) in found:
                found[p.task, way].answers[p.index, one.by] = (p.answer, answer)
    return found


def _letters(recipe: str, part: str, method: str, task: str, way: str, by_seed: dict[int, _Given]) -> Letters:
    seeds = sorted(seed for seed, given in by_seed.items() if given.whole)
    some = [by_seed[seed] for seed in seeds]
    rows = sorted(set.intersection(*(given.whole for given in some))) if some else []
    every = {row for given in by_seed.values() for row, _ in given.answers}
    first = next(iter(by_seed.values()))
    turns = range(len(first.names))
    bias = None
    if rows:
        given = [[[one.answers[row, by][1] for row in rows] for by in turns] for one in some]
        bias = bias_of(first.names, given, [[some[0].answers[row, by][0] for row in rows] for by in turns])
    left_out = max(given.left_out for given in by_seed.values())
    where = (recipe, part, method, task, way, tuple(seeds))
    return Letters(*where, len(rows), len(every) - len(rows), left_out, bias)


def _silent(bias: LetterBias) -> float:
    """Share of answers that name no option."""
    return max(0.0, 1 - sum(share.value for share in bias.shares.values()))
