"""A recipe of texts from end to end, on a tiny random model and made-up rows in the hub's schema."""

import json
import warnings
from dataclasses import replace
from functools import cache

import hub_rows
import pytest
import torch

import architectures

pytestmark = pytest.mark.filterwarnings("ignore:.*training rows ask what a test row asks")
TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "obqa")


@cache
def _subject():
    from transformers import AutoModelForCausalLM, LlamaConfig

    from reftlens.experiments.methods.subjects import Subject
    from reftlens.experiments.rows.templates import COMMONSENSE, alpaca

    texts = [COMMONSENSE[name](row, "")[0] for name in TASKS for row in _rows(name)]
    texts += [alpaca("Ann had 1 pens. She buys 2. How many has she?")] * 8
    tokenizer = architectures.train_tokenizer([*texts, "the correct answer is solution1 answer2 ending3 true"] * 3, 900)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=160, **sizes)
    return Subject(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


def _rows(name):
    return getattr(hub_rows, "arc" if name.startswith("arc") else name)()


@pytest.fixture
def folder(tmp_path):
    """A folder of data sets as the recipes look for them."""
    for split in ("train", "test"):
        (tmp_path / "data" / "commonsense" / split).mkdir(parents=True)
        for name in TASKS:
            lines = "".join(json.dumps(row) + "\n" for row in _rows(name))
            (tmp_path / "data" / "commonsense" / split / f"{name}.jsonl").write_text(lines)
    return tmp_path / "data"


def _recipe(**changes):
    from reftlens.experiments import RECIPES
    from reftlens.generation.decoding import Decoding
    from reftlens.training.config import FitConfig

    config = FitConfig(steps=3, batch_size=4)
    return replace(RECIPES["commonsense"], config=config, decoding=Decoding(max_new_tokens=6), **changes)


def _run(folder, out, methods, recipe=None, **scope):
    from reftlens.experiments import Scope, run_recipe

    settings = {"subject": _subject(), "seeds": [0, 1], "scope": Scope(data=folder, **scope), "out": out}
    return run_recipe(recipe or _recipe(), methods, progress=False, **settings)


def test_all_eight_sets_are_trained_on_together_and_answered_in_both_ways(folder, tmp_path):
    _run(folder, tmp_path / "runs", ["lora", "format-only"], limit=8, tasks=("piqa",))
    frame = _run(folder, tmp_path / "runs", ["base", "loreft"], limit=8).to_frame()
    assert set(frame["task"]) == set(TASKS) and set(frame["answered by"]) == {"", "written", "likelihood"}
    assert {"base", "loreft", "lora", "format-only"} <= set(frame["method"])
    assert (frame["rows"] == 8).all()
    mix = tmp_path / "runs/commonsense/mix"
    assert not (mix / "base/seed-1").exists(), "what trains nothing is asked once"
    run = mix / "loreft/seed-1"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 64 and all(set(row["given"]) == {"written", "likelihood"} for row in lines)
    assert all(row["given"]["likelihood"] == max(v := row["details"]["log_probs"], key=v.get) for row in lines)
    cost = json.loads((run / "metrics.json").read_text())
    assert cost["rows"] == 72 and cost["rows_left_out"] == 0 and cost["bytes_on_disk"] > 0
    assert len(cost["losses"]) == 3 and cost["parameters"] == 2 * (2 * 16 * 8 + 8)
    assert (run / "method/reft/reft.json").is_file()
    report = (tmp_path / "runs/commonsense/report.md").read_text()
    assert "loreft, written" in report and (tmp_path / "runs/commonsense/scores.png").stat().st_size > 1000


def test_likelihoods_are_those_of_a_plain_model_row_by_row(folder, tmp_path):
    from reftlens.experiments import load_rows

    _run(folder, tmp_path, ["base"], limit=2, tasks=("piqa", "boolq"))
    lines = (tmp_path / "commonsense/mix/base/seed-0/predictions.jsonl").read_text().splitlines()
    stored = {(row["task"], row["index"]): row["details"]["log_probs"] for row in map(json.loads, lines)}
    subject, model = _subject(), _subject().plain()
    for task in ("piqa", "boolq"):
        for row in load_rows(task, "test", data=folder, limit=2):
            for choice in row.choices:
                head = [
                    subject.tokenizer.bos_token_id,
                    *subject.tokenizer(row.prompt, add_special_tokens=False).input_ids,
                ]
                tail = subject.tokenizer("the correct answer is " + choice, add_special_tokens=False).input_ids
                with torch.no_grad():
                    logits = model(torch.tensor([head + tail])).logits[0].double().log_softmax(dim=-1)
                expected = sum(logits[len(head) - 1 + i, t].item() for i, t in enumerate(tail))
                assert stored[task, row.index][choice] == pytest.approx(expected, abs=1e-4)


def test_what_does_not_fit_is_counted_and_not_cut(folder, tmp_path):
    _run(folder, tmp_path, ["base"], _recipe(max_length=60), limit=3, tasks=("boolq", "hellaswag"))
    run = tmp_path / "commonsense/mix/base/seed-0"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    left = [row for row in lines if row["details"] == {"fits": False}]
    assert 0 < len(left) < len(lines) and all(set(row["given"].values()) == {None} for row in left)
    assert json.loads((run / "metrics.json").read_text())["rows_left_out"] > 0


def test_shuffled_labels_keep_their_form_and_their_counts(folder):
    from reftlens.experiments import Scope

    recipe, scope = _recipe(), Scope(data=folder)
    plain = recipe.trial("mix", "loreft", 0, _subject(), scope).rows
    dealt = recipe.trial("mix", "format-only", 0, _subject(), scope).rows
    assert [r.prompt for r in plain] == [r.prompt for r in dealt]
    assert 0.1 < sum(a.answer == b.answer for a, b in zip(plain, dealt, strict=True)) / len(plain) < 0.7
    assert all(row.answer in row.choices and row.completion.endswith(row.answer) for row in dealt)
    boolq = [sorted(r.answer for r in rows if r.task == "boolq") for rows in (plain, dealt)]
    assert boolq[0] == boolq[1]


def test_settings_are_chosen_by_rows_that_are_not_trained_on(folder, tmp_path, monkeypatch):
    from reftlens.experiments import Scope, run_recipe
    from reftlens.experiments.runs import tuning

    monkeypatch.setattr(tuning, "STEPS", 1)
    scope = Scope(data=folder, tasks=("boolq",), limit=2, train_limit=6)
    trial = _recipe().trial("mix", "red", 0, _subject(), scope)
    taught = {row.prompt for row in trial.rows}
    assert trial.dev_rows == 8 * 4 and not taught & {example.prompt for example in trial.dev.examples}
    settings = {"subject": _subject(), "seeds": [0], "scope": scope, "out": tmp_path, "progress": False}
    run_recipe(_recipe(), ["red"], search=["red"], **settings)
    told = json.loads((tmp_path / "commonsense/mix/red/search.json").read_text())
    assert len(told["tried"]) == 9 and told["rows"] == 32
    from reftlens.errors import StoreMismatch

    other = {**settings, "scope": replace(scope, train_limit=5), "seeds": [1]}
    with pytest.raises(StoreMismatch, match=r"red.search.json is of another search \(train: "):
        run_recipe(_recipe(), ["red"], **other)
    (tmp_path / "commonsense/mix/red/search.json").write_text("{")
    with pytest.raises(StoreMismatch, match=r"search.json is damaged .*: take its folder away"):
        run_recipe(_recipe(), ["red"], **settings)


def test_a_limit_that_takes_all_rows_leaves_some_to_choose_settings_by(folder):
    from reftlens.experiments import Scope

    trial = _recipe().trial("mix", "red", 0, _subject(), Scope(data=folder))
    taught = {row.prompt for row in trial.rows}
    assert trial.dev_rows == 8 and len(trial.rows) == 72, "a tenth of ten"
    assert not taught & {example.prompt for example in trial.dev.examples}
    for path in (folder / "commonsense/train").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(ValueError, match="no rows are left to choose settings by"):
        assert _recipe().trial("mix", "red", 0, _subject(), Scope(data=folder)).dev


def test_a_scope_takes_a_folder_and_a_task_as_text(folder):
    from reftlens.experiments import Scope

    assert Scope(str(folder), "piqa") == Scope(folder, ("piqa",)) == Scope(folder, ["piqa"])
    trial = _recipe().trial("mix", "base", 0, _subject(), Scope(str(folder), "piqa", limit=2))
    assert trial.tasks == ("piqa",)


def test_rows_none_of_which_fits_are_refused(folder):
    from reftlens.experiments import Scope

    with pytest.raises(ValueError, match=r"none of 72 training rows fits into 12 tokens, two of them to spare"):
        _recipe(max_length=12).trial("mix", "base", 0, _subject(), Scope(data=folder))


@pytest.fixture
def problems(tmp_path):
    """A folder of word problems: seven sets to test on, steps to train on, and steps that are held out."""
    folder = tmp_path / "data" / "arithmetic"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    for name in ("mawps", "svamp", "gsm8k", "aqua"):
        lines = "".join(json.dumps(row) + "\n" for row in hub_rows.ARITHMETIC[name][0])
        (folder / "test" / f"{name}.jsonl").write_text(lines)
    (folder / "train/gsm8k_dev300.jsonl").write_text((folder / "test/gsm8k.jsonl").read_text())
    steps = "She has {} and 5 more, so {} in all. The final answer is: {}"
    taught = [
        {"instruction": f"Eve has {i} hats, gets 5. How many?", "input": "", "output": steps.format(i, i + 5, i + 5)}
        | {"answer": str(i + 5), "in_test": ["svamp"] * (i == 3)}
        for i in range(12)
    ]
    (folder / "train/math10k_sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))
    return tmp_path / "data"


def _arithmetic():
    from reftlens.experiments import RECIPES
    from reftlens.generation.decoding import Decoding
    from reftlens.training.config import FitConfig

    decoding = Decoding(max_new_tokens=5)
    return replace(RECIPES["arithmetic"], config=FitConfig(steps=2, batch_size=4), decoding=decoding)


@pytest.mark.filterwarnings("ignore:arithmetic goes without")
def test_training_rows_that_ask_what_a_test_row_asks_are_told(problems):
    from reftlens.experiments import Scope

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "arithmetic goes without")
        _arithmetic().trial("mix", "base", 0, _subject(), Scope(data=problems))
    asked = json.loads((problems / "arithmetic/test/gsm8k.jsonl").read_text().splitlines()[0])["question"]
    told = {"instruction": f"{asked.upper()}!", "input": "", "output": "The final answer is: 8", "answer": "8"}
    with (problems / "arithmetic/train/math10k_sample.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    with pytest.warns(
        UserWarning, match="1 of 11 training rows ask what a test row asks, the first is row 12 of math10k"
    ):
        _arithmetic().trial("mix", "base", 0, _subject(), Scope(data=problems))


@pytest.mark.filterwarnings("ignore:arithmetic goes without")
def test_word_problems_are_answered_in_steps_with_edits_that_reach_into_them(problems, tmp_path):
    methods = ["base", "loreft", "loreft-4", "loreft-all", "loreft-opening"]
    frame = _run(problems, tmp_path / "runs", methods, _arithmetic(), limit=3).to_frame()
    assert set(frame["task"]) == {"mawps", "svamp", "gsm8k", "aqua", "gsm8k, dev"}
    gold = frame[frame["task"] == "gsm8k, dev"]
    assert set(gold["metric"]) == {"mean"} and (gold["score"] < 0).all() and set(gold["method"]) == set(methods)
    sites = {}
    for name in methods[1:]:
        run = tmp_path / f"runs/arithmetic/mix/{name}/seed-0"
        (first, *_) = json.loads((run / "method/reft/reft.json").read_text())["sites"]
        sites[name] = json.dumps(first["positions"])
        assert json.loads((run / "metrics.json").read_text())["rows"] == 10, (
            "a row whose question is tested is left out, and one is kept to choose settings by"
        )
    assert len({sites["loreft"], sites["loreft-4"], sites["loreft-all"]}) == 3
    assert sites["loreft"] == sites["loreft-opening"] and "response" not in sites["loreft"]
    assert "response" in sites["loreft-4"] and '"n": 4' in sites["loreft-4"]


@pytest.mark.filterwarnings("ignore:arithmetic goes without")
def test_a_problem_that_leaves_no_room_for_what_is_written_is_counted_and_not_the_end_of_a_run(problems, tmp_path):
    from reftlens.experiments import Scope, load_rows
    from reftlens.generation.decoding import Decoding

    count = [len(_subject().tokenizer(r.prompt).input_ids) for r in load_rows("gsm8k", "test", data=problems)]
    (problems / "arithmetic/test/gsm8k.jsonl").open("a").write(
        json.dumps({"question": "Ann had 1 pens. " * 8 + "How many has she?", "answer": "She has 1.\n#### 1"}) + "\n"
    )
    recipe = replace(_arithmetic(), decoding=Decoding(max_new_tokens=160 - max(count) - 1), held_out=())
    _run(problems, tmp_path, ["base"], recipe, tasks=("gsm8k",))
    lines = (tmp_path / "arithmetic/mix/base/seed-0/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["details"] == {"fits": False} for line in lines] == [False] * 10 + [True]
    with pytest.raises(ValueError, match=r"none of 11 test rows leaves room for the 200 tokens .* context of 160"):
        recipe = replace(recipe, decoding=Decoding(max_new_tokens=200))
        recipe.trial("mix", "base", 0, _subject(), Scope(data=problems, tasks=("gsm8k",)))


@pytest.mark.filterwarnings("ignore:arithmetic goes without")
def test_of_an_opening_the_first_words_are_taught_and_no_end(problems):
    from reftlens.experiments import Scope

    recipe, scope = _arithmetic(), Scope(data=problems, tasks=("svamp",))
    whole = recipe.trial("mix", "loreft", 0, _subject(), scope)
    short = replace(recipe, entries={"opening": replace(recipe.entries["loreft-opening"], opening=3)})
    opening = short.trial("mix", "opening", 0, _subject(), scope)
    assert all(
        b.completion == " ".join(a.completion.split()[:3]) for a, b in zip(whole.rows, opening.rows, strict=True)
    )
    end = _subject().tokenizer.eos_token_id
    assert bool((whole.data.tokens[whole.data.target_mask] == end).any())
    assert not bool((opening.data.tokens[opening.data.target_mask] == end).any())


def test_instructions_are_held_out_of_the_one_file_and_texts_are_kept_for_a_judge(tmp_path):
    from reftlens.experiments import RECIPES, Scope
    from reftlens.experiments.judges.duels import finished_run, pairs_of
    from reftlens.generation.decoding import Decoding
    from reftlens.training.config import FitConfig

    rows = [{"instruction": f"Say {i} words.", "input": "", "output": f"one two {i}"} for i in range(40)]
    (tmp_path / "ultrafeedback_1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = {"base": RECIPES["instruct"].entries["base"], "red": RECIPES["instruct"].entries["red"]}
    red = replace(entries["red"], method=replace(entries["red"].method, layers=(0, 1)))
    small = {"config": FitConfig(steps=2, batch_size=4), "decoding": Decoding(max_new_tokens=4)}
    recipe = replace(RECIPES["instruct"], entries={**entries, "red": red}, **small)
    trial = recipe.trial("mix", "red", 0, _subject(), Scope(data=tmp_path))
    tested = {row.question for row in trial.test["ultrafeedback"]}
    assert len(tested) == 4 and len(trial.rows) == 33 and not tested & {row.question for row in trial.rows}
    frame = _run(tmp_path, tmp_path / "runs", ["base", "red"], recipe).to_frame()
    assert set(frame["metric"]) == {"mean"} and (frame["score"] < 0).all() and set(frame["rows"]) == {4}
    lines = (tmp_path / "runs/instruct/mix/red/seed-1/predictions.jsonl").read_text().splitlines()
    written = [row for row in map(json.loads, lines) if row["task"] == "ultrafeedback"]
    assert len(written) == 4 and all(row["given"] == {} and isinstance(row["details"]["text"], str) for row in written)
    assert {row["details"]["instruction"].lower().strip(".") for row in written} == tested
    runs = [finished_run(tmp_path / f"runs/instruct/mix/{run}") for run in ("base/seed-0", "red/seed-1")]
    pairs, left_out = pairs_of(*runs)
    assert len(pairs) == 4 and not left_out and pairs[0].texts[1] == written[0]["details"]["text"]


def test_a_long_answer_is_no_reason_to_leave_its_instruction_out_and_counted_where_it_is_measured(tmp_path):
    from reftlens.experiments import RECIPES
    from reftlens.generation.decoding import Decoding

    rows = [
        {"instruction": f"Say {i} words.", "input": "", "output": "one two " * (50 * (i % 2) + 1)} for i in range(40)
    ]
    (tmp_path / "ultrafeedback_1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = replace(RECIPES["instruct"], decoding=Decoding(max_new_tokens=2), max_length=120)
    frame = _run(tmp_path, tmp_path / "runs", ["base"], recipe).to_frame()
    run = tmp_path / "runs/instruct/mix/base/seed-0"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    written = [row for row in lines if row["task"] == "ultrafeedback"]
    long = sum(len(row["answer"]) > 100 for row in written)
    assert len(written) == 4 and long and all("text" in row["details"] for row in written)
    assert set(frame["rows"]) == {4 - long}
    assert json.loads((run / "metrics.json").read_text())["rows_not_measured"] == long


def test_a_set_that_is_kept_aside_loads_by_its_file_and_what_is_missing_is_said(folder, tmp_path):
    (folder / "commonsense/test/obqa.jsonl").rename(folder / "commonsense/test/new_set.jsonl")
    llm = {"instruction": "Is it so?\n\nAnswer format: yes/no", "input": "", "output": "", "answer": "yes"}
    (folder / "commonsense/test/new_set.jsonl").write_text(json.dumps(llm) + "\n")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _run(folder, tmp_path / "a", ["base"], limit=1)
    assert any("goes without test/obqa.jsonl" in str(w.message) for w in seen)
    assert "obqa" not in set(found.to_frame()["task"])
    frame = _run(folder, tmp_path / "b", ["base"], tasks=("new_set",)).to_frame()
    assert set(frame["task"]) == {"new_set"}
    with pytest.raises(ValueError, match="no test rows of obqa"):
        _run(folder, tmp_path / "c", ["base"], tasks=("obqa",))
    with pytest.raises(ValueError, match="bolq"):
        _run(folder, tmp_path / "d", ["base"], tasks=("bolq",))


def test_the_command_line_says_what_it_would_take_and_makes_tables(folder, tmp_path, monkeypatch, capsys):
    from reftlens.__main__ import main
    from reftlens.experiments import RECIPES, Scope
    from reftlens.experiments.methods.subjects import Subject
    from reftlens.experiments.recipes.texts import TextRecipe

    monkeypatch.setitem(RECIPES, "commonsense", _recipe())
    asked, plain = [], _subject().plain().to(torch.bfloat16)
    subjects = {"float32": _subject(), "bfloat16": Subject(plain, tokenizer=_subject().tokenizer)}
    monkeypatch.setattr(TextRecipe, "subject", lambda self, model, dtype: asked.append(dtype) or subjects[dtype])
    arguments = ["run", "commonsense", "--data", str(folder), "--method", "base", "--seeds", "0", "--limit", "2"]
    assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "mix/base: 0 steps" in said
        and " bytes on disk, about; " in said
        and "minutes once" in said
        and not (tmp_path / "runs").exists()
    )
    assert main([*arguments, "--search", "red", "--train-limit", "6", "--dry-run"]) == 0
    said = capsys.readouterr().out
    trial = _recipe().trial("mix", "red", 0, _subject(), Scope(folder, train_limit=6, steps=60))
    trained = 9 * trial.cost()["tokens of training"]
    assert f"mix/red, its search: 9 settings, {trained:,} tokens of training, " in said and "minutes, once" in said
    assert main([*arguments, "--search", "base", "--dry-run"]) == 1
    assert "base is no method with settings to search" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    table = capsys.readouterr().out.split("\n\nconfigurations")[0]
    assert "| base, likelihood |" in table
    assert main(["run", "--table", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.strip() == table.strip()
    assert main([*arguments, "--out", str(tmp_path / "runs"), "--dtype", "bfloat16"]) == 1
    assert 'dtype: "float32" there, "bfloat16" now' in capsys.readouterr().err and asked[-1] == "bfloat16"
    assert main(["run", "arithmetic", "--seeds", "1", "--table", str(tmp_path / "runs")]) == 1
    assert "nothing else: drop recipe, seeds" in capsys.readouterr().err
    assert main(["run"]) == 1 and "run needs a recipe" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:arithmetic goes without")
def test_held_out_rows_are_among_what_a_run_is_said_to_score(problems):
    from reftlens.experiments import Scope

    costs = [
        replace(_arithmetic(), held_out=held_out).trial("mix", "base", 0, _subject(), Scope(data=problems)).cost()
        for held_out in ((), (("gsm8k", "dev"),))
    ]
    rows = _arithmetic().rows("gsm8k", "dev", Scope(data=problems))
    count = sum(len(_subject().tokenizer(row.prompt + row.completion).input_ids) for row in rows)
    assert costs[1]["tokens of scoring"] - costs[0]["tokens of scoring"] == count > 0


def test_another_right_answer_in_a_file_makes_another_run(folder, tmp_path):
    from reftlens.errors import StoreMismatch

    _run(folder, tmp_path, ["base"], limit=3, tasks=("boolq",))
    file = folder / "commonsense/test/boolq.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, "answer": not row["answer"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StoreMismatch, match=r"holds another run .asked: "):
        _run(folder, tmp_path, ["base"], limit=3, tasks=("boolq",))
    with pytest.raises(StoreMismatch, match="max_length: 512 there, 500 now"):
        _run(folder, tmp_path, ["base"], _recipe(max_length=500), limit=3, tasks=("boolq",))
