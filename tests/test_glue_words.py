"""GLUE answered in words, from end to end on a tiny random decoder and made-up rows in the hub's schema."""

import json
from dataclasses import replace
from functools import cache

import hub_rows
import pytest
import torch

import architectures

pytestmark = pytest.mark.filterwarnings("ignore:.*training rows ask what a test row asks")
TASKS = ("sst2", "stsb", "qnli", "mnli", "mrpc", "cola", "qqp", "rte")


@cache
def _subject():
    from transformers import AutoModelForCausalLM, LlamaConfig

    from reftlens.experiments import load_rows
    from reftlens.experiments.methods.subjects import Subject

    rows = [row for name in TASKS for row in load_rows(name, data=hub_rows.GLUE[name][0])]
    tokenizer = architectures.train_tokenizer([row.prompt + row.completion for row in rows] * 3, 500)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=96, num_key_value_heads=2, **sizes)
    return Subject(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


@pytest.fixture
def folder(tmp_path):
    """All eight tasks; what is trained on is not asked again."""
    for task in TASKS:
        (tmp_path / "data/glue" / task).mkdir(parents=True)
        for split, mark in (("train", "taught "), ("validation", "")):
            rows = [{k: mark + v if isinstance(v, str) else v for k, v in r.items()} for r in hub_rows.GLUE[task][0]]
            file = tmp_path / "data/glue" / task / f"{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def _recipe():
    from reftlens.experiments import RECIPES
    from reftlens.generation.decoding import Decoding
    from reftlens.training.config import FitConfig

    small = {"config": FitConfig(steps=2, batch_size=4), "decoding": Decoding(max_new_tokens=4)}
    return replace(RECIPES["glue-words"], **small)


def _run(folder, out, methods, tasks=None, **more):
    from reftlens.experiments import Scope, run_recipe

    settings = {"subject": _subject(), "seeds": (0,), "scope": Scope(data=folder, tasks=tasks), "out": out}
    return run_recipe(_recipe(), methods, progress=False, **settings, **more)


def _predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_all_eight_tasks_are_trained_one_by_one_and_scored_by_their_metrics_in_both_ways(folder, tmp_path):
    from reftlens.experiments.runs.tables import table

    found = _run(folder, tmp_path / "runs", ["base", "loreft"])
    frame = found.to_frame()
    metrics = {(task, way): set(some["metric"]) for (task, way), some in frame.groupby(["task", "answered by"])}
    known = {"stsb": {"pearson", "spearman"}, "cola": {"accuracy", "matthews"}}
    known |= {"mrpc": {"accuracy", "f1"}, "qqp": {"accuracy", "f1"}}
    written = {(task, "written"): known.get(task, {"accuracy"}) for task in TASKS}
    likely = {(task, "likelihood"): known.get(task, {"accuracy"}) for task in TASKS if task != "stsb"}
    assert metrics == written | likely
    assert (frame["part"] == frame["task"]).all() and set(frame["rows"]) == {5}
    assert table([tmp_path / "runs"]).to_markdown() == found.to_markdown()
    for task in TASKS:
        run = tmp_path / "runs/glue-words" / task / "loreft/seed-0"
        cost, rows = json.loads((run / "metrics.json").read_text()), _predictions(run)
        assert cost["rows"] == 10 and len(cost["losses"]) == 2 and {row["task"] for row in rows} == {task}
        for row in rows:
            values = row["details"].get("log_probs", {})
            assert set(values) == (set() if task == "stsb" else set(hub_rows.GLUE[task][1]))
            assert not values or row["given"]["likelihood"] == max(values, key=values.get)


@pytest.mark.parametrize("method", ["direft", "red", "lora", "format-only"])
def test_every_method_is_trained_on_words_and_on_numbers(folder, tmp_path, method):
    frame = _run(folder, tmp_path, [method], ("mnli", "stsb")).to_frame()
    assert set(frame["method"]) == {method} and set(frame["task"]) == {"mnli", "stsb"}


def test_the_likelihood_of_a_label_is_that_of_its_word(folder, tmp_path):
    from reftlens.experiments import load_rows

    _run(folder, tmp_path, ["base"], ("mnli",))
    stored = {row["index"]: row for row in _predictions(tmp_path / "glue-words/mnli/base/seed-0")}
    tokenizer, model = _subject().tokenizer, _subject().plain()
    words = {"entailment": " yes", "neutral": " maybe", "contradiction": " no"}
    for row in load_rows("mnli", "test", data=folder):
        if row.index in stored:
            head = [tokenizer.bos_token_id, *tokenizer(row.prompt, add_special_tokens=False).input_ids]
            for label, value in stored[row.index]["details"]["log_probs"].items():
                tail = tokenizer(words[label], add_special_tokens=False).input_ids
                with torch.no_grad():
                    logits = model(torch.tensor([head + tail])).logits[0].double().log_softmax(dim=-1)
                expected = sum(logits[len(head) - 1 + i, t].item() for i, t in enumerate(tail))
                assert value == pytest.approx(expected, abs=1e-4)


def test_what_is_written_is_read_by_the_rule_of_its_task(folder, monkeypatch):
    from reftlens.experiments import Scope
    from reftlens.experiments.recipes.asking import Asking

    said = {"sst2": "Positive!", "stsb": " 2.60 of 5", "mnli": "well", "rte": "yes or no"}
    read = {"sst2": "positive", "stsb": "2.6", "mnli": None, "rte": None}
    for task, text in said.items():
        monkeypatch.setattr(Asking, "_texts", lambda self, trained, rows, text=text: [text] * len(rows))
        trial = _recipe().trial(task, "base", 0, _subject(), Scope(data=folder))
        trial.fit(None, progress=False)
        found = trial.predict(task, progress=False)
        assert {p.given["written"] for p in found} == {read[task]} and len(found) == 5


def test_rows_are_those_that_the_recipe_of_heads_trains_on_chooses_by_and_reports(folder):
    from reftlens.experiments import RECIPES, Scope

    scope = Scope(data=folder, train_limit=7, limit=4)
    for task in TASKS:
        words, head = (RECIPES[n].trial(task, "lora", 0, _subject(), scope) for n in ("glue-words", "glue"))
        assert words.rows == head.rows and words.test[task] == head.test and len(head.test) == 4
        assert [e.prompt for e in words.dev.examples] == [row.prompt for row in head.dev] and words.dev_rows == 5
        assert not {row.index for row in head.dev} & {row.index for row in words.test[task]}
        assert words.config["choices"] == head.config["choices"] and words.config["part"] == task


def test_words_and_a_head_stand_in_one_table_row_by_row_each_with_its_own_costs(folder, tmp_path):
    from reftlens.experiments import RECIPES, Scope, run_recipe
    from reftlens.experiments.runs.tables import table
    from reftlens.training.config import FitConfig

    words = _run(folder, tmp_path, ["base", "loreft"], ("rte",))
    head = replace(RECIPES["glue"], config=FitConfig(steps=2, batch_size=4, patience=9))
    settings = {"subject": _subject(), "seeds": (0,), "scope": Scope(data=folder, tasks=("rte",)), "out": tmp_path}
    heads = run_recipe(head, ["loreft"], progress=False, **settings)
    both = table([tmp_path / "glue", tmp_path / "glue-words"])
    assert both.costs == {**words.costs, **heads.costs} and len(both.costs) == 3
    parameters = {name: cost["parameters"] for name, cost in both.costs.items()}
    assert parameters["glue/rte/loreft"] == 2 * (2 * 16 + 1) and parameters["glue-words/rte/loreft"] == 2 * (
        2 * 16 * 8 + 8
    )
    frame = both.to_frame().set_index(["recipe", "method", "answered by"])["parameters"]
    assert frame["glue", "loreft", "head"] == parameters["glue/rte/loreft"]
    assert "glue, glue-words: scores" in repr(both)
    (gain,) = both.gains("head")
    assert (gain.method, gain.to, gain.difference.count) == ("loreft", "base, likelihood", 5)


def test_settings_are_chosen_by_the_dev_half(folder, tmp_path, monkeypatch):
    from reftlens.experiments.runs import tuning

    monkeypatch.setattr(tuning, "STEPS", 1)
    _run(folder, tmp_path, ["red"], ("stsb",), search=["red"])
    told = json.loads((tmp_path / "glue-words/stsb/red/search.json").read_text())
    assert len(told["tried"]) == 9 and told["rows"] == 5 and told["row_updates"] == 9 * 4
    best = max(told["tried"], key=lambda each: each["score"])["setting"]
    config = json.loads((tmp_path / "glue-words/stsb/red/seed-0/config.json").read_text())
    assert config["fit"]["lr"] == best["lr"] and config["settings"]["positions"] == best["positions"]


def test_dealt_out_answers_are_those_of_the_task(folder):
    from reftlens.experiments import Scope

    for task in ("stsb", "mnli"):
        plain, dealt = (
            _recipe().trial(task, m, 0, _subject(), Scope(data=folder)).rows for m in ("loreft", "format-only")
        )
        assert sorted(r.completion for r in plain) == sorted(r.completion for r in dealt)
        assert [r.prompt for r in plain] == [r.prompt for r in dealt] and plain != dealt


def test_tasks_that_a_folder_lacks_are_said_and_unknown_ones_refused(folder, tmp_path):
    from reftlens.experiments import RECIPES, Scope

    (folder / "glue/qqp/train.jsonl").unlink()
    with pytest.warns(UserWarning, match="glue-words goes without qqp/train.jsonl"):
        assert set(_recipe().parts(Scope(data=folder))) == {*TASKS} - {"qqp"}
    with pytest.raises(ValueError, match="sst-2"):
        _run(folder, tmp_path / "a", ["base"], ("sst-2",))
    for recipe, task, family in (
        ("glue-words", "piqa", "commonsense"),
        ("glue", "aqua", "arithmetic"),
        ("commonsense", "rte", "glue"),
    ):
        with pytest.raises(ValueError, match=f"{task} is a task of {family}: expected one of"):
            RECIPES[recipe].trial(task, "lora", 0, _subject(), Scope(data=folder, tasks=(task,)))
    with pytest.raises(ValueError, match="glue-words has no method 'head'"):
        _run(folder, tmp_path / "b", ["head"], ("sst2",))
