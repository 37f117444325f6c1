"""What SmolLM2 wrote to 100 questions, and to 50 others, read by hand, and what the rules read in it.

`reference/written_answers.jsonl` is made by `python benchmarks/written_answers.py --data ../shared/data --out FILE`;
`label` was added by hand: the answer that a reader finds stated or concluded, null where there is none. The rules were
extended after these 100 had been read. `written_answers_unseen.jsonl` (`--sample unseen --dtype bfloat16`) was labelled
before any rule was run on it, and none was changed because of it.
"""

import json
from pathlib import Path

import pytest


def _records(name):
    text = (Path(__file__).parent / "reference" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


RECORDS = _records("written_answers.jsonl")
UNSEEN = _records("written_answers_unseen.jsonl")
CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "winogrande": ("option1", "option2"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "arc_easy": ("answer1", "answer2", "answer3", "answer4"),
    "arc_challenge": ("answer1", "answer2", "answer3", "answer4"),
    "aqua": tuple("ABCDE"),
}


def agreement(family, numbers, letters, choices, ways=("shots", "chat", "fit"), records=RECORDS):
    """How many texts of a family the rules read as the reader did, and how many there are."""
    some = [r for r in records if r["family"] == family and r["way"] in ways]
    read = []
    for record in some:
        task, text = record["task"], record["text"]
        rule = letters if task == "aqua" else choices if task in CHOICES else numbers
        read.append(rule(text, CHOICES[task]) if task in CHOICES else rule(text))
    return sum(answer == record["label"] for answer, record in zip(read, some, strict=True)), len(some)


def test_there_are_fifty_and_twenty_five_of_each_family():
    assert [sum(r["family"] == f for r in RECORDS) for f in ("commonsense", "arithmetic")] == [50, 50]
    assert len({(r["task"], r["index"], r["way"]) for r in RECORDS}) == 100
    assert [sum(r["family"] == f for r in UNSEEN) for f in ("commonsense", "arithmetic")] == [25, 25]
    assert len({(r["task"], r["index"], r["way"]) for r in UNSEEN}) == 50


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


def test_what_the_rules_read_in_texts_that_they_were_not_made_after():
    """The figures of docs/experiments.md, printed by `pytest -s`; a rule that is changed after this is judged anew."""
    from reftlens.experiments.answers.extraction import (
        after_trigger,
        last_number,
        stated_choice,
        stated_letter,
        stated_number,
    )

    found = {}
    for name, rules in (
        ("as stated", (stated_number, stated_letter, stated_choice)),
        ("paper", (last_number, stated_letter, after_trigger)),
    ):
        found[name] = [agreement(f, *rules, records=UNSEEN)[0] for f in ("commonsense", "arithmetic")]
    print(found)
    assert found == {"as stated": [24, 23], "paper": [14, 16]}
