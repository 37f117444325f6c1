"""Rows of a run asked once for each rotation of their options: planted methods whose liking or knowledge is known."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from functools import cache

import hub_rows
import pytest
import torch
from test_text_recipe import _subject

GOLD = {}
"""By question the text of the option that is right, for a method that knows it."""


@cache
def _planted():
    """A method that names the first option, whatever it is, and one that knows what is right; imported late."""
    from reftlens.experiments.methods.acting import Acting
    from reftlens.experiments.methods.method import Method, Trained

    class Voice(Acting):
        def __init__(self, knows):
            self.knows = knows

        def _answer(self, prompt):
            names = prompt.rsplit("Answer format: ", 1)[1].strip().split("/")
            question = next((q for q in GOLD if prompt.startswith(q)), None)
            if not self.knows or question is None:
                return names[0]
            options = re.findall(r"(?:Answer|Ending)\d:\s*(.*?)\s*(?=(?:Answer|Ending)(?:\d:| format))", prompt)
            return names[options.index(GOLD[question])]

        def log_probs(self, batch, batch_size):
            says = [e.completion.endswith(self._answer(e.prompt)) for e in batch.examples]
            return torch.tensor(says).double() - 1.5

        def texts(self, prompts, decoding):
            return [f"the correct answer is {self._answer(e.prompt)}" for e in prompts.examples]

        def write(self, folder):
            pass

    @dataclass(frozen=True)
    class Planted(Method):
        knows: bool = False

        def fit(self, subject, data, config=None, **_):
            return Trained(self, subject, Voice(self.knows))

        def read(self, folder, subject):
            return Voice(self.knows)

    return Planted


@pytest.fixture
def folder(tmp_path):
    """Test sets of which arc_easy has a row of three options and one of five, and what is right in them."""
    arc = hub_rows.arc()
    for i, count in ((3, 3), (6, 5)):
        choices = {"text": [str(i + j) for j in range(count)], "label": list("ABCDE")[:count]}
        arc[i] = {**arc[i], "choices": choices, "answerKey": "A"}
    sets = {"arc_easy": arc, "hellaswag": hub_rows.hellaswag(), "boolq": hub_rows.boolq()}
    for split in ("train", "test"):
        (tmp_path / "data/commonsense" / split).mkdir(parents=True)
        for name, rows in sets.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "data/commonsense" / split / f"{name}.jsonl").write_text(lines)
    return tmp_path / "data"


@pytest.fixture
def recipe(folder, monkeypatch):
    from reftlens.experiments import RECIPES, Entry, load_rows
    from reftlens.experiments.methods import catalogue
    from reftlens.generation.decoding import Decoding
    from reftlens.training.config import FitConfig

    planted = _planted()
    monkeypatch.setitem(catalogue._CLASSES, "Planted", planted)
    for name in ("arc_easy", "hellaswag"):
        for row in load_rows(name, "test", data=folder):
            GOLD[row.fields["question"]] = row.fields["options"][row.choices.index(row.answer)]
    entries = {"first": Entry(planted()), "knows": Entry(planted(knows=True))}
    entries["loreft"] = RECIPES["commonsense"].entries["loreft"]
    names, small = ("arc_easy", "hellaswag", "boolq"), {"config": FitConfig(steps=2, batch_size=4)}
    small |= {"decoding": Decoding(max_new_tokens=6), "train": names, "test": names}
    return replace(RECIPES["commonsense"], entries=entries, **small)


def _run(recipe, folder, out, methods, rotate=(), seeds=(0,), **scope):
    from reftlens.experiments import Scope, run_recipe

    settings = {"subject": _subject(), "seeds": seeds, "scope": Scope(data=folder, **scope), "out": out}
    return run_recipe(recipe, methods, rotate=rotate, progress=False, **settings)


def _lines(out, method, seed=0):
    path = out / f"commonsense/mix/{method}/seed-{seed}/rotated.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_liking_for_the_first_name_is_told_from_knowledge(recipe, folder, tmp_path):
    found = _run(recipe, folder, tmp_path / "runs", ["first", "knows"], ["hellaswag", "arc_easy"], seeds=(0, 1))
    lines = {(one.method, one.task, one.way): one for one in found.letters.lines}
    assert len(lines) == 8 and all(one.seeds == (0, 1) and not one.pending for one in lines.values())
    for (method, task, _), one in lines.items():
        shares = [share.value for share in one.bias.shares.values()]
        assert (one.questions, one.left_out) == {"arc_easy": (8, 2), "hellaswag": (10, 0)}[task]
        assert shares == ([1, 0, 0, 0] if method == "first" else pytest.approx([0.25] * 4))
        assert one.bias.accuracy.value == (pytest.approx(1 / 4) if method == "first" else 1)
        assert one.bias.consistent.value == (method == "knows")
    said = found.to_markdown()
    assert "arc_easy: 2 left out" in said and "| knows, written | hellaswag | 10 | 0.25 [all alike]" in said
    assert f"{said}\n" in (tmp_path / "runs/commonsense/report.md").read_text()
    asked = _lines(tmp_path / "runs", "first")
    assert {line["by"] for line in asked if line["given"]} == {1, 2, 3}, "the first rotation is among the predictions"
    assert sum(line["details"].get("left_out", False) for line in asked) == 2


def test_what_was_asked_is_not_asked_again_and_a_killed_run_goes_on(recipe, folder, tmp_path, monkeypatch):
    from reftlens.experiments import Rotations, table
    from reftlens.experiments.recipes.asking import Asking

    whole = _run(recipe, folder, tmp_path / "whole", ["loreft"], ["hellaswag"], limit=6)
    plain, asked, left = Asking.answers, [], [4]

    def counted(self, trained, rows, ways):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        asked.append((rows[0].task, tuple(ways), len(rows)))
        return plain(self, trained, rows, ways)

    _run(recipe, folder, tmp_path / "killed", ["loreft"], limit=6)
    monkeypatch.setattr(Asking, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        _run(recipe, folder, tmp_path / "killed", ["loreft"], ["hellaswag"], limit=6)
    part = table([tmp_path / "killed"])
    first, second = part.letters.lines
    assert (first.way, first.questions, first.pending) == ("written", 6, 0) and first == whole.letters.lines[0]
    assert (second.way, second.pending, second.bias) == ("likelihood", 6, None)
    assert "loreft, likelihood, hellaswag: 6" in part.to_markdown() and len(part.letters.to_frame()) == 11
    left[0] = 100
    again = _run(recipe, folder, tmp_path / "killed", ["loreft"], ["hellaswag"], limit=6)
    assert (
        again.letters.to_frame().equals(whole.letters.to_frame())
        and again.to_markdown() == table([tmp_path / "killed"]).to_markdown()
    )
    assert sorted(asked) == sorted(("hellaswag", (way,), 6) for way in ("written", "likelihood") for _ in range(3))
    _run(recipe, folder, tmp_path / "killed", ["loreft"], Rotations(("hellaswag",), limit=3), limit=6)
    assert len(asked) == 6, "a part of what was asked"
    some = Rotations(("arc_easy",), limit=2, ways=("likelihood",))
    _run(recipe, folder, tmp_path / "killed", ["loreft"], some, limit=6)
    assert asked[6:] == [("arc_easy", ("likelihood",), 2)] * 3
    _run(recipe, folder, tmp_path / "killed", ["loreft"], replace(some, limit=4), limit=6)
    assert asked[9:] == [("arc_easy", ("likelihood",), 2)] * 3


def test_what_has_no_options_to_rotate_is_refused_before_any_work(recipe, folder, tmp_path):
    from reftlens.experiments import Rotations, table
    from reftlens.experiments.runs.recipe import Trial

    out = tmp_path / "runs"
    with pytest.raises(ValueError, match=r"of boolq has no options .*Answer format: true/false.*expected a text"):
        _run(recipe, folder, out, ["first"], ["boolq"])
    with pytest.raises(ValueError, match="no task in this run 'hellaswag', there are: 'arc_easy'"):
        _run(recipe, folder, out, ["first"], ["hellaswag"], tasks=("arc_easy",))
    with pytest.raises(ValueError, match="way of answering='spoken', expected one of 'written', 'likelihood'"):
        _run(recipe, folder, out, ["first"], Rotations(("hellaswag",), ways=("spoken",)))
    with pytest.raises(ValueError, match="no task is named"):
        Rotations(limit=3)
    with pytest.raises(ValueError, match="the limit of rotated rows"):
        Rotations(("hellaswag",), limit=0)
    with pytest.raises(ValueError, match="sst2 cannot be asked in another form here, expected a recipe"):
        Trial.questions(None, "sst2")
    assert not out.exists()
    _run(recipe, folder, out, ["first"], ["hellaswag"])
    shutil.copytree(out / "commonsense", tmp_path / "both/a")
    shutil.copytree(out / "commonsense", tmp_path / "both/b")
    with pytest.raises(ValueError, match="a second run of first with seed 0"):
        table([tmp_path / "both"])


def test_the_command_line_asks_and_makes_both_tables(recipe, folder, tmp_path, monkeypatch, capsys):
    from reftlens.__main__ import main
    from reftlens.experiments import RECIPES
    from reftlens.experiments.recipes.texts import TextRecipe

    monkeypatch.setitem(RECIPES, "commonsense", recipe)
    monkeypatch.setattr(TextRecipe, "subject", lambda self, model, dtype: _subject())
    arguments = ["run", "commonsense", "--data", str(folder), "--method", "first", "--seeds", "0", "--limit", "4"]
    arguments += ["--rotate", "hellaswag", "--rotate-limit", "3"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "tokens of rotated rows" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    table = capsys.readouterr().out.split("\n\nconfigurations")[0]
    assert "| first, likelihood | hellaswag | 3 | 1.00 [all alike; only 3 examples]" in table
    assert main(["run", "--table", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.strip() == table.strip()
    assert main([*arguments[:-4], "--rotate", "boolq", "--out", str(tmp_path / "other")]) == 1
    assert "boolq has no options that could change places" in capsys.readouterr().err
