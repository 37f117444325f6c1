"""The tasks of GLUE: one or two texts and a label, for a head, or for a decoder that writes a word."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any

from reftlens.experiments.answers.extraction import label_word, number_within
from reftlens.experiments.answers.numerals import canonical, equal_numbers
from reftlens.experiments.rows.families.labels import Labels, label_of, labels_of
from reftlens.experiments.rows.task import Family, Record, Row, Task, one_of, text_of


def glue(name: str, labels: Labels | None = None, splits: Mapping[str, str] | None = None) -> Task:
    """A task of this family; without labels its texts and labels are those that its records show (`labels_of`).

    The test rows are GLUE's validation split, as the labels of its test split are not public. `fields` hold `texts`
    (one or two) and `label`, a number, for encoders.
    """
    return Task(
        name, "glue", partial(_row, name, labels), _extract, _equal, _written,
        hub="nyu-mll/glue" if labels else None,
        config=name if labels else None,
        of_records=None if labels else partial(_of_records, name),
        splits={"test": "validation", **(splits or {})},
        files={"test": f"{name}/validation.jsonl"},
        metrics=_METRICS.get(name, ("accuracy",)),
    )  # fmt: skip


def _of_records(name: str, records: Sequence[tuple[str, Any]]) -> Task:
    labels = labels_of(records)
    return replace(glue(name, labels), hub=None, config=None, metrics=metrics_of(name, tuple(labels.words)))


def metrics_of(name: str, choices: Sequence[str]) -> tuple[str, ...]:
    """What a task is scored by; of one that is not known by name, classes by accuracy, and values by correlation."""
    return _METRICS.get(name, ("accuracy",) if choices else _METRICS["stsb"])


def _row(name: str, labels: Labels | None, record: Record, index: int, place: str) -> Row:
    labels = labels or labels_of([(place, record)])
    texts = tuple(text_of(record, text, place) for text in labels.texts)
    value = label_of(record, place)
    answer, label = _class(value, labels, place) if labels.words else _similarity(value, labels, place)
    lines = [f"{called}: {text.strip()}" for called, text in zip(labels.texts.values(), texts, strict=True)]
    prompt = "\n".join([*lines, labels.question])
    fields = {"question": "\n".join(texts), "texts": texts, "label": label, "place": place}
    fields |= {"words": dict(labels.words), "within": labels.within}
    row = Row(name, index, prompt, "", answer, tuple(labels.words), fields)
    return Row(name, index, prompt, _written(answer, row), answer, row.choices, fields)


def _class(label: Any, labels: Labels, place: str) -> tuple[str, int]:
    """The name of a label and its number, by either."""
    names, numbers = tuple(labels.words), tuple(map(str, range(len(labels.words))))
    if label in names:
        return label, names.index(label)
    number = int(one_of(label, numbers, "label", place))
    return names[number], number


def _similarity(label: Any, labels: Labels, place: str) -> tuple[str, float]:
    low, high = labels.within
    if isinstance(label, str) or not low <= label <= high:
        raise ValueError(f"{place}: label is {label!r}, expected a similarity from {low:g} to {high:g}")
    return canonical(Decimal(str(float(label)))), float(label)


def _extract(text: str, row: Row) -> str | None:
    words = row.fields["words"]
    if not words:
        return number_within(text, *row.fields["within"])
    return label_word(text, {word: name for name, word in words.items()})


def _equal(answer: str, gold: str) -> bool:
    return answer == gold or (_is_number(answer) and _is_number(gold) and equal_numbers(answer, gold))


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _written(answer: str, row: Row) -> str:
    return " " + row.fields["words"].get(answer, answer)


_METRICS = {
    "cola": ("matthews", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
}
"""Of those that GLUE scores by more than accuracy, the LoReFT paper's first."""
_PAIR = {"sentence1": "Sentence 1", "sentence2": "Sentence 2"}
_FOLLOWS = {"entailment": "yes", "not_entailment": "no"}
_TASKS = (
    glue(
        "cola",
        Labels(
            {"sentence": "Sentence"},
            "Question: Is this sentence good English?\nAnswer:",
            {"unacceptable": "no", "acceptable": "yes"},
        ),
    ),
    glue("sst2", Labels({"sentence": "Review"}, "Sentiment:", {"negative": "negative", "positive": "positive"})),
    glue(
        "mrpc",
        Labels(
            _PAIR, "Question: Do both sentences mean the same?\nAnswer:", {"not_equivalent": "no", "equivalent": "yes"}
        ),
    ),
    glue("stsb", Labels(_PAIR, "Similarity from 0 to 5:")),
    glue(
        "qqp",
        Labels(
            {"question1": "Question 1", "question2": "Question 2"},
            "Question: Do both questions ask the same?\nAnswer:",
            {"not_duplicate": "no", "duplicate": "yes"},
        ),
    ),
    glue(
        "mnli",
        Labels(
            {"premise": "Premise", "hypothesis": "Hypothesis"},
            "Question: Does the hypothesis follow from the premise, yes, no or maybe?\nAnswer:",
            {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
        ),
        {"test": "validation_matched", "validation": "validation_matched"},
    ),
    glue(
        "qnli",
        Labels(
            {"question": "Question", "sentence": "Sentence"},
            "Question: Does the sentence answer the question?\nAnswer:",
            _FOLLOWS,
        ),
    ),
    glue("rte", Labels(_PAIR, "Question: Does sentence 2 follow from sentence 1?\nAnswer:", _FOLLOWS)),
    glue(
        "wnli",
        Labels(
            _PAIR,
            "Question: Does sentence 2 follow from sentence 1?\nAnswer:",
            {"not_entailment": "no", "entailment": "yes"},
        ),
    ),
)
FAMILY = Family(
    "glue",
    {task.name: task for task in _TASKS},
    glue,
    layout="{name}/{split}.jsonl",
    stand_in="{name}/train_from_validation.jsonl",
)
