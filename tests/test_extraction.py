"""Each rule of extraction against the hand-worked cases, and against nothing where there is no answer."""

import pytest
from extraction_cases import COMMONSENSE


def test_there_are_forty_cases_of_each_family():
    assert len(COMMONSENSE) >= 40


@pytest.mark.parametrize(("choices", "text", "strict", "stated"), COMMONSENSE, ids=lambda v: ascii(v)[:60])
def test_commonsense(choices, text, strict, stated):
    from reftlens.experiments.extraction import after_trigger, stated_choice

    assert after_trigger(text, choices) == strict
    assert stated_choice(text, choices) == stated
