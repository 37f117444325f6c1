"""The prompts of LLM-Adapters (Hu et al. 2023), which the LoReFT paper uses: records of the hub in its form.

A template takes a record as the hub gives it and returns the `instruction` and the `answer` that LLM-Adapters made of
it, byte for byte. Records that have an `instruction` already are in that form, and pass as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

from reftlens.experiments.rows.task import Record, one_of, text_of

Form = tuple[str, str]
"""An instruction and its answer."""


def boolq(record: Record, place: str) -> Form:
    """`google/boolq`: `question`, `answer` (a bool); the passage is not used."""
    question, value = text_of(record, "question", place), record.get("answer")
    answer = one_of(str(value).lower() if isinstance(value, bool) else value, ("true", "false"), "answer", place)
    asked = f"Please answer the following question with true or false, question: {question}?"
    return f"{asked}\n\nAnswer format: true/false", answer


def piqa(record: Record, place: str) -> Form:
    """`ybisk/piqa`: `goal`, `sol1`, `sol2`, `label` (0 or 1; -1 in its test split, which has no answers)."""
    goal, first, second = (text_of(record, name, place) for name in ("goal", "sol1", "sol2"))
    head = f"Please choose the correct solution to the question: {goal}"
    answer = _by_number(record, "label", ("0", "1"), "solution", place)
    return f"{head}\n\nSolution1: {first}\n\nSolution2: {second}\n\nAnswer format: solution1/solution2", answer


def siqa(record: Record, place: str) -> Form:
    """`allenai/social_i_qa`: `context`, `question`, `answerA`, `answerB`, `answerC`, `label` ("1" to "3")."""
    asked = f"{text_of(record, 'context', place)} {text_of(record, 'question', place)}"
    options = [text_of(record, name, place) for name in ("answerA", "answerB", "answerC")]
    answer = _by_number(record, "label", ("1", "2", "3"), "answer", place)
    return _numbered(f"Please choose the correct answer to the question: {asked}", options, "answer"), answer


def hellaswag(record: Record, place: str) -> Form:
    """`Rowan/hellaswag`: `activity_label`, `ctx`, `endings`, `label` ("0" to "3")."""
    begun = f"{text_of(record, 'activity_label', place)}: {text_of(record, 'ctx', place)}"
    endings = _texts(record.get("endings"), "endings", place)
    answer = _by_number(record, "label", tuple(map(str, range(len(endings)))), "ending", place)
    head = f"Please choose the correct ending to complete the given sentence: {begun}"
    return _numbered(head, endings, "ending"), answer


def winogrande(record: Record, place: str) -> Form:
    """`allenai/winogrande`: `sentence`, `option1`, `option2`, `answer` ("1" or "2")."""
    sentence, first, second = (text_of(record, name, place) for name in ("sentence", "option1", "option2"))
    head = f"Please choose the correct answer to fill in the blank to complete the given sentence: {sentence}"
    answer = _by_number(record, "answer", ("1", "2"), "option", place)
    return f"{head}\n\nOption1: {first} Option2: {second} Answer format: option1/option2", answer


def arc(record: Record, place: str) -> Form:
    """`allenai/ai2_arc`: `question`, `choices` (`text`, `label`), `answerKey` (a label, letter or number)."""
    return _labelled(text_of(record, "question", place), record, place)


def obqa(record: Record, place: str) -> Form:
    """`allenai/openbookqa`: `question_stem`, `choices` (`text`, `label`), `answerKey`."""
    return _labelled(text_of(record, "question_stem", place), record, place)


COMMONSENSE: dict[str, Callable[[Record, str], Form]] = {
    "boolq": boolq,
    "piqa": piqa,
    "siqa": siqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
    "obqa": obqa,
}


def alpaca(instruction: str, given: str = "") -> str:
    """The prompt of Alpaca (Taori et al. 2023), with an input where there is one."""
    further = ", paired with an input that provides further context" if given else ""
    head = f"Below is an instruction that describes a task{further}."
    asked = "Write a response that appropriately completes the request."
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"{head} {asked}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def _labelled(question: str, record: Record, place: str) -> Form:
    choices: Any = record.get("choices") or {}
    texts = _texts(choices.get("text"), "choices.text", place)
    labels = _texts(choices.get("label"), "choices.label", place)
    key = one_of(record.get("answerKey"), tuple(labels), "answerKey", place)
    head = f"Please choose the correct answer to the question: {question}"
    return _numbered(head, texts, "answer"), f"answer{labels.index(key) + 1}"


def _numbered(head: str, options: Sequence[str], stem: str) -> str:
    """The options behind one another, and how the answer is to be written."""
    listed = " ".join(f"{stem.capitalize()}{i}: {option}" for i, option in enumerate(options, start=1))
    return f"{head}\n\n{listed}\n\nAnswer format: {'/'.join(f'{stem}{i}' for i in range(1, len(options) + 1))}"


def _by_number(record: Record, name: str, allowed: tuple[str, ...], stem: str, place: str) -> str:
    return f"{stem}{allowed.index(one_of(record.get(name), allowed, name, place)) + 1}"


def _texts(values: Any, name: str, place: str) -> list[str]:
    texts = list(values) if values is not None and not isinstance(values, str) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{place}: {name} is {values!r}, expected a list of two texts or more")
    return texts
