"""Rows of the data sets that ReFT was judged by, from local files or from the hub, and parts of them."""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, SupportsIndex

from reftlens.errors import index_of
from reftlens.experiments.rows.families import arithmetic, commonsense, glue, instruction
from reftlens.experiments.rows.task import ENDINGS, Family, Row, Task, file_at, stem_of
from reftlens.files import located
from reftlens.numbers import whole
from reftlens.selection.splitting import split_groups
from reftlens.text.loading import Source, records

__all__ = ["FAMILIES", "TASKS", "Row", "Task", "load_rows", "split", "task_of", "without_leaks"]

Placed = tuple[str, Any]
"""A record, behind its place in the source."""
_SPLITS = ("train", "validation", "dev", "test")
_FAMILIES = (commonsense.FAMILY, arithmetic.FAMILY, instruction.FAMILY, glue.FAMILY)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
TASKS: dict[str, Task] = {name: task for family in FAMILIES.values() for name, task in family.tasks.items()}


def load_rows(
    task: str | Task,
    split: str = "train",
    *,
    data: Source | None = None,
    limit: SupportsIndex | None = None,
    seed: SupportsIndex = 0,
    leaks: bool = False,
) -> list[Row]:
    """Rows of a data set, in the order of the source.

    Args:
        task: a name in `TASKS`; or that of a file in a family's folder, which is read as that family's.
        split: "train", "test", …; "validation" and "dev" where there is one.
        data: a folder with `FAMILY/{train,test}/TASK.jsonl` in it, or .json, .csv, .jsonl.gz; the family's folder
            itself; a file; or records (a list, a frame, a split of a data set); None is the hub, through `datasets`.
        limit: so many rows, drawn by `seed`, the same ones each time; all, if None or if there are fewer.
        leaks: keeps rows whose field `in_test` says that a test set holds the same question.

    Raises:
        ValueError: for an unknown task, and, naming file and line, for a row that the task cannot have.
    """
    source, known, seen = _source(task, split, data)
    known = known.of_records(seen) if known.of_records and seen else known
    rows = [
        _row(known, record, index, place)
        for index, (place, record) in enumerate(source)
        if leaks or not (isinstance(record, Mapping) and _is_tested(record.get("in_test")))
    ]
    if not rows:
        place = known.hub if data is None else data if isinstance(data, str | Path) else type(data).__name__
        hint = " but those that a test set holds, by their field 'in_test'" if source else ""
        raise ValueError(f"no rows of {known.name} in {place}, {split}{hint}")
    if limit is None or (count := whole(limit, "limit", 1)) >= len(rows):
        return rows
    drawn = random.Random(whole(seed, "seed")).sample(range(len(rows)), count)
    return [rows[i] for i in sorted(drawn)]


def without_leaks(rows: Sequence[Row], test: Sequence[Row]) -> list[Row]:
    """Rows whose question is not among those of the test rows: the same letters and digits, whatever the marks."""
    asked = {row.question for row in test}
    return [row for row in rows if row.question not in asked]


def warn_of_leaks(rows: Sequence[Row], test: Sequence[Row]) -> None:
    """Warn where training rows ask what test rows ask, which no flag of their file says."""
    apart = {row.question for row in without_leaks(rows, test)}
    if leaks := [row for row in rows if row.question not in apart]:
        warnings.warn(
            f"{len(leaks)} of {len(rows)} training rows ask what a test row asks, the first is row {leaks[0].index} of "
            f"{leaks[0].task}, {leaks[0].question[:60]!r}: what is reported is too good by them",
            stacklevel=4,
        )


def split(
    rows: Sequence[Row], shares: Mapping[str, float] | None = None, *, seed: SupportsIndex = 0
) -> dict[str, list[Row]]:
    """Rows in parts of about these shares (halves, "dev" and "test"); those with the same question stay together."""
    shares = {"dev": 0.5, "test": 0.5} if shares is None else shares
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares={dict(shares)}, expected parts with shares above 0 that sum to 1")
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(row.question, len(numbers)) for row in rows]
    parts = split_groups(groups, tuple(shares.values()), whole(seed, "seed"))
    return {name: [rows[i] for i in part] for name, part in zip(shares, parts, strict=True)}


