"""Arithmetic word problems, answered in steps: a number, or one of the letters of AQuA."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from reftlens.experiments.answers.extraction import last_number, stated_letter
from reftlens.experiments.answers.numerals import equal_numbers
from reftlens.experiments.rows.families.worked import FINAL, LETTERS, read
from reftlens.experiments.rows.task import Family, Record, Row, Task
from reftlens.experiments.rows.templates import alpaca
from reftlens.numbers import whole


def arithmetic(
    name: str,
    hub: str | None = None,
    config: str | None = None,
    *,
    splits: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    calculator: bool = False,
) -> Task:
    """A task of this family: Alpaca's prompt around the problem, the steps as its completion.

    The answer is the last number of a text, equal to the gold one within 0.001; of rows with letters to choose among
    it is the letter that is stated. For the paper's rule, the first capital: `replace(task, extract=lambda text, row:
    first_capital(text, row.choices))`.

    Args:
        calculator: keeps GSM8K's calculator marks in the steps; they are nothing that a reader of the text needs.
    """
    return Task(
        name, "arithmetic", partial(_row, name, calculator), _extract, _equal,
        written=lambda answer, row: FINAL + answer,
        hub=hub, config=config, splits=splits or {}, files=files or {},
    )  # fmt: skip


def _row(name: str, calculator: bool, record: Record, index: int, place: str) -> Row:
    worked = read(record, place, calculator)
    choices = _letters(worked.question) if worked.answer in LETTERS else ()
    if choices and worked.answer not in choices:
        raise ValueError(f"{place}: answer {worked.answer!r} is outside the set, expected one of {', '.join(choices)}")
    completion = worked.steps or FINAL + worked.answer
    fields = {"question": worked.question, "steps": bool(worked.steps), "place": place}
    return Row(name, index, alpaca(worked.question), completion, worked.answer, choices, fields)


def _letters(question: str) -> tuple[str, ...]:
    """The letters that a question offers, "(A) 5 (B) 6" or "A)5 B)6"; all five where it lists none."""
    offered = re.findall(r"(?<!\w)\(?([A-E])\)", question)
    count = next((i for i, letter in enumerate(LETTERS) if letter not in offered), len(LETTERS))
    return LETTERS[:count] or LETTERS


def _extract(text: str, row: Row) -> str | None:
    return stated_letter(text, row.choices) if row.choices else last_number(text)


def _equal(answer: str, gold: str) -> bool:
    if answer in LETTERS or gold in LETTERS:
        return answer == gold
    return equal_numbers(answer, gold)


def truncated(rows: Sequence[Row], words: int) -> list[Row]:
    """Rows whose completions end after so many words, as they begin: only the way into an answer is then taught.

    Encode them with `end=False`, so that the cut is not taught as an end.
    """
    whole(words, "words", 1)
    return [replace(row, completion="".join(re.findall(r"\s*\S+", row.completion)[:words])) for row in rows]


_TASKS = (
    arithmetic("aqua", "deepmind/aqua_rat", "raw", files={"dev": "train/aqua_dev.jsonl"}, splits={"dev": "validation"}),
    arithmetic(
        "gsm8k", "openai/gsm8k", "main",
        files={"train": "train/gsm8k_train.jsonl", "dev": "train/gsm8k_dev300.jsonl"},
        splits={"dev": "train[-300:]", "train": "train[:-300]"},
    ),
    arithmetic("mawps", "mwpt5/MAWPS", files={"train": "train/mawps_train.jsonl"}),
    arithmetic("svamp", "ChilleD/SVAMP"),
    arithmetic("addsub"),
    arithmetic("singleeq"),
    arithmetic("multiarith", "ChilleD/MultiArith"),
    arithmetic("math10k", files={"train": "train/math10k_sample.jsonl"}),
)  # fmt: skip
FAMILY = Family("arithmetic", {task.name: task for task in _TASKS}, arithmetic)
