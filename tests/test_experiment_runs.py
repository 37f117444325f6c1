"""Runs of experiments: folders, resuming, tables out of predictions alone."""

import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

ANSWERS = ["true", "false", "false", "true", "false", "false"] * 5


@cache
def _classes():
    """The recipe and its trials; the package is imported late, so that its types can be checked."""
    from reftlens.experiments.runs.recipe import Recipe, Trial

    @dataclass
    class Planted(Recipe):
        """A recipe whose methods answer as they are told; it counts what is done."""

        accuracy: dict
        name: str = "planted"
        parameters: dict = field(default_factory=lambda: {"mix": 12})
        """Of each part."""
        seeds: tuple = (0, 1)
        done: list = field(default_factory=list)
        fail_at: str = ""

        @property
        def methods(self):
            from reftlens.experiments.methods import Reft

            return dict.fromkeys(self.accuracy, Reft())

        def parts(self, scope):
            return list(self.parameters)

        def subject(self, model):
            return None

        def trial(self, part, method, seed, subject, scope, setting=None):
            return PlantedTrial(self, part, method, seed, scope)

    class PlantedTrial(Trial):
        def __init__(self, recipe, part, method, seed, scope):
            self.recipe, self.part, self.method, self.seed = recipe, part, method, seed
            self.tasks, self.limit = ("boolq", "piqa") if part == "mix" else (part,), scope.limit

        @property
        def config(self):
            told = {"recipe": self.recipe.name, "part": self.part, "method": self.method, "seed": self.seed}
            return {**told, "limit": self.limit, "test": {task: list(range(len(ANSWERS))) for task in self.tasks}}

        def fit(self, checkpoint, *, progress):
            self._do("fit")
            return {
                "parameters": self.recipe.parameters[self.part],
                "percent": 0.5,
                "seconds_per_step": 0.25,
                "peak_bytes": 8,
            }

        def save(self, folder):
            folder.mkdir()
            (folder / "weights").write_text(f"{self.method} {self.seed}")
            return 7

        def load(self, folder):
            self._do("load")
            assert (folder / "weights").read_text() == f"{self.method} {self.seed}"

        def predict(self, task, *, progress):
            from reftlens.experiments.runs.records import Prediction

            self._do(task)
            generator = torch.Generator().manual_seed(self.seed)
            right = torch.rand(len(ANSWERS), generator=generator) < self.recipe.accuracy[self.method]
            other = {"true": "false", "false": "true"}
            given = [a if r else other[a] for a, r in zip(ANSWERS, right.tolist(), strict=True)]
            return [
                Prediction(task, i, a, {"written": g}, details={"text": f"it is {g}"})
                for i, (a, g) in enumerate(zip(ANSWERS, given, strict=True))
            ]

        def dev_score(self):
            raise NotImplementedError

        dev_rows = row_updates = 0

        def cost(self):
            return {"steps": 1}

        def _do(self, what):
            if what == self.recipe.fail_at:
                self.recipe.fail_at = ""
                raise KeyboardInterrupt
            self.recipe.done.append((self.method, self.seed, what))

    return Planted


def planted(accuracy, **settings):
    return _classes()(accuracy, **settings)


def _run(recipe, folder, **kwargs):
    from reftlens.experiments.runs.runner import run_recipe

    return run_recipe(recipe, out=folder, progress=False, **kwargs)


def test_a_finished_run_is_not_repeated_and_another_method_is_added(tmp_path):
    recipe = planted({"good": 0.95, "bad": 0.5})
    first = _run(recipe, tmp_path, methods=["good"])
    assert [w for _, _, w in recipe.done] == ["fit", "boolq", "piqa"] * 2
    recipe.done.clear()
    again = _run(recipe, tmp_path, methods="good")
    assert recipe.done == [] and again.to_markdown() == first.to_markdown()
    both = _run(recipe, tmp_path)
    assert {m for m, _, _ in recipe.done} == {"bad"}
    assert {c.method for c in both.cells} == {"good", "bad", "majority answer"}


@pytest.mark.parametrize("where", ["fit", "boolq", "piqa"])
def test_a_run_that_was_killed_goes_on_where_it_stood(tmp_path, where):
    whole = _run(planted({"good": 0.9}), tmp_path / "whole").to_frame()
    recipe = planted({"good": 0.9}, fail_at=where)
    with pytest.raises(KeyboardInterrupt):
        _run(recipe, tmp_path / "killed")
    before = list(recipe.done)
    found = _run(recipe, tmp_path / "killed").to_frame()
    after = recipe.done[len(before) :]
    assert found.equals(whole)
    assert not {w for w in before if w[2] != "fit"} & set(after), "a task that was scored is not scored again"
    assert [w for w in recipe.done if w[2] == "fit"] == [("good", 0, "fit"), ("good", 1, "fit")]


