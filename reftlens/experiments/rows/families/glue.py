"""The tasks of GLUE: one or two texts and a label, for a head, or for a decoder that writes a word."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial

from reftlens.experiments.answers.extraction import label_word, number_within
from reftlens.experiments.answers.numerals import canonical, equal_numbers
from reftlens.experiments.rows.task import Family, Record, Row, Task, one_of, text_of
from reftlens.numbers import real

SIMILARITY = (0.0, 5.0)


@dataclass(frozen=True)
class Labels:
    """How a data set of GLUE is asked.

    Args:
        texts: the fields of its texts, with what the prompt calls them.
        question: what a decoder is asked; "" asks nothing but the next line.
        words: the word that a decoder writes for each label, in the order of the label's number; a similarity has none.
    """

    texts: Mapping[str, str]
    question: str
    words: Mapping[str, str] = field(default_factory=dict)


def glue(name: str, labels: Labels | None = None, splits: Mapping[str, str] | None = None) -> Task:
    """A task of this family; without labels its texts are all fields of text, and its labels 0 and 1.

    The test rows are GLUE's validation split, as the labels of its test split are not public. `fields` hold `texts`
    (one or two) and `label`, a number, for encoders.
    """
    return Task(
        name, "glue", partial(_row, name, labels), _extract, _equal, _written,
        hub="nyu-mll/glue" if labels else None,
        config=name if labels else None,
        splits={"test": "validation", **(splits or {})},
        files={"test": f"{name}/validation.jsonl"},
        metrics=_METRICS.get(name, ("accuracy",)),
    )  # fmt: skip


def _row(name: str, labels: Labels | None, record: Record, index: int, place: str) -> Row:
    labels = labels or _from(record, place)
    texts = tuple(text_of(record, text, place) for text in labels.texts)
    if "label" not in record:
        raise ValueError(f"{place} has no field 'label', it has: {', '.join(map(str, record))}")
    answer, label = _similarity(record["label"], place) if not labels.words else _class(record["label"], labels, place)
    lines = [f"{called}: {text.strip()}" for called, text in zip(labels.texts.values(), texts, strict=True)]
    prompt = "\n".join([*lines, labels.question])
    fields = {"question": "\n".join(texts), "texts": texts, "label": label, "words": dict(labels.words), "place": place}
    row = Row(name, index, prompt, "", answer, tuple(labels.words), fields)
    return Row(name, index, prompt, _written(answer, row), answer, row.choices, fields)


def _class(label: object, labels: Labels, place: str) -> tuple[str, int]:
    """The name of a label and its number."""
    numbers = tuple(map(str, range(len(labels.words))))
    number = int(one_of(label, numbers, "label", place))
    return list(labels.words)[number], number


def _similarity(label: object, place: str) -> tuple[str, float]:
    try:
        value = float(real(label, "label"))
    except TypeError:
        value = -1.0
    if not SIMILARITY[0] <= value <= SIMILARITY[1]:
        raise ValueError(f"{place}: label is {label!r}, expected a similarity from 0 to 5")
    return canonical(Decimal(str(value))), value


def _from(record: Record, place: str) -> Labels:
    """Labels of a data set that is not known by name: 0 and 1 for the texts that a row has."""
    names = [name for name, value in record.items() if isinstance(value, str) and name != "label"]
    texts = {name: str(name).capitalize() for name in names}
    if not 1 <= len(texts) <= 2 or "label" not in record:
        raise ValueError(f"{place} has the fields {', '.join(map(str, record))}, expected one or two texts and a label")
    return Labels(texts, "Label:", {"0": "0", "1": "1"})


def _extract(text: str, row: Row) -> str | None:
    words = row.fields["words"]
    return label_word(text, {word: name for name, word in words.items()}) if words else number_within(text, *SIMILARITY)


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
