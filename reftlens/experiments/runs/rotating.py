"""Questions of a finished run asked again with their options rotated: the answers lie beside its predictions.

The first rotation is the rows as they stand: their answers are among the predictions, and are not asked for again.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from reftlens.errors import StoreMismatch, check_one_of
from reftlens.experiments.answers.letters import rotations
from reftlens.experiments.rows.task import Row
from reftlens.experiments.runs.recipe import Trial
from reftlens.experiments.runs.records import METHOD_FOLDER, Prediction, RunFolder, lines_of
from reftlens.files import write_atomically
from reftlens.numbers import whole

ROTATED_FILE = "rotated.jsonl"
_ORDER = 0
"""Seed of the order in which test rows are taken: of a higher limit those of a lower one are a part."""


@dataclass(frozen=True)
class Rotations:
    """What is asked once for each rotation of its options."""

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    """Test rows of each task; all that the run has, if None."""
    ways: tuple[str, ...] = ()
    """Of answering; all of the recipe, if there are none here."""

    @staticmethod
    def of(asked: "str | Sequence[str] | Rotations") -> "Rotations":
        """Tasks by name, all of their rows in all ways, or what it already is."""
        if isinstance(asked, Rotations):
            return asked
        return Rotations((asked,) if isinstance(asked, str) else tuple(asked))

    def __post_init__(self) -> None:
        for name in ("tasks", "ways"):  # what is named twice is asked once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.limit is not None:
            whole(self.limit, "the limit of rotated rows", 1)
        if not self.tasks and (self.limit is not None or self.ways):
            raise ValueError(f"{self}: no task is named, expected some whose options are to be rotated")


@dataclass(frozen=True)
class Turned:
    """A row whose options were moved on by `by` places, and what was answered to it."""

    by: int
    choices: tuple[str, ...]
    """The names of its options."""
    prediction: Prediction

    @property
    def left_out(self) -> bool:
        """Whether it is not asked, as it has not as many options as most rows of its task."""
        return bool(self.prediction.details.get("left_out"))


def rotated_questions(trial: Trial, task: str, limit: int | None = None) -> tuple[list[list[Row]], list[Row]]:
    """All rotations of test rows of a task, and those that have not as many options as most, which are left out.

    Raises:
        ValueError: for a task that is not in the run, or whose rows have no options.
    """
    rows = trial.questions(task)
    (usual, _), *_ = Counter(len(row.choices) for row in rows).most_common()
    kept = [row for row in rows if len(row.choices) == usual]
    drawn = sorted(random.Random(_ORDER).sample(range(len(kept)), len(kept))[:limit])
    return rotations([kept[i] for i in drawn]), [row for row in rows if len(row.choices) != usual]


def ways_of(trial: Trial, request: Rotations) -> tuple[str, ...]:
    """The ways of answering that are asked for, all by default; `ValueError` for one that the recipe does not have."""
    for way in request.ways:
        check_one_of("way of answering", way, trial.ways)
    return request.ways or tuple(trial.ways)


def rotating_cost(trial: Trial, request: Rotations) -> Mapping[str, int]:
    """Tokens that are read for the answers to rotated rows, and written at most."""
    parts = [part for task in request.tasks for part in rotated_questions(trial, task, request.limit)[0][1:]]
    read, written = trial.tokens([row for part in parts for row in part], ways_of(trial, request))
    return {"tokens of rotated rows": read, "tokens written to them at most": written}


def ask_rotated(trial: Trial, folder: RunFolder, request: Rotations, *, progress: bool) -> None:
    """Ask what of it is not stored yet, rotation by rotation: one that was killed goes on behind the last."""
    stored, given = turned(folder), defaultdict[tuple[str, int, int], set[str]](set)
    for one in (*stored, *(Turned(0, (), p) for p in folder.predictions())):
        given[one.prediction.task, one.prediction.index, one.by] |= one.prediction.given.keys()
    known = {(one.prediction.task, one.prediction.index) for one in stored if one.left_out}
    units: list[tuple[int, str, list[Row]]] = []
    for task in request.tasks:
        every, left = rotated_questions(trial, task, request.limit)
        new = [row for row in left if (task, row.index) not in known]
        _add(folder, (Turned(0, r.choices, Prediction(task, r.index, r.answer, {}, {}, _LEFT_OUT)) for r in new))
        for way in ways_of(trial, request):
            for by, rows in enumerate(every):
                missing = [row for row in rows if way not in given[task, row.index, by]]
                units += [(by, way, missing)] if missing else []
    if units:
        trial.load(folder.path / METHOD_FOLDER)
    for by, way, rows in tqdm(units, desc="rotated", unit="rotation", disable=not progress):
        answers = zip(rows, trial.answers(rows, (way,)), strict=True)
        _add(folder, (Turned(by, row.choices, prediction) for row, prediction in answers))


_LEFT_OUT = {"left_out": True}


def turned(folder: RunFolder) -> list[Turned]:
    """All that is stored, in the order in which it was asked; of each way of answering there is one for each row.

    Raises:
        StoreMismatch: for a line that is no answer to a row.
    """
    path = folder.path / ROTATED_FILE
    return [_turned(line, f"{path}, line {number}") for number, line in enumerate(lines_of(path), 1)]


def _turned(line: str, place: str) -> Turned:
    try:
        told: dict[str, Any] = json.loads(line)
        return Turned(told.pop("by"), tuple(told.pop("choices")), Prediction(**told))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreMismatch(f"{place} is no answer to a rotated row ({error}): take the file away") from None


def _add(folder: RunFolder, some: Iterable[Turned]) -> None:
    """Put answers behind those that are there."""
    if every := list(some):
        path = folder.path / ROTATED_FILE
        before = path.read_bytes() if path.is_file() else b""
        write_atomically(path, before + _lines(every).encode())


def _lines(every: Sequence[Turned]) -> str:
    told = ({"by": one.by, "choices": one.choices, **asdict(one.prediction)} for one in every)
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in told)