def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.recipe import Scope

    recipe = planted({"good": 0.9})
    _run(recipe, tmp_path, scope=Scope(limit=10))
    with pytest.raises(StoreMismatch, match="limit: 10 there, 20 now"):
        _run(recipe, tmp_path, scope=Scope(limit=20))
    with pytest.raises(ValueError, match="no method 'best', expected some of good"):
        _run(recipe, tmp_path, methods=["best"])


def test_files_that_are_damaged_and_folders_without_a_run_are_named(tmp_path):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.tables import table

    with pytest.raises(FileNotFoundError, match="no finished run"):
        table([tmp_path])
    _run(planted({"good": 0.9}, seeds=(0,)), tmp_path)
    lines = tmp_path / "planted/mix/good/seed-0/predictions.jsonl"
    lines.write_text(lines.read_text() + '{"task": "boolq"}\n')
    with pytest.raises(StoreMismatch, match="line 61 is no prediction"):
        table([tmp_path])


def test_lost_rows_and_rows_that_are_there_twice_are_named(tmp_path):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.tables import table

    recipe = planted({"good": 0.9}, seeds=(0,))
    whole = _run(recipe, tmp_path).to_markdown()
    file = tmp_path / "planted/mix/good/seed-0/predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for some, words in ((lines[1:], "1 of 30 rows of boolq not"), (lines + lines[:2], "2 rows of boolq twice")):
        file.write_text("".join(some))
        for read in (lambda: table([tmp_path]), lambda: _run(recipe, tmp_path)):
            with pytest.raises(StoreMismatch, match=f"has {words}: take the file away, and the run is scored again"):
                read()
    file.unlink()
    with pytest.raises(StoreMismatch, match="holds nothing, though the run is finished: run it again"):
        table([tmp_path])
    assert _run(recipe, tmp_path).to_markdown() == whole


def test_what_is_no_folder_of_runs_and_no_whole_zip_file_is_named(tmp_path):
    from reftlens.experiments.runs.tables import table

    with pytest.raises(FileNotFoundError, match=r"none\.zip: there is no such folder or zip file"):
        table([tmp_path / "none.zip"])
    _run(planted({"good": 0.9}, seeds=(0,)), tmp_path)
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "planted"))
    with pytest.raises(ValueError, match=r"packed\.zip/planted/mix/good/seed-0 is a second run of good"):
        table([tmp_path / "planted", packed])
    whole = bytearray(packed.read_bytes())
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"packed\.zip is neither a folder nor a whole zip file"):
        table([packed])
    whole[len(whole) // 2] ^= 0xFF
    packed.write_bytes(whole)
    with pytest.raises(ValueError, match=r"packed\.zip is a damaged zip file"):
        table([packed])


_DAMAGED = (
    *("", "{}", "[1]", '{"tried": [], "steps": 1, "row_updates": 1, "rows": 1}'),
    '{"tried": [{"score": 1.0}], "steps": 1, "row_updates": 1, "rows": 1}',
)


@pytest.mark.parametrize("text", _DAMAGED)
def test_a_search_that_is_damaged_is_named(tmp_path, text):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 0.9}, seeds=(0,)), tmp_path)
    (tmp_path / "planted/mix/good/search.json").write_text(text)
    with pytest.raises(StoreMismatch, match=r"search\.json is (damaged|no search)"):
        table([tmp_path])


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_file_that_holds_no_table_is_named(tmp_path, name):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 0.9}, seeds=(0,)), tmp_path)
    (tmp_path / "planted/mix/good/seed-0" / name).write_text("[1]")
    with pytest.raises(StoreMismatch, match=rf"{name} is damaged \(no table, but \[1\]\)"):
        table([tmp_path])


def test_options_that_are_given_twice_add_up_and_tasks_are_asked_once():
    from reftlens.__main__ import _parser
    from reftlens.experiments.runs.recipe import Scope
    from reftlens.experiments.runs.rotating import Rotations

    words = "run commonsense --method loreft --method lora base --seeds 0 --seeds 1 --tasks piqa --tasks piqa"
    options = _parser().parse_args(words.split())
    assert (options.method, options.seeds) == (["loreft", "lora", "base"], [0, 1])
    assert Scope(tasks=options.tasks).tasks == Rotations.of(options.tasks).tasks == ("piqa",)


def test_a_text_with_separators_of_its_own_is_one_prediction(tmp_path):
    from reftlens.experiments.runs.records import Prediction, RunFolder

    texts = ["one\u2028two\x85three\x1cfour", "five\nsix\r\nseven"]
    told = [Prediction("boolq", i, "true", {"written": None}, details={"text": text}) for i, text in enumerate(texts)]
    for one in told:
        RunFolder(tmp_path).add([one])
    assert RunFolder(tmp_path).predictions() == told


