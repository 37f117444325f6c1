"""The marks that a judge is asked for, as they stand in its replies: a verdict, or a rating."""

import re
from typing import Literal

Verdict = Literal["A", "B", "tie"]
_VERDICTS: dict[str, Verdict] = {"a": "A", "b": "B", "c": "tie", "tie": "tie"}
_MARK = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(r"(?!\s*\[\[)\W*(?:(?:final\s+)?verdict\W+)?(A|B|C|tie)\W*", re.IGNORECASE)
_RATING = re.compile(r"\[\[\s*(-?[\d.]+)\s*\]\]")
_BARE_RATING = re.compile(
    r"(?!\s*\[\[)[\s*]*(?:(?:rating|score)\s*:)?[\s*]*(?:\[(?=-?\d+\]))?(-?\d+)(?:/\d+)?\]?[\s.*]*(?:\n.*)?",
    re.I | re.DOTALL,
)
_JOINED = re.compile(r"(?:[^\w.!?\n]|\b(?:or|and|rating)\b)*", re.IGNORECASE)
_CONDITION = re.compile(r"\W*if\s+(?:answer|assistant|they|both)\b", re.IGNORECASE)


def verdict_in(reply: str) -> Verdict | None:
    """The last mark of a reply, or a reply that is nothing but a verdict.

    Two marks that are joined ("[[A]] or [[B]]", "[[A]] > [[B]]") are none, and neither is one that is told when to be
    given, "[[C]] if they are equally good", as by a judge that repeats what it was asked.
    """
    marks = [mark for mark in _MARK.finditer(reply) if not _CONDITION.match(reply, mark.end())]
    found = _alone(marks, reply) if marks else _BARE.fullmatch(reply)
    return _VERDICTS[found[1].lower()] if found else None


def rating_in(reply: str, low: int = 0, high: int = 2) -> int | None:
    """The last rating that a reply marks, or that it begins with, if it is a whole number of the range.

    Two that are joined ("Rating: [[1]] or Rating: [[2]]") are none.
    """
    marks = list(_RATING.finditer(reply))
    found = _alone(marks, reply) if marks else _BARE_RATING.fullmatch(reply)
    number = int(found[1]) if found and re.fullmatch(r"-?\d+", found[1]) else None
    return number if number is not None and low <= number <= high else None


def _alone(marks: list[re.Match[str]], reply: str) -> re.Match[str] | None:
    """The last mark, unless another one is joined to it."""
    before, last = marks[-2:] if len(marks) > 1 else (None, marks[-1])
    joined = before and before[1] != last[1] and _JOINED.fullmatch(reply, before.end(), last.start())
    return None if joined else last
