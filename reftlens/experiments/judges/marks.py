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


def verdict_in(reply: str) -> Verdict | None:
    """The last mark of a reply, or a reply that is nothing but a verdict; two marks that are joined are none."""
    marks = list(_MARK.finditer(reply))
    if len(marks) > 1 and re.fullmatch(r"\s*(?:/|,|or|and)\s*", reply[marks[-2].end() : marks[-1].start()]):
        return None
    found = marks[-1] if marks else _BARE.fullmatch(reply)
    return _VERDICTS[found[1].lower()] if found else None


def rating_in(reply: str, low: int = 0, high: int = 2) -> int | None:
    """The last rating that a reply marks, or that it begins with, if it is a whole number of the range."""
    marks = list(_RATING.finditer(reply))
    if len(marks) > 1 and re.fullmatch(r"\s*(?:/|,|or|and)\s*", reply[marks[-2].end() : marks[-1].start()]):
        return None
    found = marks[-1] if marks else _BARE_RATING.fullmatch(reply)
    number = int(found[1]) if found and re.fullmatch(r"-?\d+", found[1]) else None
    return number if number is not None and low <= number <= high else None