def task_of(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: if it is not in `TASKS`; the message says which are, and the nearest.
    """
    index_of(list(TASKS), name, "task")
    return TASKS[name]


def check_family(name: str, family: str) -> None:
    """Refuse a task of another family, whose rows are asked and read by other rules.

    Raises:
        ValueError: naming its family, and the tasks of the one that is expected.
    """
    if name in TASKS and TASKS[name].family != family:
        expected = f"expected one of {', '.join(FAMILIES[family].tasks)}, or the name of a file of {family}"
        raise ValueError(f"{name} is a task of {TASKS[name].family}: {expected}")


def _is_tested(value: Any) -> bool:
    """Whether `in_test` names a test set, or says yes: as JSON has it, as text in a CSV, or NaN in a frame for none."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "[]", "false", "0", "nan", "none", "null")
    if isinstance(value, float):
        return value == value and bool(value)
    return len(value) > 0 if isinstance(value, Sized) else bool(value)


def _source(task: str | Task, split: str, data: Source | None) -> tuple[list[Placed], Task, list[Placed]]:
    """The records with their places, the task that they are of, and all records of it that are there."""
    name = task if isinstance(task, str) else task.name
    known = task if isinstance(task, Task) else TASKS.get(task)
    if data is None:
        known = known or task_of(name)
        return (found := list(_hub_records(known, split))), known, found
    if not isinstance(data, str | Path):
        return (found := list(records(data))), known or task_of(name), found
    path = located(data)
    if not path.exists():
        raise ValueError(f"data={str(data)!r}: there is no such file or folder")
    if path.is_file():
        return (found := list(records(path))), known or _family_of(path).other(name), found
    file, known = _found(path, name, known, split)
    family, found = FAMILIES[known.family], list(records(file))
    if family.stand_in and file_at(file.parent / Path(family.stand_in).name) == file:
        words = f"{file} is not the training split of {known.name}, as its name says: no published score compares"
        warnings.warn(f"{words} to what is trained on it; see that none of its rows is tested", stacklevel=3)
    others = [f for s in _SPLITS for f in _places(path, family, known, s) if known.of_records and f != file]
    return found, known, [*found, *(each for other in dict.fromkeys(others) for each in records(other))]


def _places(folder: Path, family: Family, task: Task, split: str) -> list[Path]:
    """The files of a task and split below a folder, which holds the families or is one of theirs."""
    named = (parent / file for parent in (folder / family.name, folder) for file in family.files(task, split))
    return [file for name in named if (file := file_at(name))]


def _found(folder: Path, name: str, known: Task | None, split: str) -> tuple[Path, Task]:
    """The file of a task below a folder, which holds the families or is one of theirs."""
    families = FAMILIES.values() if known is None else (FAMILIES[known.family],)
    tasks = {family.name: known or family.other(name) for family in families}
    for family in families:
        for file in _places(folder, family, tasks[family.name], split):
            # Of a folder that is called otherwise, what is in the file says whose it is.
            if known or family.name in file.parts or _family_of(file) is family:
                return file, tasks[family.name]
    looked = [
        parent / file
        for family in families
        for parent in (folder / family.name, folder)
        for file in family.files(tasks[family.name], split)
    ]
    there = sorted({stem for place in looked for file in place.parent.glob("*") if (stem := stem_of(file))})
    if known is None:
        index_of([*TASKS, *(n for n in there if n not in TASKS)], name, "task")
    raise ValueError(
        f"no {split} rows of {name}: looked for {', '.join(map(str, dict.fromkeys(looked)))}, or with the endings "
        f"{', '.join(ENDINGS[1:])}; there are: {', '.join(there) or 'none'}"
    )


def _row(task: Task, record: Any, index: int, place: str) -> Row:
    """A row; what is none says of which family it would be one."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} is no record with fields: {str(record)[:60]!r}")
    try:
        return task.row(record, index, place)
    except ValueError as error:
        others = [name for name, family in FAMILIES.items() if name != task.family and _reads(family, record, place)]
        hint = f"; it would be a row of {others[0]}, and {task.name} is of {task.family}" if others else ""
        raise ValueError(f"{error}{hint}") from None


def _reads(family: Family, record: Any, place: str) -> bool:
    return not _objection(family, record, place)


def _objection(family: Family, record: Any, place: str) -> str:
    """Why a record is no row of a family; nothing where it is one."""
    try:
        family.other("_").row(record, 0, place)
    except ValueError as error:
        return str(error).removeprefix(place).lstrip(": ")
    return ""


def _family_of(file: Path) -> Family:
    """The family whose tasks can read the first record of a file."""
    place, record = next(islice(records(file), 1), (str(file), None))
    if record is None:
        raise ValueError(f"{file} is empty, expected a record on each line")
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} is no record with fields: {str(record)[:60]!r}")
    objections = {name: _objection(family, record, place) for name, family in FAMILIES.items()}
    if all(objections.values()):
        why = "".join(f"\n  {name}: {words}" for name, words in objections.items())
        raise ValueError(f"{place} is a row of none of {', '.join(FAMILIES)}:{why}")
    return next(FAMILIES[name] for name, words in objections.items() if not words)


def _hub_records(task: Task, split: str) -> Iterator[tuple[str, Any]]:
    if task.hub is None:
        raise ValueError(f"{task.name} has no data set on the hub that is known here: pass data=, a file or folder")
    from datasets import load_dataset

    name = task.splits.get(split, split)
    try:
        rows = load_dataset(task.hub, task.config, split=name)
    except Exception as error:  # of `datasets`, of the hub's client, of the network: many kinds
        raise ValueError(
            f"{task.hub}, split {name!r}, could not be loaded ({error}): pass data=, a file or folder, where there is "
            "no network"
        ) from error
    return ((f"{task.hub}, {name} row {i}", record) for i, record in enumerate(rows))
