"""Each rule of extraction against the hand-worked cases, and against nothing where there is no answer."""

import pytest
from extraction_cases import COMMONSENSE, GLUE, LETTERS, NUMBERS, RATINGS, VERDICTS


def test_there_are_forty_cases_of_each_family():
    assert len(VERDICTS + RATINGS) >= 40
    for cases in (COMMONSENSE, NUMBERS, LETTERS, GLUE):
        assert len(cases) >= 40 and len({repr(case) for case in cases}) == len(cases)


@pytest.mark.parametrize(("choices", "text", "strict", "stated"), COMMONSENSE, ids=lambda v: ascii(v)[:60])
def test_commonsense(choices, text, strict, stated):
    from reftlens.experiments.answers.extraction import after_trigger, stated_choice

    assert after_trigger(text, choices) == strict
    assert stated_choice(text, choices) == stated


@pytest.mark.parametrize(("text", "last", "stated"), NUMBERS, ids=lambda v: ascii(v)[:60])
def test_numbers(text, last, stated):
    from reftlens.experiments.answers.extraction import last_number, stated_number

    assert last_number(text) == last
    assert stated_number(text) == stated


@pytest.mark.parametrize(("text", "stated", "first"), LETTERS, ids=lambda v: ascii(v)[:60])
def test_letters(text, stated, first):
    from reftlens.experiments.answers.extraction import first_capital, stated_letter

    assert stated_letter(text, tuple("ABCDE")) == stated
    assert first_capital(text, tuple("ABCDE")) == first


@pytest.mark.parametrize(("words", "text", "answer"), GLUE, ids=lambda v: ascii(v)[:60])
def test_labels(words, text, answer):
    from reftlens.experiments.answers.extraction import label_word, number_within

    assert (number_within(text, 0, 5) if words is None else label_word(text, words)) == answer


@pytest.mark.parametrize(("reply", "verdict"), VERDICTS, ids=lambda v: ascii(v)[:60])
def test_verdicts(reply, verdict):
    from reftlens.experiments.judges.marks import verdict_in

    assert verdict_in(reply) == verdict


@pytest.mark.parametrize(("reply", "rating"), RATINGS, ids=lambda v: ascii(v)[:60])
def test_ratings(reply, rating):
    from reftlens.experiments.judges.marks import rating_in

    assert rating_in(reply) == rating
