"""Instructions and the answers to them, in the form of Alpaca or as UltraFeedback gives them."""

from collections.abc import Mapping
from functools import partial
from operator import eq

from reftlens.experiments.rows.task import Family, Record, Row, Task, text_of
from reftlens.experiments.rows.templates import alpaca


def instruction(name: str, hub: str | None = None, files: Mapping[str, str] | None = None) -> Task:
    """A task of this family: any text is an answer, and a judge says how good it is."""
    return Task(
        name, "instruction", partial(_row, name),
        extract=lambda text, row: text.strip() or None,
        equal=eq,
        written=lambda answer, row: answer,
        hub=hub, files=files or {},
    )  # fmt: skip


def _row(name: str, record: Record, index: int, place: str) -> Row:
    asked, given, answer = _chosen(record, place) if "chosen" in record else _alpaca(record, place)
    fields = {"question": f"{asked}\n{given}" if given else asked, "instruction": asked, "input": given, "place": place}
    return Row(name, index, alpaca(asked, given), answer, answer, (), fields)


def _alpaca(record: Record, place: str) -> tuple[str, str, str]:
    """`instruction`, `input`, `output`."""
    if "answer" in record:
        raise ValueError(
            f"{place} has a field 'answer', expected instruction, input and output alone: rows with one right answer "
            "are commonsense or arithmetic"
        )
    given = record.get("input") or ""
    if not isinstance(given, str):
        raise ValueError(f"{place}: input is {given!r}, expected text")
    return text_of(record, "instruction", place), given.strip(), text_of(record, "output", place)


def _chosen(record: Record, place: str) -> tuple[str, str, str]:
    """`argilla/ultrafeedback-binarized-preferences-cleaned`: `prompt`, and `chosen`, a chat that ends in the answer."""
    turns = record["chosen"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        raise ValueError(f"{place}: chosen is {str(turns)[:60]!r}, expected a list of chat messages")
    return text_of(record, "prompt", place), "", text_of(turns[-1], "content", place)


_TASKS = (
    instruction(
        "ultrafeedback", "argilla/ultrafeedback-binarized-preferences-cleaned", {"train": "ultrafeedback_1k.jsonl"}
    ),
    instruction("alpaca", "tatsu-lab/alpaca"),
)
FAMILY = Family("instruction", {task.name: task for task in _TASKS}, instruction, whole="{name}.jsonl")
