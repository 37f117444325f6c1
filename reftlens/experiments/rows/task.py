"""A row of a data set as a model reads it, and a task: how records become rows, and texts become answers."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv")
"""Of the files of data sets: JSON lines, or a list of records in one JSON."""
_BY_TASK = "{name}/{split}.jsonl"
"""Where LLM-Adapters has its files, `boolq/test.json`."""


@dataclass(frozen=True)
class Row:
    """A question as the model reads it, and its answer.

    Args:
        task: the name of the data set.
        index: its number in the source, counted from 0 before anything is left out or sampled.
        prompt: what the model reads, with the template applied.
        completion: what training teaches after it, with the space or line break that it needs in front:
            `encode(model, [Example(row.prompt, row.completion)])` puts nothing between the two.
        answer: the gold answer in its canonical form, "solution1" or "42"; "" where any text may be one.
        choices: all canonical answers, where there are a few: those that a likelihood is compared of.
        fields: what else is known of it: `question`, `options`, and where it was read (`place`).
    """

    task: str
    index: int
    prompt: str
    completion: str
    answer: str
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def question(self) -> str:
        """What is asked, in lower-case letters and digits alone: rows with the same question are one question."""
        return " ".join(re.findall(r"\w+", str(self.fields.get("question", self.prompt)).lower()))


@dataclass(frozen=True)
class Task:
    """A data set: how its records become rows, and how what a model writes becomes an answer.

    Args:
        name: "piqa", say.
        family: "commonsense", say; a family shares a form of files, and a rule of extraction.
        row: `(record, index, place)` → `Row`; raises `ValueError`, with the place, for a record it cannot be.
        extract: `(text, row)` → the canonical answer that a model's text gives, or None.
        equal: `(answer, gold)` → whether they are the same.
        written: `(answer, row)` → the completion that says this canonical answer.
        hub: the data set on the Hugging Face hub.
        config: which of its configurations; None where it has none.
        splits: the names on the hub of "train", "test", … where they differ.
        files: files below the family's folder, by split, where they are not named by its layout.
        metrics: what it is scored by: accuracy, f1 (of the last of its choices), matthews, pearson, spearman.
        of_records: the task as its records show it, with their places, where they have to: its labels, say.
    """

    name: str
    family: str
    row: Callable[[Record, int, str], Row]
    extract: Callable[[str, Row], str | None]
    equal: Callable[[str, str], bool]
    written: Callable[[str, Row], str]
    hub: str | None = None
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    metrics: tuple[str, ...] = ("accuracy",)
    of_records: Callable[[Sequence[tuple[str, Any]]], "Task"] | None = None


@dataclass(frozen=True)
class Family:
    """Data sets that share a form of files.

    Args:
        tasks: those that are known by name.
        other: a task of this family for the name of a file that is not among them.
        layout: where the file of a task and split lies in the family's folder.
        whole: the same of a file that is not split; its rows are there to train on.
        stand_in: the same of a file of other rows, read with a warning where that of the training split is missing.
    """

    name: str
    tasks: Mapping[str, Task]
    other: Callable[[str], Task]
    layout: str = "{split}/{name}.jsonl"
    whole: str | None = None
    stand_in: str | None = None

    def task(self, name: str) -> Task:
        """The task of a name, also one that is known by its file alone."""
        return self.tasks.get(name) or self.other(name)

    def files(self, task: Task, split: str) -> tuple[str, ...]:
        """Where the rows of a split may lie, below the family's folder; each may have any of the `ENDINGS`."""
        named = task.files.get(split) or self.layout.format(name=task.name, split=split)
        others = (_BY_TASK, self.whole, self.stand_in) if split == "train" else (_BY_TASK,)
        layouts = (layout.format(name=task.name, split=split) for layout in others if layout)
        return tuple(dict.fromkeys((named, *layouts)))


def file_at(path: Path) -> Path | None:
    """The file of a name in `ENDINGS[0]`, or in another of them; None where there is none."""
    stem = path.name.removesuffix(ENDINGS[0])
    return next((file for ending in ENDINGS if (file := path.with_name(stem + ending)).is_file()), None)


def stem_of(path: Path) -> str | None:
    """The name of a file without its ending; None for one that is not of the `ENDINGS`."""
    return next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), None)


def digest_of(rows: Iterable[Row]) -> str:
    """SHA-256 over what rows ask and what is right."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps([row.task, row.index, row.prompt, row.completion, row.answer, row.choices]).encode())
    return sha.hexdigest()


def text_of(record: Record, name: str, place: str) -> str:
    """The text in a field.

    Raises:
        ValueError: where there is no such field, or no text in it.
    """
    if name not in record:
        raise ValueError(f"{place} has no field {name!r}, it has: {', '.join(map(str, record))}")
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {name} is {value!r}, expected text")
    return value


def one_of(value: Any, allowed: tuple[str, ...], name: str, place: str) -> str:
    """`value` as text, one of those allowed.

    Raises:
        ValueError: where it is none of them.
    """
    if value is None or not str(value).strip():
        raise ValueError(f"{place}: {name} is {value!r}, expected one of {', '.join(allowed)}")
    if str(value) not in allowed:
        raise ValueError(f"{place}: {name} {value!r} is outside the set, expected one of {', '.join(allowed)}")
    return str(value)
