"""Settings of methods, chosen on dev rows before any seed is run: the same number of row-updates for every method."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from reftlens import figures
from reftlens.errors import NotFinite, StoreMismatch, TrainingDiverged
from reftlens.experiments.methods.method import frozen
from reftlens.experiments.methods.spaces import Space
from reftlens.experiments.runs.alike import differences, plain
from reftlens.experiments.runs.recipe import Setting
from reftlens.experiments.runs.records import RunFolder
from reftlens.figures import Axes, DataFrame

SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class Tried:
    """One setting, trained."""

    setting: Setting = field(hash=False)
    score: float | None
    """Of the dev rows, more is better; None where training diverged or the score is no finite number."""

    @property
    def worth(self) -> float:
        """The score; below all others where there is none."""
        return -math.inf if self.score is None else self.score


@dataclass(frozen=True)
class MethodSearch:
    """What a search tried, and what it took."""

    trials: tuple[Tried, ...]
    """In the order in which they were tried."""
    steps: int
    """Of each trial."""
    row_updates: int
    """Rows that optimizer steps saw, over all trials: equal for searches that are compared."""
    dev_rows: int
    measure: str = "score"

    @property
    def best(self) -> Tried:
        return max(self.trials, key=lambda tried: tried.worth)  # the first of equals

    @property
    def summary(self) -> str:
        """What was tried, what it took, and what was chosen, in a sentence."""
        without = sum(tried.score is None for tried in self.trials)
        return (
            f"{len(self.trials)} settings of {self.steps} steps, {self.row_updates:,} row-updates, one seed, chosen on "
            f"{self.dev_rows} dev rows: {_words(self.best.setting)}"
            + (f"; {without} without a finite score" if without else "")
        )

    def __repr__(self) -> str:
        lines = [self.summary, f"{self.measure} of each:"]
        for tried in self.trials:
            mark = "→" if tried is self.best else " "
            score = "no score" if tried.score is None else f"{tried.score:.4f}"
            lines.append(f"{mark} {score}: {_words(tried.setting)}")
        return figures.screenful(lines)

    def to_frame(self) -> DataFrame:
        """One row per setting."""
        return figures.table([{**t.setting, "score": t.score, "chosen": t is self.best} for t in self.trials])

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """The score of each setting over its learning rate; the chosen one filled."""
        ax = figures.axes(ax)
        scored = [t for t in self.trials if t.score is not None]
        rates, scores = [t.setting["lr"] for t in scored], [t.worth for t in scored]
        (dots,) = ax.plot(rates, scores, "o", markerfacecolor="none", label=label)
        ax.plot([self.best.setting["lr"]], [self.best.worth], "o", color=dots.get_color())
        ax.set(xlabel="learning rate", ylabel=f"{self.measure}, {self.dev_rows} dev rows", xscale="log")
        if label is not None:
            ax.legend(frameon=False)
        return ax


@runtime_checkable
class Attempt(Protocol):
    """A method with a setting, before training."""

    @property
    def row_updates(self) -> int: ...

    @property
    def dev_rows(self) -> int: ...

    def fit(self, checkpoint: Path | None, *, progress: bool) -> object: ...

    def dev_score(self) -> float: ...


def search(
    space: Space,
    attempt: Callable[[Setting], Attempt],
    *,
    of: Mapping[str, Any],
    steps: int,
    folder: Path | None,
    desc: str,
    measure: str = "score",
    progress: bool,
) -> MethodSearch:
    """Train and score each setting of a space once; in a folder, whatever `search.json` there does not yet tell.

    Args:
        of: all that the scores depend on, the setting excepted.

    Raises:
        StoreMismatch: where the file in the folder is of another search.
        NotFinite: where no setting has a finite score.
    """
    tries = _Tries(None if folder is None else RunFolder(folder), {**of, "space": space.choices}, steps)
    with tqdm(total=space.trials, desc=desc, unit="trial", disable=not progress) as bar:
        for setting in space.settings(tries.best):
            if tries.of(setting) is None:
                tries.add(setting, attempt(setting))
            bar.update()
    found = search_of(tries.told, measure)
    if found.best.score is None:
        raise NotFinite(f"{desc}: none of {space.trials} settings has a finite score: look at its data and rates")
    return found


def searches_in(folder: Path) -> list[tuple[Path, MethodSearch]]:
    """Each search below a folder, with its file."""
    files = sorted(folder.rglob(SEARCH_FILE))
    return [(file, search_of(_told(RunFolder(file.parent)))) for file in files]


def _told(folder: RunFolder) -> dict[str, Any]:
    """What the file in a folder tells, with a trial or more; nothing where there is none."""
    told, file = folder.read(SEARCH_FILE), folder.path / SEARCH_FILE
    try:
        if file.is_file() and not search_of(told).trials:
            raise ValueError("no trial")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreMismatch(f"{file} is no search ({error!r}): take it away, and the search is run again") from None
    return told


def search_of(told: Mapping[str, Any], measure: str = "score") -> MethodSearch:
    """What a `search.json` tells."""
    trials = tuple(Tried(_read(each["setting"]), each["score"]) for each in told["tried"])
    return MethodSearch(trials, told["steps"], told["row_updates"], told["rows"], measure)


class _Tries:
    """The settings that were tried, and the file that tells them."""

    def __init__(self, folder: RunFolder | None, of: Mapping[str, Any], steps: int) -> None:
        wanted = plain(of)
        self.folder, self.steps = folder, steps
        self.told: dict[str, Any] = (_told(folder) if folder else {}) or {"tried": []}
        if folder and (seen := differences(self.told.setdefault("of", wanted), wanted)):
            file = folder.path / SEARCH_FILE
            raise StoreMismatch(f"{file} is of another search ({seen}): take it away, or choose another folder")

    def of(self, setting: Setting) -> Tried | None:
        """What became of a setting, if it was tried."""
        wanted = plain(setting)
        return next((Tried(**each) for each in self.told["tried"] if plain(each["setting"]) == wanted), None)

    def best(self, some: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return max(some, key=lambda setting: tried.worth if (tried := self.of(setting)) else -math.inf)

    def add(self, setting: Setting, attempt: Attempt) -> None:
        """Train a setting and write down how well it does; nothing, where that is no finite number."""
        try:
            attempt.fit(None, progress=False)
            score = attempt.dev_score()
        except (TrainingDiverged, NotFinite):
            score = math.nan
        self.told["tried"].append({"setting": dict(setting), "score": score if math.isfinite(score) else None})
        updates = len(self.told["tried"]) * attempt.row_updates
        self.told |= {"rows": attempt.dev_rows, "row_updates": updates, "steps": self.steps}
        if self.folder:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.write(SEARCH_FILE, self.told)


def _read(setting: Setting) -> Setting:
    return {name: frozen(value) for name, value in setting.items()}


def _words(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())
