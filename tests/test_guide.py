"""The guides keep their promises: every block runs, and what is computed twice is what transformers' own hooks give."""

import re
import sys
from pathlib import Path

import pytest
import stand_in

ROOT = Path(__file__).parents[1]
PAGES = [
    "start",
    "train",
    "das",
    "strength",
    "positions",
    "subspaces",
    "your_own",
    "large_models",
    "outside",
    "moving",
]
CHECKED = ["train", "das", "strength", "your_own", "outside"]
"""Those with numbers that are computed twice; the others run on the model by `benchmarks/guide_checks.py`."""
LONG = ["das"]
"""Of these the numbers take minutes: `python benchmarks/guide_checks.py --pages das` computes them again."""
NEEDS = {"outside": ["train"]}
"""Pages that load what another one saves."""


@pytest.fixture
def guide_checks(monkeypatch):
    """The script that runs the guides and computes their numbers a second time."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import guide_checks

    yield guide_checks
    for name in ("guide_checks", "guide_numbers", "notebook_numbers", "plain_rows"):
        sys.modules.pop(name, None)


def test_no_page_is_left_out(guide_checks):
    assert list(guide_checks.PAGES) == PAGES
    assert list(dict.fromkeys(page for page, _ in guide_checks.CHECKED)) == CHECKED
    assert {path.stem for path in (ROOT / "docs" / "guide").glob("*.md")} == {*PAGES} - {"start"} | {"index"}
    assert all(title in guide_checks.sections(page) for page, title in guide_checks.CHECKED)


@pytest.mark.parametrize("page", PAGES)
def test_each_job_is_short(guide_checks, page):
    (_, setup), *jobs = guide_checks.sections(page).items()
    assert jobs and (setup or page in ("start", "moving"))
    for title, blocks in jobs:
        lines = [line for block in blocks for line in block.splitlines() if line.strip()]
        assert len(lines) <= 25, f"{title}: {len(lines)} lines"
        for block in blocks:
            assert not re.search(r"\._[a-z]|import reftlens\.|from reftlens", block), f"{title}: public names only"


def test_every_name_in_the_docs_is_there():
    import reftlens as rl

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = {name for page in pages for name in re.findall(r"\brl\.([A-Za-z_][\w.]*\w)", page.read_text("utf-8"))}
    assert len(names) > 100 and not [name for name in names if not _there(rl, name)]
    assert not _there(rl, "training.fitt"), "the twin"


def _there(module, name):
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_a_guide_runs_on_a_stand_in_and_its_numbers_are_found_again(
    guide_checks, page, monkeypatch, capsys, tmp_path, request
):
    from transformers.utils import logging

    import reftlens as rl

    monkeypatch.chdir(tmp_path)
    load = rl.load_model
    monkeypatch.setattr(rl, "load_model", lambda *given, **more: load(*given, **more) if given else stand_in.model())
    request.addfinalizer(logging.enable_progress_bar)
    for name in [*NEEDS.get(page, []), page]:
        assert guide_checks.check(name, numbers=page not in LONG), capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in CHECKED if page not in LONG])
def test_a_guides_numbers_are_found_again_on_the_model(guide_checks, page, smol, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in [*NEEDS.get(page, []), page]:
        assert guide_checks.check(name), capsys.readouterr().out


def test_what_a_block_prints_is_written_below_it_and_nowhere_else(guide_checks):
    page = "```python\nprint(1)\n```\n\n```text\nold\n```\n\n```python\nprint(2)\n```\n\nand\n\n```text\nkept\n```\n"
    filled = guide_checks.with_outputs(page, iter(["1\n", "2\n"]))
    assert filled == page.replace("old", "1")
