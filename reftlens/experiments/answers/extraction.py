"""Answers read in what a model wrote: one function for each rule, each against cases worked by hand in the tests."""

import re
from collections.abc import Mapping, Sequence

from reftlens.experiments.answers.numerals import canonical, numerals

TRIGGER = "the correct answer is "
_NEXT_QUESTION = re.compile(
    r"\n\s*(?:#{1,3}\s|Please (?:choose|answer)\b|(?:Question|Q)\s*\d*:|Answer format:|Below is an instruction)"
)
_CUE = re.compile(r"\banswer\s*(?:is(?=\W|n't|$)|:)", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\bnot|n't|\brather than|\binstead of|\bneither|\bnor|\bunlike)\s+(?:the\s+)?\W*$", re.IGNORECASE
)
_WRONG = re.compile(r"\W*(?:is|was|would be)\s*(?:not\b|n't|wrong|incorrect|false\b)", re.IGNORECASE)
_NUMBER_CUE = re.compile(
    r"\banswer(?:\s+(?:in|to)(?:\s\w+){1,4})?\s*(?:is(?=\W|n't|$)|:|=)|####|\\boxed", re.IGNORECASE
)
_CONCLUDES = re.compile(r"\b(?:so|therefore|thus|hence)\b(?!.*=)|=", re.IGNORECASE)
_LOOP = re.compile(r"(.{8,150}?)\1{2,}(.*)$", re.DOTALL)
_EQUALS = re.compile(r"\b(?:is|are|was|were|be|has|have|costs?)\b", re.IGNORECASE)
_END = re.compile(r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bRs)(?<!\bMrs)[.!?](?=\s|$)|\n")
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
    """The number after the last "the answer is", "####" or box, or else the one that a text without these concludes.

    It is looked for in the sentence that states it, after its last "=" where it has one, before the text goes on to
    another question. A number that is denied does not count; "5 or 6" is none. A text without a statement concludes in
    its last sentence with "so", "therefore" or "=", or else in its last number; one that goes round in a loop, or
    breaks off before a number, concludes nothing.
    """
    text = answered(text)
    cues = list(_NUMBER_CUE.finditer(text))
    for cue in reversed(cues):
        said = _sentence(text[cue.end() :])
        said = said[said.rfind("=") + 1 :]
        if held := [n for n in numerals(said) if not _DENIED.search(said[: n.start])]:
            joined = len(held) > 1 and _JOINED.fullmatch(said[held[0].end : held[1].start])
            return None if joined else canonical(held[0].value)
    return None if cues else _concluded(text.strip())


def _concluded(text: str) -> str | None:
    """The number in which a text without a statement ends."""
    loop = _LOOP.search(text[-600:])
    if loop and loop[1].startswith(loop[2]):
        return None
    sentences = [part for part in _END.split(text) if part.strip()]
    if sentences and not re.search(r"[.!?)\]}$\d%]\W*$", text) and not numerals(sentences[-1]):
        return None
    for sentence in reversed(sentences):
        marks = list(_CONCLUDES.finditer(sentence))
        said = sentence[marks[-1].end() :] if marks else ""
        verbs = [match.end() for match in _EQUALS.finditer(said)]
        if found := numerals(said[verbs[-1] :] if verbs else said) or numerals(said):
            return canonical(found[0].value)
    return last_number(text)


def number_within(text: str, low: float, high: float) -> str | None:
    """The first number of a text if it lies in a range: a similarity; "4/5" and "4 out of 5" are 4."""
    found = numerals(answered(text), fractions=False)
    return canonical(found[0].value) if found and low <= found[0].value <= high else None


# -- letters -------------------------------------------------------------------------------------------------


def stated_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that is stated as the answer ("The answer is (B)", "Option C is correct", "E) 12"), and no other.

    The last statement counts, before the text goes on to another question; two letters that are joined are none, and
    neither is the first of a list of all choices.
    """
    text = answered(text)
    cues = list(_LETTER_CUE.finditer(text))
    for cue in reversed(cues):
        said = _sentence(text[cue.end() :])
        found = [(m.start(), m.end(), next(g for g in m.groups() if g).upper()) for m in _LETTER.finditer(said)]
        if held := [f for f in found if f[2] in choices and not _DENIED.search(said[: f[0]])]:
            joined = len(held) > 1 and _JOINED.fullmatch(said[held[0][1] : held[1][0]])
            return None if joined else held[0][2]
    if cues:
        return None
    every = re.findall(r"(?<!\w)\(?([A-E])\)", text)[: len(choices)] == list(choices)
    listed = every or len(re.findall(r"^\s*\(?[A-E]\)", text, re.MULTILINE)) > 1
    found = ([] if listed else list(_LETTER_ALONE.finditer(text))) or list(_LETTER_IS.finditer(text))
    letter = next(g for g in found[-1].groups() if g).upper() if found else ""
    return letter if letter in choices else None


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
    return _END.split(said.lstrip(" \n\t:*"), maxsplit=1)[0]
