"""Commonsense questions with a few choices, in the form of LLM-Adapters or as the hub gives them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from operator import eq
from typing import Any

from reftlens.experiments.answers.extraction import TRIGGER, after_trigger
from reftlens.experiments.rows import templates
from reftlens.experiments.rows.task import Family, Record, Row, Task, one_of, text_of

_FORMAT = re.compile(r"\s*Answer format:\s*(\S+/\S+)\s*$")


def _task(
    name: str,
    hub: str | None = None,
    config: str | None = None,
    splits: Mapping[str, str] | None = None,
    template: Callable[[Record, str], templates.Form] | None = None,
    choices: tuple[str, ...] = (),
) -> Task:
    return Task(
        name, "commonsense", partial(_row, name, template, choices),
        extract=lambda text, row: after_trigger(text, row.choices),
        equal=eq,
        written=lambda answer, row: TRIGGER + answer,
        hub=hub, config=config, splits=splits or {},
    )  # fmt: skip


def _row(
    name: str,
    template: Callable[[Record, str], templates.Form] | None,
    choices: tuple[str, ...],
    record: Record,
    index: int,
    place: str,
) -> Row:
    """A record of LLM-Adapters as it is; of the hub through the template."""
    if "instruction" in record or template is None:
        instruction, answer = _instruction(record, place), record.get("answer")
    else:
        instruction, answer = template(record, place)
    offered = _choices(instruction, place)
    if choices and offered[: len(choices)] != choices:
        raise ValueError(
            f"{place} asks for one of {', '.join(offered)}, and {name} asks for {', '.join(choices)}: "
            "a file of another task"
        )
    answer = one_of(answer, offered, "answer", place)
    fields = {**_parts(instruction, offered), "place": place}
    return Row(name, index, instruction + "\n", TRIGGER + answer, answer, offered, fields)


def _instruction(record: Record, place: str) -> str:
    if record.get("input"):
        raise ValueError(f"{place}: input is {record['input']!r}, expected none: commonsense questions have no input")
    return text_of(record, "instruction", place)


def _choices(instruction: str, place: str) -> tuple[str, ...]:
    """The answers that the last line of an instruction offers."""
    found = _FORMAT.search(instruction)
    if not found:
        raise ValueError(
            f"{place} is no commonsense question: its instruction ends in {instruction[-40:]!r}, "
            "expected 'Answer format: ' and the choices with / between them"
        )
    choices = tuple(found[1].split("/"))
    if not all(choices) or len(set(choices)) < len(choices):
        raise ValueError(f"{place}: the choices are {found[1]!r}, expected each once, with / between them")
    return choices


def rotated(row: Row, by: int) -> Row:
    """The row with its options moved on by so many places: the first is what stood at `by` (from 0).

    The right option stays right, under another name. Texts that speak of their place ("both of the above") then say
    something else.

    Raises:
        ValueError: for a row without options to move, such as one of true and false.
    """
    spans, options = _spans(row.prompt, row.choices) if row.choices else [], row.fields.get("options")
    if not spans or not options:
        raise ValueError(
            f"row {row.index} of {row.task} has no options that could change places: it ends in {row.prompt[-60:]!r}, "
            "expected a text for each choice, as in 'Answer1: a star'"
        )
    moved = tuple(options[(i + by) % len(options)] for i in range(len(options)))
    text = row.prompt
    for (begin, end), option in reversed(list(zip(spans, moved, strict=True))):
        text = text[:begin] + option + text[end:]
    answer = row.choices[(row.choices.index(row.answer) - by) % len(options)]
    return replace(
        row, prompt=text, completion=TRIGGER + answer, answer=answer, fields={**row.fields, "options": moved}
    )


def _parts(instruction: str, choices: tuple[str, ...]) -> dict[str, Any]:
    """The question without its choices, and the texts of these."""
    spans = _spans(instruction, choices)
    options = tuple(instruction[begin:end] for begin, end in spans)
    mark = instruction.rfind(f"{choices[0].capitalize()}:", 0, spans[0][0]) if spans else None
    return {"question": _FORMAT.sub("", instruction)[:mark].strip(), "options": options}


def _spans(instruction: str, choices: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where the text of each choice stands, "Option1: …"; none where a choice has no text."""
    body = _FORMAT.sub("", instruction)
    marks: list[tuple[int, int]] = []
    for choice in choices:
        mark = re.compile(rf"(?<!\S){choice.capitalize()}:\s?").search(body, marks[-1][1] if marks else 0)
        if not mark:
            return []
        marks.append(mark.span())
    spans = list(zip((end for _, end in marks), [*(start for start, _ in marks[1:]), len(body)], strict=True))
    texts = [body[begin:end] for begin, end in spans]
    heads = [begin + len(text) - len(text.lstrip()) for (begin, _), text in zip(spans, texts, strict=True)]
    return [(head, head + len(text.strip())) for head, text in zip(heads, texts, strict=True)]


_VALIDATION = {"test": "validation"}
"""Where the labels of the test split are not public, the validation split is the test set, as in LLM-Adapters."""
_ANSWERS = ("answer1", "answer2", "answer3")
_TASKS = (
    _task("boolq", "google/boolq", None, _VALIDATION, templates.boolq, ("true", "false")),
    _task("piqa", "ybisk/piqa", None, _VALIDATION, templates.piqa, ("solution1", "solution2")),
    _task("siqa", "allenai/social_i_qa", None, _VALIDATION, templates.siqa, _ANSWERS),
    _task(
        "hellaswag", "Rowan/hellaswag", None, _VALIDATION, templates.hellaswag, tuple(f"ending{i}" for i in range(1, 5))
    ),
    _task(
        "winogrande", "allenai/winogrande", "winogrande_xl", _VALIDATION, templates.winogrande, ("option1", "option2")
    ),
    _task("arc_easy", "allenai/ai2_arc", "ARC-Easy", {}, templates.arc, _ANSWERS),
    _task("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", {}, templates.arc, _ANSWERS),
    _task("obqa", "allenai/openbookqa", "main", {}, templates.obqa, _ANSWERS),
    _task("commonsense_170k", "zwhe99/commonsense_170k"),
)
FAMILY = Family("commonsense", {task.name: task for task in _TASKS}, _task)
