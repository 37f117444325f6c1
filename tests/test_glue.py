"""GLUE from end to end on a tiny random encoder and made-up rows: every task, every method, and what is refused."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import hub_rows
import pytest
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zoo

pytestmark = pytest.mark.filterwarnings("ignore:.*training rows ask what a test row asks")
TASKS = ("sst2", "stsb", "qnli", "mnli", "mrpc", "cola", "qqp", "rte")
METHODS = ("head", "loreft", "red", "lora", "dora", "ia3", "prefix", "bitfit", "reft+lora")


@cache
def _subject():
    from reftlens.experiments.methods.subjects import Subject

    return Subject(zoo.plain("BertForMaskedLM"), tokenizer=zoo.tokenizer())


@pytest.fixture
def folder(tmp_path):
    for task in TASKS:
        (tmp_path / "glue" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [json.dumps(row) for row in hub_rows.GLUE[task][0]]
            (tmp_path / "glue" / task / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def _recipe():
    from reftlens.experiments import RECIPES
    from reftlens.training.config import FitConfig

    return replace(RECIPES["glue"], config=FitConfig(steps=3, batch_size=4, patience=9))


def _run(folder, out, methods, tasks=None, seeds=(0,), recipe=None):
    from reftlens.experiments import Scope, run_recipe

    settings = {"subject": _subject(), "seeds": seeds, "scope": Scope(data=folder, tasks=tasks), "out": out}
    return run_recipe(recipe or _recipe(), methods, progress=False, **settings)


def test_all_eight_tasks_are_trained_with_a_head_and_scored_by_their_metrics(folder, tmp_path):
    frame = _run(folder, tmp_path / "runs", ["loreft"]).to_frame()
    metrics = {task: set(some["metric"]) for task, some in frame.groupby("task")}
    assert metrics == {
        "sst2": {"accuracy"}, "qnli": {"accuracy"}, "mnli": {"accuracy"}, "rte": {"accuracy"},
        "stsb": {"pearson", "spearman"}, "cola": {"accuracy", "matthews"},
        "mrpc": {"accuracy", "f1"}, "qqp": {"accuracy", "f1"},
    }  # fmt: skip
    lines = (tmp_path / "runs/glue/mnli/loreft/seed-0/predictions.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        scores = row["details"]["scores"]
        assert len(scores) == 3
        assert row["given"]["head"] == ("entailment", "neutral", "contradiction")[scores.index(max(scores))]


def test_a_set_that_no_task_names_is_trained_on_its_own_labels(folder, tmp_path):
    for name, labels in (("names", ["no", "yes", "maybe"]), ("values", [0.5, 7.25, -3])):
        (folder / "glue" / name).mkdir()
        for split in ("train", "validation"):
            rows = [{"text": f"row {i}", "label": labels[i % 3], "label_text": "told", "idx": i} for i in range(12)]
            rows = [row for row in rows if split == "train" or row["label"] != "maybe"]
            (folder / "glue" / name / f"{split}.json").write_text(json.dumps(rows))
    frame = _run(folder, tmp_path / "runs", ["head"], tasks=("names", "values")).to_frame()
    metrics = {task: set(some["metric"]) for task, some in frame.groupby("task")}
    assert metrics == {"names": {"accuracy"}, "values": {"pearson", "spearman"}}
    config = json.loads((tmp_path / "runs/glue/names/head/seed-0/config.json").read_text())
    assert config["choices"] == {"names": ["maybe", "no", "yes"]} and config["head"]["outputs"] == 3
    from reftlens.experiments.runs.recipe import Scope

    trial = _recipe().trial("values", "head", 0, _subject(), Scope(data=folder, tasks=("values",)))
    trial.fit(None, progress=False)
    assert -1 <= trial.dev_score() <= 1 and trial.rows[1].fields["texts"] == ("row 1",)


def test_every_method_stands_beside_the_same_head_and_its_own_numbers_are_counted(folder, tmp_path):
    found = _run(folder, tmp_path, METHODS, ("sst2",), seeds=(0, 1))
    d, layers = _subject().bridge.cfg.d_model, _subject().bridge.cfg.n_layers
    counts = {name.split("/")[-1]: cost["parameters"] for name, cost in found.costs.items()}
    assert counts["head"] == 0 and counts["loreft"] == layers * (2 * d + 1) and counts["red"] == layers * 2 * d
    assert counts["lora"] == layers * 2 * (2 * d * 8) < counts["dora"]
    assert all(counts[name] > 0 for name in METHODS if name != "head")
    heads = set()
    for name in METHODS:
        cost = json.loads((tmp_path / f"glue/sst2/{name}/seed-1/metrics.json").read_text())
        assert len(cost["losses"]) == 3 and cost["bytes_on_disk"] > 0 and cost["validation"]
        heads.add(json.dumps(json.loads((tmp_path / f"glue/sst2/{name}/seed-1/config.json").read_text())["head"]))
    assert len(heads) == 1


@pytest.mark.parametrize("name", METHODS)
def test_what_was_trained_is_stored_with_its_head(folder, tmp_path, name):
    from safetensors.torch import load_file

    from reftlens.experiments import Scope

    recipe, scope = _recipe(), Scope(data=folder, limit=4)
    trial, again = (recipe.trial("mnli", name, 1, _subject(), scope) for _ in range(2))
    trial.fit(tmp_path / "checkpoint", progress=False)
    expected = trial.predict("mnli", progress=False)
    untrained = again.predict("mnli", progress=False)
    trial.save(tmp_path / "method")
    stored = [load_file(file) for file in (tmp_path / "method").rglob("*.safetensors")]
    assert trial.trained.size == sum(t.numel() for tensors in stored for t in tensors.values())
    again.load(tmp_path / "method")
    assert again.predict("mnli", progress=False) == expected
    assert [p.details for p in untrained] != [p.details for p in expected]


def _edited(model, reft):
    """`model` with LoReFTs after its layers, at the first three and last three tokens of a row, as forward hooks."""

    def hook(kind):
        def edit(module, args, out):
            h = out.clone()
            at = sorted({*range(min(3, h.shape[1])), *range(max(0, h.shape[1] - 3), h.shape[1])})
            R = kind.frame()
            h[0, at] = h[0, at] + (F.linear(h[0, at], kind.W, kind.b) - h[0, at] @ R) @ R.T
            return h

        return edit

    for kind, layer in zip(reft.distinct, model.base_model.model.encoder.layer, strict=False):  # the head comes last
        layer.register_forward_hook(hook(kind))
    return model


@pytest.mark.parametrize("name", ["lora", "reft+lora"])
def test_what_acts_in_the_weights_and_a_head_are_trained_as_by_a_plain_loop(folder, tmp_path, name):
    """The twin of the law of heads, for what is no ReFT alone: peft and torch written out."""
    from peft import LoraConfig, get_peft_model

    from reftlens.experiments import Scope

    trial = replace(_recipe(), dropout=0.0).trial("mnli", name, 3, _subject(), Scope(data=folder))
    reft = trial.trained.reft.clone() if name == "reft+lora" else None
    costs = trial.fit(tmp_path / "checkpoint", progress=False)
    torch.manual_seed(3)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(_subject().plain().base_model.requires_grad_(False), config).eval()
    if reft is None:
        head = trial.trained.head.__class__(trial.trained.head.d, 3, generator=torch.Generator().manual_seed(3))
        trained = [*model.parameters(), *head.parameters()]
    else:
        model, head = _edited(model, reft), reft.distinct[-1]
        trained = [*model.parameters(), *reft.parameters()]
    trained = [p for p in trained if p.requires_grad]
    optimizer, data, losses = torch.optim.AdamW(trained, weight_decay=0), trial._encoded(trial.rows), []
    for step in range(3):
        (rows,) = trial.fit_config.micro_batches(step, len(data))
        scores = []
        for row in rows:
            ids = data.tokens[row][data.attention_mask[row]]
            at = -1 if _subject().tokenizer.cls_token_id is None else 0
            scores.append(head.scores(model(input_ids=ids[None]).last_hidden_state[0, at][None])[0])
        loss = F.cross_entropy(torch.stack(scores), torch.tensor([int(data.examples[r].label) for r in rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = trial.fit_config.learning_rate(step, 3)
        optimizer.step()
        losses.append(loss.item())
    assert costs["losses"] == pytest.approx(losses, abs=1e-4)  # float32


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "LlamaForCausalLM"])
def test_the_same_head_reads_the_same_states_beside_every_method_of_encoders_and_decoders(name):
    from reftlens.experiments import RECIPES
    from reftlens.experiments.methods.classifiers import HeadSpec, classifier
    from reftlens.experiments.methods.subjects import Subject
    from reftlens.scoring.heads import head_of
    from reftlens.text.labelled import encode_labelled

    subject, methods = Subject(zoo.plain(name), tokenizer=zoo.tokenizer()), RECIPES["glue"].methods
    data = encode_labelled(
        subject.bridge, ["the cat sat on the mat", ("a dog", "ran"), "the moon was green"], [0, 1, 1]
    )
    begin = {m: classifier(methods[m], HeadSpec(2), subject, 0) for m in ("head", "loreft", "lora", "ia3", "reft+lora")}
    heads = {m: head_of(c.reft)[1] if hasattr(c, "reft") else c.head for m, c in begin.items()}
    for head in heads.values():
        head.load_state_dict(heads["head"].state_dict())
    scores = {m: c.scores(data) for m, c in begin.items()}
    for method, values in scores.items():  # none of them edits before it is trained
        assert torch.allclose(values, scores["head"], atol=1e-5), method
    states = subject.plain().base_model(input_ids=data[:1].tokens).last_hidden_state
    at = 0 if subject.tokenizer.cls_token_id is not None else -1
    assert torch.allclose(scores["head"][:1], heads["head"].eval().scores(states[:, at]), atol=1e-5)


def test_a_decoder_is_trained_with_a_head_too(folder, tmp_path):
    from reftlens.experiments.methods.subjects import Subject

    subject = Subject(zoo.plain("LlamaForCausalLM"), tokenizer=zoo.tokenizer())
    from reftlens.experiments import Scope, run_recipe

    scope = Scope(data=folder, tasks=("rte",))
    methods = ["head", "loreft", "lora", "reft+lora"]
    frame = run_recipe(
        _recipe(), methods, subject=subject, seeds=[0], scope=scope, out=tmp_path, progress=False
    ).to_frame()
    assert {*methods} <= set(frame["method"])


def test_halves_of_the_validation_rows_are_the_same_for_all_and_apart(folder):
    from reftlens.experiments import Scope

    first, second = (
        _recipe().trial("qnli", m, s, _subject(), Scope(data=folder)) for m, s in (("lora", 0), ("red", 4))
    )
    assert [r.index for r in first.test] == [r.index for r in second.test]
    assert not {r.index for r in first.test} & {r.index for r in first.dev}
    assert len(first.test) + len(first.dev) == 10


def test_settings_are_searched_on_the_dev_half_with_one_budget_and_used_for_every_seed(folder, tmp_path, monkeypatch):
    from reftlens.experiments import Scope, run_recipe
    from reftlens.experiments.runs import tuning

    monkeypatch.setattr(tuning, "STEPS", 2)
    arguments = {
        "subject": _subject(),
        "scope": Scope(data=folder, tasks=("sst2",)),
        "out": tmp_path,
        "progress": False,
    }
    run_recipe(_recipe(), ["lora", "loreft"], seeds=[0, 1], search=["lora", "loreft"], **arguments)
    budgets = set()
    for name in ("lora", "loreft"):
        told = json.loads((tmp_path / f"glue/sst2/{name}/search.json").read_text())
        assert len(told["tried"]) == 9 and told["steps"] == 2 and told["rows"] == 5
        assert len({json.dumps(each["setting"]) for each in told["tried"]}) == 9
        budgets.add(told["row_updates"])
        best = max(told["tried"], key=lambda each: each["score"])["setting"]
        for seed in (0, 1):
            config = json.loads((tmp_path / f"glue/sst2/{name}/seed-{seed}/config.json").read_text())
            assert config["fit"]["lr"] == best["lr"] and config["fit"]["steps"] == 3
            assert all(config["settings"][k] == v for k, v in best.items() if k != "lr")
    assert budgets == {9 * 2 * 4}
    tried = json.loads((tmp_path / "glue/sst2/loreft/search.json").read_text())["tried"]
    assert {each["setting"]["dropout"] for each in tried} == {0.0, 0.05, 0.2}  # rank and places stay
    assert "sst2/lora: 9 settings of 2 steps, 72 row-updates" in (tmp_path / "glue/report.md").read_text()
    with pytest.raises(ValueError, match="head is no method with settings to search"):
        run_recipe(_recipe(), ["head"], seeds=[0], search=["head"], **arguments)


def test_a_search_that_was_killed_goes_on(folder, tmp_path, monkeypatch):
    from reftlens.experiments import Scope
    from reftlens.experiments.recipes.heads import HeadTrial
    from reftlens.experiments.runs import tuning

    monkeypatch.setattr(tuning, "STEPS", 1)
    done, score = [], HeadTrial.dev_score

    def counted(self):
        if len(done) == 4:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(self.fit_config.lr)
        return score(self)

    monkeypatch.setattr(HeadTrial, "dev_score", counted)
    arguments = (_recipe(), "sst2", "bitfit", _subject(), Scope(data=folder), tmp_path / "search")
    with pytest.raises(KeyboardInterrupt):
        tuning.tuned(*arguments, progress=False)
    found = tuning.tuned(*arguments, progress=False)
    assert len(done) == 10 and len(set(done)) == 10, "no setting twice"
    assert len(done) == 10 and tuning.tuned(*arguments, progress=False) == found


def test_files_of_another_family_and_labels_outside_the_set_are_refused(folder, tmp_path):
    bad = folder / "glue/sst2/train.jsonl"
    bad.write_text(json.dumps({"sentence": "fine", "label": 2}) + "\n")
    with pytest.raises(ValueError, match=r"train.jsonl.*label.*2"):
        _run(folder, tmp_path / "a", ["head"], ("sst2",))
    bad.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    with pytest.raises(ValueError, match=r"train.jsonl.*no field 'sentence'"):
        _run(folder, tmp_path / "b", ["head"], ("sst2",))
    bad.write_text(json.dumps({"sentence": " ", "label": 1}) + "\n")
    with pytest.raises(ValueError, match=r"train.jsonl.*sentence is ' '"):
        _run(folder, tmp_path / "c", ["head"], ("sst2",))
    with pytest.raises(ValueError, match="sst-2"):
        _run(folder, tmp_path / "d", ["head"], ("sst-2",))


def test_a_method_that_no_head_can_stand_beside_is_refused():
    from reftlens.experiments.methods import Unedited
    from reftlens.experiments.methods.classifiers import HeadSpec, classifier

    with pytest.raises(TypeError, match=r"Unedited.*cannot be trained beside a head"):
        classifier(Unedited(), HeadSpec(2), _subject(), 0)


def _search(folder, out, name="bitfit", subject=None, **scope):
    from reftlens.experiments import Scope
    from reftlens.experiments.runs import tuning

    settings = (_recipe(), "sst2", name, subject or _subject(), Scope(data=folder, **scope), out)
    return tuning.tuned(*settings, progress=False)


def test_a_search_of_other_rows_or_another_model_is_not_taken_for_this_one(folder, tmp_path, monkeypatch):
    from reftlens.errors import StoreMismatch
    from reftlens.experiments.methods.subjects import Subject
    from reftlens.experiments.runs import tuning

    monkeypatch.setattr(tuning, "STEPS", 1)
    setting = _search(folder, tmp_path / "search")
    assert _search(folder, tmp_path / "search", limit=3) == setting  # test rows have no part in it
    with pytest.raises(StoreMismatch, match=r"search.json is of another search .train: .* there"):
        _search(folder, tmp_path / "search", train_limit=4)
    other = zoo.plain("BertForMaskedLM")
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(StoreMismatch, match="model: "):
        _search(folder, tmp_path / "search", subject=Subject(other, tokenizer=zoo.tokenizer()))


def test_a_setting_that_diverges_or_has_no_score_is_the_worst_of_a_search(folder, tmp_path, monkeypatch):
    from reftlens.errors import NotFinite, TrainingDiverged
    from reftlens.experiments.recipes.heads import HeadTrial
    from reftlens.experiments.runs import tuning
    from reftlens.experiments.runs.searching import searches_in

    monkeypatch.setattr(tuning, "STEPS", 1)
    good, fit = {1e-3}, HeadTrial.fit

    def diverging(self, checkpoint, *, progress):
        if self.fit_config.lr > 1e-2:
            raise TrainingDiverged("step 1: the loss is nan")
        return fit(self, checkpoint, progress=progress)

    monkeypatch.setattr(HeadTrial, "fit", diverging)
    monkeypatch.setattr(HeadTrial, "dev_score", lambda self: 0.1 if self.fit_config.lr in good else float("nan"))
    found = _search(folder, tmp_path / "search")
    assert found.best.setting == {"lr": 1e-3}
    told = json.loads((tmp_path / "search/search.json").read_text())
    assert len(told["tried"]) == 9 and [each["score"] for each in told["tried"]].count(None) == 8
    ((_, read),) = searches_in(tmp_path)
    assert read == found and "9 settings of 1 steps, 36 row-updates" in read.summary
    assert read.summary.endswith("lr 0.001; 8 without a finite score")
    good.clear()
    with pytest.raises(NotFinite, match="sst2/bitfit: none of 9 settings has a finite score"):
        _search(folder, tmp_path / "other")


def test_a_search_that_is_not_finished_tells_the_row_updates_of_what_it_tried(folder, tmp_path, monkeypatch):
    from reftlens.experiments.recipes.heads import HeadTrial
    from reftlens.experiments.runs import tuning
    from reftlens.experiments.runs.searching import searches_in

    monkeypatch.setattr(tuning, "STEPS", 1)
    scores = iter([0.1, 0.2])
    monkeypatch.setattr(HeadTrial, "dev_score", lambda self: next(scores))
    with pytest.raises(StopIteration):
        _search(folder, tmp_path / "search")
    assert "2 settings of 1 steps, 8 row-updates" in searches_in(tmp_path)[0][1].summary
