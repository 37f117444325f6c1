"""The guide keeps its promises: its blocks run, and each of its numbers is what transformers' own hooks give."""

import re
import sys
from pathlib import Path

import pytest
import stand_in

ROOT = Path(__file__).parents[1]


@pytest.fixture
def guide_checks(monkeypatch):
    """The script that runs the guide and computes its numbers a second time."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import guide_checks

    yield guide_checks
    for name in ("guide_checks", "guide_numbers", "notebook_numbers", "plain_rows"):
        sys.modules.pop(name, None)


def test_each_job_is_short(guide_checks):
    sections = guide_checks.sections()
    assert len(sections) == 8
    for title, blocks in sections.items():
        assert blocks, title
        own = blocks[1:] if title.startswith("1.") else blocks  # the first block is for all of them
        assert sum(len([line for line in block.splitlines() if line.strip()]) for block in own) <= 25, title
        for block in blocks:
            assert not re.search(r"\._[a-z]|import reftlens\.|from reftlens", block), f"{title}: public names only"


def test_the_guide_runs_on_a_stand_in_and_its_numbers_are_found_again(guide_checks, monkeypatch, capsys, tmp_path):
    import reftlens as rl

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl, "load_model", stand_in.model)
    assert guide_checks.check([1, 3, 5, 6, 7]), capsys.readouterr().out  # 2, 4 and 8: below


@pytest.mark.slow
def test_the_guides_numbers_are_found_again_on_the_model(guide_checks, smol, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert guide_checks.check([1, 2, 3, 4, 5, 6, 7, 8]), capsys.readouterr().out
