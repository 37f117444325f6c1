"""What SmolLM2 wrote to 100 questions, read by hand, and what the rules read in it.

`reference/written_answers.jsonl` is made by `python benchmarks/written_answers.py --data ../shared/data --out FILE`;
`label` was added by hand: the answer that a reader finds stated or concluded, null where there is none.
"""

import json
from pathlib import Path

import pytest

RECORDS = [
    json.loads(line)
    for line in (Path(__file__).parent / "reference/written_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "winogrande": ("option1", "option2"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "arc_easy": ("answer1", "answer2", "answer3", "answer4"),
    "arc_challenge": ("answer1", "answer2", "answer3", "answer4"),
    "aqua": tuple("ABCDE"),
}


def agreement(family, numbers, letters, choices, ways=("shots", "chat", "fit")):
    """How many texts of a family the rules read as the reader did, and how many there are."""
    some = [r for r in RECORDS if r["family"] == family and r["way"] in ways]
    read = []
    for record in some:
        task, text = record["task"], record["text"]
        rule = letters if task == "aqua" else choices if task in CHOICES else numbers
        read.append(rule(text, CHOICES[task]) if task in CHOICES else rule(text))
    return sum(answer == record["label"] for answer, record in zip(read, some, strict=True)), len(some)


def test_there_are_fifty_of_each_family():
    assert [sum(r["family"] == f for r in RECORDS) for f in ("commonsense", "arithmetic")] == [50, 50]
    assert len({(r["task"], r["index"], r["way"]) for r in RECORDS}) == 100


def test_the_rules_read_ninety_eight_of_a_hundred_as_a_reader_does():
    from reftlens.experiments.answers.extraction import stated_choice, stated_letter, stated_number

    rules = (stated_number, stated_letter, stated_choice)
    parts = [agreement(family, *rules) for family in ("commonsense", "arithmetic")]
    assert sum(agreed for agreed, _ in parts) >= 98, parts


@pytest.mark.parametrize(("family", "agreed"), [("commonsense", 15), ("arithmetic", 13)])
def test_the_papers_rules_read_what_a_trained_model_writes(family, agreed):
    """Of 15 texts written after a fit. Of all 50 they read 23 and 39: those that end in their answer."""
    from reftlens.experiments.answers.extraction import after_trigger, last_number, stated_letter

    assert agreement(family, last_number, stated_letter, after_trigger, ("fit",)) == (agreed, 15)
