"""Arithmetic problems as their sources give them: the question, the steps where a person wrote some, the answer."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from reftlens.experiments.answers.numerals import canonical
from reftlens.experiments.rows.task import Record, one_of, text_of

LETTERS = tuple("ABCDE")
FINAL = "The final answer is: "
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Worked(NamedTuple):
    """A problem; `steps` ends in the answer, and is "" where the source has only the answer."""

    question: str
    steps: str
    answer: str


def read(record: Record, place: str, calculator: bool = False) -> Worked:
    """The problem in a record, by the fields that it has.

    Args:
        calculator: keeps GSM8K's calculator marks, `<<20*0.05=1>>`, in the steps.

    Raises:
        ValueError: for a record in none of the forms, or without an answer that is a number or a letter.
    """
    for fields, form in _FORMS.items():
        if all(name in record for name in fields):
            worked = form(record, place)
            return worked if calculator else worked._replace(steps=_CALCULATOR.sub("", worked.steps))
    expected = "; ".join(", ".join(fields) for fields in _FORMS)
    raise ValueError(f"{place} has the fields {', '.join(map(str, record))}, expected those of one form of {expected}")


def _llm_adapters(record: Record, place: str) -> Worked:
    """`instruction`, `answer`, and `output` where it is for training; what a model answered is never gold."""
    question = text_of(record, "instruction", place)
    if record.get("input"):
        raise ValueError(f"{place}: input is {record['input']!r}, expected none: arithmetic problems have no input")
    return Worked(question, str(record.get("output") or ""), answer_of(record["answer"], "answer", place))


def _gsm8k(record: Record, place: str) -> Worked:
    """`question`, and `answer`: the steps, then `#### number`."""
    steps, found, number = text_of(record, "answer", place).rpartition("####")
    if not found or not steps.strip():
        raise ValueError(f"{place}: answer is {record['answer']!r}, expected steps, then '#### ' and the number")
    answer = answer_of(number.strip(), "the number after '####'", place)
    return Worked(text_of(record, "question", place), f"{steps.strip()}\n{FINAL}{answer}", answer)


def _mawps(record: Record, place: str) -> Worked:
    """`question`, `equation`, `answer`; an equation solved for its unknown is the only step."""
    answer = answer_of(record["answer"], "answer", place)
    side = re.fullmatch(r"\s*[xX]\s*=([^=xX]+)", text_of(record, "equation", place))
    step = re.sub(r"(?<=\d)\.0(?!\d)", "", side[1]).strip() + f" = {answer}\n" if side else ""
    return Worked(text_of(record, "question", place), f"{step}{FINAL}{answer}", answer)


def _aqua(record: Record, place: str) -> Worked:
    """`deepmind/aqua_rat`: `question`, `options` ("A)12"), `rationale`, `correct`."""
    options = record["options"]
    if not isinstance(options, list) or [str(o)[:2] for o in options] != [f"{c})" for c in LETTERS[: len(options)]]:
        raise ValueError(f"{place}: options is {options!r}, expected texts that begin with A), B), …")
    listed = " ".join(f"({option[0]}) {option[2:].strip()}" for option in options)
    answer = one_of(record["correct"], LETTERS[: len(options)], "correct", place)
    question = f"{text_of(record, 'question', place)} Answer Choices: {listed}"
    return Worked(question, f"{text_of(record, 'rationale', place)}\n{FINAL}{answer}", answer)


def _svamp(record: Record, place: str) -> Worked:
    """`ChilleD/SVAMP`: `Body`, `Question`, `Equation`, `Answer`."""
    parts = (text_of(record, "Body", place).strip(), text_of(record, "Question", place).strip())
    answer = answer_of(record["Answer"], "Answer", place)
    return Worked(" ".join(parts), _solved(record.get("Equation"), answer), answer)


def _with_numbers_apart(record: Record, place: str) -> Worked:
    """`mwpt5/MAWPS`: `Question` with N_00, N_01, … where the `Numbers` stood, `Answer`."""
    numbers = [canonical(_number(n, "Numbers", place)) for n in text_of(record, "Numbers", place).split()]
    question = text_of(record, "Question", place)
    wanted = [int(n) for n in re.findall(r"N_(\d+)", question)]
    if not wanted or max(wanted) >= len(numbers):
        raise ValueError(f"{place}: Question names N_{max(wanted, default=0):02d}, and Numbers has {len(numbers)}")
    answer = answer_of(record["Answer"], "Answer", place)
    return Worked(re.sub(r"N_(\d+)", lambda m: numbers[int(m[1])], question), "", answer)


def _multiarith(record: Record, place: str) -> Worked:
    """`ChilleD/MultiArith`: `question`, `final_ans`."""
    return Worked(text_of(record, "question", place), "", answer_of(record["final_ans"], "final_ans", place))


def _koncel(record: Record, place: str) -> Worked:
    """AddSub, SingleEq and MultiArith as published: `sQuestion`, `lEquations`, `lSolutions`."""
    solutions = record["lSolutions"]
    if not isinstance(solutions, list) or len(solutions) != 1:
        raise ValueError(f"{place}: lSolutions is {solutions!r}, expected a list of one number")
    return Worked(text_of(record, "sQuestion", place), "", answer_of(solutions[0], "lSolutions", place))


_FORMS: dict[tuple[str, ...], Callable[[Record, str], Worked]] = {
    ("instruction", "answer"): _llm_adapters,
    ("question", "options", "rationale", "correct"): _aqua,
    ("question", "equation", "answer"): _mawps,
    ("question", "answer"): _gsm8k,
    ("Body", "Question", "Answer"): _svamp,
    ("Question", "Numbers", "Answer"): _with_numbers_apart,
    ("question", "final_ans"): _multiarith,
    ("sQuestion", "lSolutions"): _koncel,
}


def answer_of(value: Any, name: str, place: str) -> str:
    """The canonical form of an answer: a letter, or a number without thousands and needless zeros."""
    if isinstance(value, str) and value.strip() in LETTERS:
        return value.strip()
    return canonical(_number(value, name, place))


def _number(value: Any, name: str, place: str) -> Decimal:
    text = str(value).strip()
    try:
        number = Decimal(text.replace(",", "") if _THOUSANDS.fullmatch(text) else text)
    except InvalidOperation:
        number = Decimal("nan")
    if isinstance(value, bool) or not number.is_finite():
        raise ValueError(f"{place}: {name} is {value!r}, expected a number, or a letter from A to E")
    return number


def _solved(equation: Any, answer: str) -> str:
    """An equation without an unknown as the only step, where there is one."""
    if not isinstance(equation, str) or not re.fullmatch(r"[\d\s.()+\-*/]+", equation):
        return ""
    return re.sub(r"(?<=\d)\.0(?!\d)", "", equation).strip() + f" = {answer}\n{FINAL}{answer}"