def test_the_table_is_of_what_is_stored(tmp_path):
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 0.9, "bad": 0.5}), tmp_path)
    frame = table([tmp_path]).to_frame().set_index(["method", "task"])
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "planted")
    assert table([packed]).to_markdown() == table([tmp_path]).to_markdown()
    for method in ("good", "bad"):
        rights = []
        for seed in (0, 1):
            path = tmp_path / f"planted/mix/{method}/seed-{seed}/predictions.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rights += [row["given"]["written"] == row["answer"] for row in rows if row["task"] == "boolq"]
        row = frame.loc[method, "boolq"]
        assert row["score"] == pytest.approx(sum(rights) / len(rights))
        assert row["score_low"] < row["score"] < row["score_high"]
        assert (row["rows"], row["seeds"], row["parameters"], row["bytes_on_disk"]) == (30, 2, 12, 7)
    assert frame.loc["majority answer", "boolq"]["score"] == pytest.approx(ANSWERS.count("false") / len(ANSWERS))


def test_better_is_what_beats_the_best_baseline_beyond_its_interval(tmp_path):
    _run(planted({"good": 0.97, "base": 0.5, "chance": 0.6, "format-only": 0.6}, seeds=(0, 1, 2)), tmp_path)
    from reftlens.experiments.runs.tables import table

    gains = {(g.method, g.task): g for g in table([tmp_path]).gains()}
    assert gains["good", "boolq"].better and gains["good", "piqa"].better
    assert not gains["chance", "boolq"].better
    assert gains["good", "boolq"].to.startswith(("majority", "format-only"))
    assert {method for method, _ in gains} == {"good", "chance"}


def test_methods_are_set_against_one_of_them_row_by_row(tmp_path):
    from reftlens.experiments.answers.scores import difference
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 0.97, "bad": 0.5, "same": 0.5}, seeds=(0, 1, 2)), tmp_path)
    found = table([tmp_path])
    against = {(g.method, g.task): g for g in found.against("bad")}
    assert against.keys() == {(f"{name}, written", task) for name in ("good", "same") for task in ("boolq", "piqa")}
    assert against["good, written", "boolq"].to == "bad, written" and against["good, written", "piqa"].better
    assert not against["same, written", "piqa"].better
    rights = {c.method: c.rights for c in found.cells if c.task == "boolq"}
    assert against["good, written", "boolq"].difference == difference(rights["good"], rights["bad"])
    assert {g.worse for g in found.against("good") if g.task == "piqa"} == {
        True
    } and "| no, worse |" in found.to_markdown("good")
    assert "less bad" in found.to_markdown("bad") and "less bad" not in found.to_markdown()
    with pytest.raises(ValueError, match="no method 'worst' in this table, expected one of majority answer, bad"):
        found.against("worst")


def test_a_table_has_a_picture_and_seeds_of_other_rows_are_refused(tmp_path):
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 0.9, "bad": 0.5}), tmp_path)
    ax = table([tmp_path]).plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["boolq", "piqa"]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"good, written", "bad, written", "majority answer"}
    path = tmp_path / "planted/mix/good/seed-1"
    lines, config = (path / "predictions.jsonl").read_text(), json.loads((path / "config.json").read_text())
    (path / "predictions.jsonl").write_text(lines.split("\n", 1)[1])
    config["test"]["boolq"] = config["test"]["boolq"][1:]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="answered different rows of boolq"):
        table([tmp_path])


def test_a_picture_has_room_for_the_names_of_many_methods(tmp_path, recwarn):
    """matplotlib gives up its layout where a legend is higher than the picture, and the axes are a strip."""
    from reftlens.experiments.runs.tables import table

    _run(planted({f"method {i}": 0.5 for i in range(25)}), tmp_path)
    figure = table([tmp_path]).plot().figure
    figure.savefig(tmp_path / "scores.png")
    (ax,) = figure.axes
    assert ax.get_window_extent().height > 0.6 * figure.bbox.height
    assert not [str(w.message) for w in recwarn if "layout" in str(w.message)]


def test_the_same_run_twice_is_no_table_of_twice_the_rows(tmp_path):
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 0.9}), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="a second run of good with seed 0: make a table of each folder"):
        table([tmp_path / "a", tmp_path / "b"])


def test_limits_of_rows_are_counts():
    from reftlens.experiments.runs.recipe import Scope

    for name in ("limit", "train_limit", "steps"):
        for count in (0, -5):
            with pytest.raises(ValueError, match=f"{name}={count}, expected 1 or more"):
                Scope(**{name: count})


def test_a_row_of_several_parts_has_the_costs_of_all(tmp_path):
    found = _run(planted({"good": 0.9}, parameters={"boolq": 12, "piqa": 2000}), tmp_path)
    (line,) = [line for line in found.to_markdown().splitlines() if line.startswith("| good, written | ")]
    assert line.endswith("| 12 to 2,000 | 0.5 | 0.25 |")


