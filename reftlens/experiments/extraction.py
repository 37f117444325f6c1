"""Answers read in what a model wrote: one function for each rule, each against cases worked by hand in the tests."""

import re
from collections.abc import Sequence

TRIGGER = "the correct answer is "
_NEXT_QUESTION = re.compile(
    r"\n\s*(?:#|Please (?:choose|answer)\b|Question\b|Q:|Answer format:|Below is an instruction)"
)
_CUE = re.compile(r"\banswer\s*(?:is(?=\W|n't|$)|:)", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\bnot|n't|\brather than|\binstead of|\bneither|\bnor|\bunlike)\s+(?:the\s+)?\W*$", re.IGNORECASE
)
_WRONG = re.compile(r"\W*(?:is|was|would be)\s*(?:not\b|n't|wrong|incorrect|false\b)", re.IGNORECASE)
_JOINED = re.compile(r"\s*(?:/|,?\s*\b(?:or|and)\b|,)\s*\W*$", re.IGNORECASE)


def after_trigger(text: str, choices: Sequence[str], trigger: str = TRIGGER) -> str | None:
    """The rule of the LoReFT paper: all that follows the first trigger, stripped, if it is exactly one of the choices.

    "the correct answer is true." is therefore none of true and false.
    """
    _, found, rest = text.partition(trigger)
    return rest.strip() if found and rest.strip() in choices else None


def stated_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a reader finds stated, however it is put: "Answer: (b)", "not solution2 but solution1".

    It is looked for after the last "answer is" or "answer:" before the text goes on to another question, and otherwise
    in all of the text, which must then name one choice alone. A choice that is denied does not count, two that are
    joined ("solution1 or solution2") are none. Numbered choices may be named by letter or number, true and false by
    yes and no where the statement begins so.
    """
    text = answered(text)
    cues = list(_CUE.finditer(text))
    said = text[cues[-1].end() :] if cues else text
    if (begun := _named_at_the_beginning(said, choices, bool(cues))) is not None:
        return begun
    found = [(m.start(), m.end(), choice) for m, choice in _mentions(said, choices)]
    held = [(at, end, c) for at, end, c in found if not _DENIED.search(said[:at]) and not _WRONG.match(said[end:])]
    if not held or (not cues and len({choice for *_, choice in held}) > 1):
        return None
    together = len(held) > 1 and held[0][2] != held[1][2] and _JOINED.fullmatch(said[held[0][1] : held[1][0]])
    return None if together else held[0][2]


def answered(text: str) -> str:
    """What is written before the text goes on to a question of its own, or to another task."""
    cut = _NEXT_QUESTION.search(text, len(text) - len(text.lstrip()))
    return text[: cut.start()] if cut and text[: cut.start()].strip() else text


def _numbered(choices: Sequence[str]) -> bool:
    return all(re.fullmatch(rf"[a-z]+{i}", choice) for i, choice in enumerate(choices, start=1))


def _named_at_the_beginning(said: str, choices: Sequence[str], cued: bool) -> str | None:
    """The choice that stands there as a letter or number of its own, or as yes or no."""
    if not _numbered(choices):
        agreed = re.match(r"\W*(yes|no)\s*(?:[.,;:!]|$)", said, re.IGNORECASE)
        word = {"yes": "true", "no": "false"}[agreed[1].lower()] if agreed else ""
        return word if word in choices else None
    sign = re.match(r"[\s*:]*(?:\(([A-Ea-e])\)|([A-E])(?=\s*(?:[).:,*]|$))|(\d)(?=\s*(?:[).,*](?!\d)|$)))", said)
    if not sign or not cued:
        return None
    letter = sign[1] or sign[2]
    place = ord(letter.upper()) - ord("A") if letter else int(sign[3]) - 1
    return choices[place] if 0 <= place < len(choices) else None


def _mentions(said: str, choices: Sequence[str]):
    """Each place where a choice is named, and which."""
    if not _numbered(choices):
        for mention in re.finditer(rf"\b(?:{'|'.join(map(re.escape, choices))})\b", said, re.IGNORECASE):
            yield mention, next(c for c in choices if c.lower() == mention[0].lower())
        return
    for mention in re.finditer(r"\b(?:answer|choice|ending|option|solution)\s?#?(\d+)\b", said, re.IGNORECASE):
        if 1 <= int(mention[1]) <= len(choices):
            yield mention, choices[int(mention[1]) - 1]
