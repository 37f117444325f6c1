"""Answers read in what a model wrote: one function for each rule, each against cases worked by hand in the tests."""

import re
from collections.abc import Mapping, Sequence

from reftlens.experiments.numerals import canonical, numerals

TRIGGER = "the correct answer is "
_NEXT_QUESTION = re.compile(
    r"\n\s*(?:#|Please (?:choose|answer)\b|(?:Question|Q)\s*\d*:|Answer format:|Below is an instruction)"
)
_CUE = re.compile(r"\banswer\s*(?:is(?=\W|n't|$)|:)", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\bnot|n't|\brather than|\binstead of|\bneither|\bnor|\bunlike)\s+(?:the\s+)?\W*$", re.IGNORECASE
)
_WRONG = re.compile(r"\W*(?:is|was|would be)\s*(?:not\b|n't|wrong|incorrect|false\b)", re.IGNORECASE)
_NUMBER_CUE = re.compile(r"\banswer\s*(?:is(?=\W|n't|$)|:|=)|####|\\boxed", re.IGNORECASE)
_LETTER_CUE = re.compile(
    r"\b(?:answer|option|choice)\s*(?:is(?=\W|n't|$)|[:=-])|\bans\b\.?\s*(?:is\b|[:=-])?", re.IGNORECASE
)
_LETTER = re.compile(r"\(([A-Ea-e])\)|(?<![\w'])([A-E])(?![\w'])|^\W*([a-e])(?=\s*(?:[).]|$))")
_LETTER_ALONE = re.compile(r"^\s*(?:\(([A-Ea-e])\)|([A-E])\)|([A-Ea-e])\W*$)")
_LETTER_IS = re.compile(
    r"(?<![\w'])\(?([A-E])\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)\b|\bis\s+(?:option\s*\(?([A-E])\b|\(?([A-E])\))"
)
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


# -- numbers -------------------------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The last number of a text, in its canonical form: the rule of LLM-Adapters and the LoReFT paper."""
    found = numerals(text)
    return canonical(found[-1].value) if found else None


def stated_number(text: str) -> str | None:
    """The number after the last "the answer is", "####" or box; the last number of a text that states none.

    It is looked for in the sentence that states it, after its last "=" where it has one, before the text goes on to
    another question. A number that is denied does not count; "5 or 6" is none.
    """
    text = answered(text)
    cues = list(_NUMBER_CUE.finditer(text))
    if not cues:
        return last_number(text)
    said = _sentence(text[cues[-1].end() :])
    said = said[said.rfind("=") + 1 :]
    held = [n for n in numerals(said) if not _DENIED.search(said[: n.start])]
    if not held or (len(held) > 1 and _JOINED.fullmatch(said[held[0].end : held[1].start])):
        return None
    return canonical(held[0].value)


def number_within(text: str, low: float, high: float) -> str | None:
    """The first number of a text if it lies in a range: a similarity; "4/5" and "4 out of 5" are 4."""
    found = numerals(answered(text), fractions=False)
    return canonical(found[0].value) if found and low <= found[0].value <= high else None


# -- letters -------------------------------------------------------------------------------------------------


def stated_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that is stated as the answer ("The answer is (B)", "Option C is correct", "E) 12"), and no other.

    The last statement counts, before the text goes on to another question; two letters that are joined are none.
    """
    text = answered(text)
    cues = list(_LETTER_CUE.finditer(text))
    if not cues:
        found = list(_LETTER_ALONE.finditer(text)) or list(_LETTER_IS.finditer(text))
        letter = next(g for g in found[-1].groups() if g).upper() if found else ""
        return letter if letter in choices else None
    said = _sentence(text[cues[-1].end() :])
    found = [(m.start(), m.end(), next(g for g in m.groups() if g).upper()) for m in _LETTER.finditer(said)]
    held = [f for f in found if f[2] in choices and not _DENIED.search(said[: f[0]])]
    if not held or (len(held) > 1 and _JOINED.fullmatch(said[held[0][1] : held[1][0]])):
        return None
    return held[0][2]


def first_capital(text: str, choices: Sequence[str]) -> str | None:
    """The first letter of a text that is one of the choices, wherever it stands: the rule of LLM-Adapters for AQuA.

    "Both …" is B by this rule, and "Answer: C" is A.
    """
    return next((character for character in text if character in choices), None)


# -- words ---------------------------------------------------------------------------------------------------


def label_word(text: str, words: Mapping[str, str]) -> str | None:
    """The label whose word a text begins with, or else the only one that its first line names.

    Case and marks do not matter; words that are denied, or joined ("positive or negative"), are none.
    """
    line = text.strip().split("\n")[0]
    word = rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)(?!\s+(?:answer|idea|clue|opinion)\b)"
    found = [m for m in re.finditer(word, line, re.IGNORECASE) if not _DENIED.search(line[: m.start()])]
    labels = [words[m[1].lower()] for m in found]
    if len(found) > 1 and labels[0] != labels[1] and _JOINED.fullmatch(line[found[0].end() : found[1].start()]):
        return None
    begins = bool(found) and not re.search(r"\w", line[: found[0].start()])
    return labels[0] if begins or len(set(labels)) == 1 else None


def _sentence(said: str) -> str:
    """What follows a cue, to the end of its sentence or line."""
    return re.split(r"[.!?](?=\s|$)|\n", said.lstrip(" \n\t:*"), maxsplit=1)[0]