def test_two_recipes_with_the_same_tasks_have_rows_of_their_own(tmp_path):
    from reftlens.experiments.runs.tables import table

    _run(planted({"good": 1.0}), tmp_path)
    _run(planted({"good": 0.0}, name="other"), tmp_path)
    both = table([tmp_path])
    lines = both.to_markdown().splitlines()
    assert any(line.startswith("| planted: good, written | 1.000 [") for line in lines)
    assert any(line.startswith("| other: good, written | 0.000 [") for line in lines)
    assert "planted: good, written: boolq 1.000" in str(both) and "other: good, written: boolq 0.000" in str(both)
    assert "| planted: good | boolq |" in both.to_markdown() and "| other: good | boolq |" in both.to_markdown()


def test_the_mean_is_over_tasks_by_the_first_of_their_scores(tmp_path):
    from dataclasses import replace

    from reftlens.experiments.runs.tables import table

    found = _run(planted({"good": 0.9}, seeds=(0,)), tmp_path)
    boolq, piqa = [c for c in found.cells if c.method == "good"]
    second = replace(piqa, metric="f1", choices=("true", "false"))
    measured = replace(boolq, way="nats", metric="mean", task="held out", given=())
    whole = replace(table([tmp_path]), cells=(boolq, piqa, second, measured))
    mean = (boolq.score.value + piqa.score.value) / 2
    assert f"| {mean:.3f} | 12 |" in whole.to_markdown()


def test_what_an_earlier_version_did_not_write_down_is_no_difference_and_what_it_did_is(tmp_path):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.records import RunFolder

    run = RunFolder(tmp_path / "run")
    run.begin({"seed": 0, "train": "a"})
    run.begin({"seed": 0, "train": "a", "asked": "b"})
    assert run.config() == {"seed": 0, "train": "a", "asked": "b"}
    for other in ({"seed": 0, "train": "a", "asked": "c"}, {"seed": 0, "train": "a"}, {"seed": 1, "train": "a"}):
        with pytest.raises(StoreMismatch, match="holds another run"):
            run.begin(other)


def test_runs_of_another_model_or_setting_are_no_seeds_of_one_table(tmp_path):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.runs.recipe import Scope
    from reftlens.experiments.runs.records import RunFolder
    from reftlens.experiments.runs.tables import table

    recipe = planted({"good": 0.9, "bad": 0.5})
    _run(recipe, tmp_path, methods=["good"], seeds=[0], scope=Scope(limit=10))
    recipe.done.clear()
    with pytest.raises(
        StoreMismatch, match=r"good.seed-1 and .*good.seed-0 differ in limit: 10 there, 20 now: one table"
    ):
        _run(recipe, tmp_path, methods=["good"], seeds=[1], scope=Scope(limit=20))
    assert recipe.done == [], "before any work"
    _run(recipe, tmp_path, methods=["bad"], seeds=[0], scope=Scope(limit=20))
    for method, model in (("good", "one"), ("bad", "another")):
        file = tmp_path / f"planted/mix/{method}/seed-0/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model": model}))
    with pytest.raises(StoreMismatch, match='differ in model: "another" there, "one" now'):
        table([tmp_path])
    file.unlink()
    with pytest.raises(StoreMismatch, match=r"bad.seed-0 has no config.json, so that nothing says"):
        table([tmp_path])
    (tmp_path / "planted/mix/bad/seed-0/.config.json.killed").touch()
    with pytest.raises(StoreMismatch, match=r"what run its cost.json, method, metrics.json, predictions.jsonl are of"):
        RunFolder(file.parent).begin({})


def test_predictions_that_were_taken_away_are_made_again(tmp_path):
    recipe = planted({"good": 0.9}, seeds=(0,))
    whole = _run(recipe, tmp_path).to_markdown()
    (tmp_path / "planted/mix/good/seed-0/predictions.jsonl").unlink()
    recipe.done.clear()
    assert _run(recipe, tmp_path).to_markdown() == whole
    assert [what for *_, what in recipe.done] == ["load", "boolq", "piqa"]


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    from reftlens.errors import StoreMismatch
    from reftlens.files import exclusive

    recipe = planted({"good": 0.9, "bad": 0.5}, seeds=(0,))
    with exclusive(tmp_path / "planted/mix/good/seed-0"):
        with pytest.raises(StoreMismatch, match=r"good.seed-0 is in use by another process"):
            _run(recipe, tmp_path, methods=["good"])
        _run(recipe, tmp_path, methods=["bad"])
    _run(recipe, tmp_path, methods=["good"])


def test_a_search_of_what_is_not_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"search=\['bad'\] names bad, which is not run: methods=\['good'\]"):
        _run(planted({"good": 0.9, "bad": 0.5}), tmp_path, methods=["good"], search=["bad"])
