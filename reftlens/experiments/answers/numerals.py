"""Numbers as they stand in a text: thousands, signs, decimals, fractions, what is a number and what is not."""

import re
from decimal import Decimal
from typing import NamedTuple

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMERAL = re.compile(
    rf"""(?P<sign>[-\u2212])?[$€£]?(?P<inner>[-\u2212])?
    (?: \\[dt]?frac\{{(?P<above>{_PLAIN})\}}\{{(?P<below>{_PLAIN})\}}
      | (?<![\w.^])(?P<whole>\d+)[ ](?P<part>\d+)/(?P<of>[1-9]\d*)(?![\d/])
      | (?<![\w.^])(?P<over>{_PLAIN})/(?P<under>{_PLAIN})(?![\d/])
      | (?<![\w.^])(?P<plain>{_PLAIN})(?P<power>[eE][+-]?\d{{1,2}}(?!\w))? )""",
    re.VERBOSE,
)


class Numeral(NamedTuple):
    """A number of a text, and where it stands."""

    value: Decimal
    start: int
    end: int


def numerals(text: str, *, fractions: bool = True) -> list[Numeral]:
    """All numbers of a text, in order.

    A minus is a sign where it touches the number and follows no digit, letter or bracket ("10-7" and "10 -7" end in 7,
    "is -7" in -7). Commas stand between groups of three digits; "1/2" and "3 1/2" are fractions, unless switched off.
    Digits behind a letter or `^` are no numbers: H2O, m^2.
    """
    found, at = [], 0
    while match := _NUMERAL.search(text, at):
        value, end = _value(match, fractions)
        found.append(Numeral(-value if _is_negative(match, text) else value, match.start(), end))
        at = end
    return found


def canonical(value: Decimal) -> str:
    """A number without thousands, zeros behind the decimals, or exponent: "1234.5"."""
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def equal_numbers(answer: str, gold: str, tolerance: str = "0.001") -> bool:
    """Whether two canonical numbers differ by 0.001 at most, as in the LoReFT paper."""
    return abs(Decimal(answer) - Decimal(gold)) <= Decimal(tolerance)


def _value(match: re.Match[str], fractions: bool) -> tuple[Decimal, int]:
    """The absolute value, and where it ends."""
    if match["plain"]:
        return _decimal(match["plain"] + (match["power"] or "")), match.end()
    if match["whole"] and fractions:
        return Decimal(match["whole"]) + Decimal(match["part"]) / Decimal(match["of"]), match.end()
    if match["whole"]:
        return Decimal(match["whole"]), match.end("whole")
    first, second = ("above", "below") if match["above"] else ("over", "under")
    below = _decimal(match[second])
    if fractions and below:
        return _decimal(match[first]) / below, match.end()
    return _decimal(match[first]), match.end(first)


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _is_negative(match: re.Match[str], text: str) -> bool:
    if match["inner"]:
        return True
    if not match["sign"]:
        return False
    before = text[: match.start()]
    return not re.search(r"(?:\w|[\d)\]}]\s*)$", before)
