"""How a data set of texts with labels is asked; of one that no task names, found out of its records."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reftlens.experiments.rows.task import Record

SIMILARITY = (0.0, 5.0)
MOST_LABELS = 100
"""A data set with more different labels is none that classes could be learned of."""
_PAIRS = (
    ("sentence1", "sentence2"), ("sentence_A", "sentence_B"), ("text1", "text2"), ("text_a", "text_b"),
    ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"), ("question", "passage"),
)  # fmt: skip
_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_NO_TEXT = re.compile(r"(?i)idx|index|id|.*(_id|guid|uuid|uid|label.*)|.*[a-z]ID|split|task|source")


@dataclass(frozen=True)
class Labels:
    """How a data set of GLUE is asked.

    Args:
        texts: the fields of its texts, with what the prompt calls them.
        question: what a decoder is asked; "" asks nothing but the next line.
        words: the word that a decoder writes for each label, in the order of the label's number; a similarity has none.
        within: the range of a similarity.
    """

    texts: Mapping[str, str]
    question: str
    words: Mapping[str, str] = field(default_factory=dict)
    within: tuple[float, float] = SIMILARITY


def labels_of(records: Sequence[tuple[str, Any]]) -> Labels:
    """How a data set is asked of which only the records are known, with their places.

    Its texts are the fields of text of the first record, one or two, no names of labels or rows. Labels that are texts
    are names of classes, in the order of the alphabet; whole numbers are classes from 0; others are values, as
    similarities are.

    Raises:
        ValueError: for a record without a label, and for labels that are none of these.
    """
    known = [(place, record) for place, record in records if isinstance(record, Mapping)]
    texts = {name: str(name).capitalize() for name in _texts(known[0][1], known[0][0])}
    places = {label_of(record, place): place for place, record in reversed(known)}
    kinds = {type(label) for label in places}
    if float in kinds and kinds <= {int, float}:
        numbers = [float(label) for label in places]
        return Labels(texts, "Label:", within=(min(numbers), max(numbers)))
    if len(kinds) > 1 or len(places) > MOST_LABELS:
        shown = ", ".join(f"{label!r} ({place})" for label, place in list(places.items())[-5:])
        raise ValueError(
            f"{len(places)} different labels, such as {shown}: expected names of at most {MOST_LABELS} classes, their "
            "numbers, or values (numbers of which one at least is no whole one)"
        )
    return Labels(texts, "Label:", _words(places))


def label_of(record: Record, place: str) -> Any:
    """What stands in the field `label`: a text or a finite number.

    Raises:
        ValueError: where there is no such field, or something else in it.
    """
    if "label" not in record:
        raise ValueError(f"{place} has no field 'label', it has: {', '.join(map(str, record))}")
    given: Any = record["label"]
    label: Any = given.item() if hasattr(given, "item") else given  # NumPy's, of frames
    if isinstance(label, str) and _NUMBER.fullmatch(label):  # of CSV
        label = float(label) if "." in label else int(label)
    if label.strip() if isinstance(label, str) else type(label) in (int, float) and math.isfinite(label):
        return label
    raise ValueError(f"{place}: label is {label!r}, expected the name or number of a class, or a value")


def _words(places: Mapping[Any, str]) -> Mapping[str, str]:
    """The word of each class: its name, or its number."""
    if any(isinstance(label, str) for label in places):
        words = {label: label.strip().lower() for label in sorted(places)}
        if len(set(words.values())) < len(words):
            raise ValueError(f"the labels {', '.join(map(repr, words))} differ in case or spaces alone: make them one")
        return words
    if min(places) < 0 or max(places) >= MOST_LABELS:
        odd = min(places) if min(places) < 0 else max(places)
        raise ValueError(
            f"{places[odd]}: label is {odd}, expected the numbers of at most {MOST_LABELS} classes, from 0"
        )
    return {str(number): str(number) for number in range(max(1, *places) + 1)}


def _texts(record: Record, place: str) -> tuple[str, ...]:
    texts = [str(name) for name, value in record.items() if isinstance(value, str)]
    names = tuple(name for name in texts if not _NO_TEXT.fullmatch(name))
    found = next((pair for pair in _PAIRS if set(pair) <= set(names)), names)
    if not 1 <= len(found) <= 2 or "label" not in record:
        raise ValueError(f"{place} has the fields {', '.join(map(str, record))}, expected one or two texts and a label")
    return found
