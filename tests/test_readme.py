"""The README keeps its promises: its names are all there, its example runs, its commands are those of CI."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_readme():
    import reftlens as rl

    names = set(re.findall(r"[`(]([A-Za-z_][A-Za-z_0-9]*)", README))
    assert not [n for n in rl.__all__ if n not in names]


def test_the_readme_is_short_and_its_pictures_exist():
    assert len(README.splitlines()) < 120
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture


def test_ci_runs_the_readmes_test_command():
    assert ".venv/bin/pytest" in README.splitlines()
    script = (ROOT / ".ci" / "run").read_text()
    assert "test_command=$(sed -n" in script and "pytest -m slow" in script


@pytest.mark.slow
def test_the_readmes_example_runs_to_its_assert(smol, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    assert "assert" in block
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs/emoji/reft.json").is_file()
