"""Tasks of lm-evaluation-harness on an edited model: what it scores and writes is what reftlens does."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from attaching import D, edit, leave

import architectures

pytest.importorskip("lm_eval")
PAIRS = [
    ("the cat sat", " on the mat"),
    ("a dog ran by the moon", " over the green hill"),
    ("the cat", " sat"),
    ("the cat", " ran"),
    ("the moon ", "and the mat"),
    ("the", " cat sat"),  # the tokens of the third, and another context
    ("a dog", " looked at the moon over the green hill while"),
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*chose no token")
        yield
    leave()


def harnessed(reft, model, tokenizer=None, **settings):
    from reftlens.experiments.lm_harness import harness

    return harness(reft, model, tokenizer or architectures.tokenizer(), **settings)


def asked(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def encoded(tokenizer, context, continuation, bos=False):
    """Context and continuation as lm-eval reads them: white space that ends the context goes with what follows."""
    bare = context.rstrip()
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (bare, context + continuation)]
    start = [tokenizer.bos_token_id] if bos else []
    return start + ids[0], ids[1][len(ids[0]) :]


def log_likelihoods(reft, bridge, tokenizer, pairs, bos=False):
    """Of each continuation, and whether each of its tokens is the likeliest; by `evaluate` on the bridge."""
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    rows = [encoded(tokenizer, *pair, bos=bos) for pair in pairs]
    roles = [[int(TokenRole.PROMPT)] * len(a) + [int(TokenRole.RESPONSE)] * len(b) for a, b in rows]
    batch = batch_from_rows([a + b for a, b in rows], roles, tokenizer=tokenizer)
    any_reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(bridge.cfg.d_model, 1)}) if reft is None else reft
    variants = [rl.Variant(0.0 if reft is None else 1.0)]
    found = rl.evaluate(any_reft, bridge, batch, variants, progress=False)
    counts = torch.tensor([len(b) for _, b in rows])
    return list(zip((-found.loss[0] * counts).tolist(), (found.accuracy[0] == 1).tolist(), strict=True))


def assert_alike(answers, expected):
    for (score, greedy), (other, right) in zip(answers, expected, strict=True):
        assert abs(score - other) < 1e-4 and greedy == right


@pytest.mark.parametrize("kind", [None, "f2+l2", "mixed", "gate per prompt"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_log_likelihoods_are_those_of_the_edited_bridge(architecture, kind):
    reft = None if kind is None else edit(kind).float()
    model, tokenizer = architectures.hf_model(architecture), architectures.tokenizer()
    expected = log_likelihoods(reft, architectures.bridge(architecture), tokenizer, PAIRS)
    for size in (1, 3):
        assert_alike(harnessed(reft, model, batch_size=size).loglikelihood(asked("loglikelihood", PAIRS)), expected)
    with_bos = log_likelihoods(reft, architectures.bridge(architecture), tokenizer, PAIRS, bos=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(expected, with_bos, strict=True)) > 0.1
    plain = [score for score, _ in log_likelihoods(None, architectures.bridge(architecture), tokenizer, PAIRS)]
    assert kind is None or max(abs(a[0] - b) for a, b in zip(expected, plain, strict=True)) > 0.01


def test_a_batch_size_that_lm_eval_finds_out_by_itself_is_tried_without_the_edit():
    reft, model, tokenizer = edit("mixed").float(), architectures.hf_model("llama"), architectures.tokenizer()
    lm = harnessed(reft, model, batch_size="auto", max_length=24)
    lm.max_batch_size = 4
    expected = log_likelihoods(reft, architectures.bridge("llama"), tokenizer, PAIRS[:3])
    assert_alike(lm.loglikelihood(asked("loglikelihood", PAIRS[:3])), expected)


def test_rows_that_are_equal_with_another_context_are_scored_apart():
    reft, model, tokenizer = edit("last").float(), architectures.hf_model("llama"), architectures.tokenizer()
    split = tokenizer("the cat sat on the", add_special_tokens=False).input_ids
    lm = harnessed(reft, model)
    requests = [(("", ""), split[:2], split[2:]), (("", ""), split[:3], split[3:]), (("", ""), split[:4], split[4:])]
    apart = [lm._loglikelihood_tokens([r], disable_tqdm=True)[0] for r in requests]
    assert_alike(lm._loglikelihood_tokens(requests, disable_tqdm=True), apart)
    padded = [(("", ""), [9, 0], [7, 8]), (("", ""), [9], [0, 0]), (("", ""), [9], [5, 6, 7])]
    apart = [lm._loglikelihood_tokens([r], disable_tqdm=True)[0] for r in padded]
    assert_alike(lm._loglikelihood_tokens(padded, disable_tqdm=True), apart)


def test_texts_are_those_of_generate_and_the_model_is_as_it_was():
    import reftlens as rl

    reft, model, bridge = edit("mixed").float(), architectures.hf_model("llama"), architectures.bridge("llama")
    starts, before = ["<bos>the cat sat", "<bos>a dog", "<bos>the moon over the green hill"], sorted(model.__dict__)
    lm = harnessed(reft, model, batch_size=3)
    written = lm.generate_until(asked("generate_until", [(t, {"until": ["<eos>"], "max_gen_toks": 9}) for t in starts]))
    batch = rl.encode_prompts(bridge, [t.removeprefix("<bos>") for t in starts])
    ours = rl.generate(reft, bridge, batch, rl.Decoding(max_new_tokens=9))
    assert written == [architectures.tokenizer().decode(ids, skip_special_tokens=True) for ids in ours.ids]
    assert sorted(model.__dict__) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_continuation_that_is_empty_or_too_long_is_refused_by_name():
    model = architectures.hf_model("llama")
    with pytest.raises(ValueError, match="the continuation '' after 'the cat' has 0 tokens, expected 1 to max_length"):
        harnessed(None, model).loglikelihood(asked("loglikelihood", [*PAIRS, ("the cat", "")]))
    with pytest.raises(ValueError, match=r"' over the green hill' after .* has 4 tokens, expected 1 to max_length=3"):
        harnessed(edit("last").float(), model, max_length=3).loglikelihood(asked("loglikelihood", PAIRS[1:2]))


@pytest.mark.parametrize("own", [None, "last"])
def test_a_model_that_is_edited_already_is_refused(own):
    """Its edit would take the whole row for the prompt, and the record would say that there is none."""
    import reftlens as rl

    reft, model = own and edit(own).float(), architectures.hf_model("llama")
    lm = harnessed(reft, model)
    expected = lm.loglikelihood(asked("loglikelihood", PAIRS))
    with rl.attach(edit("f2+l2").float(), model, tokenizer=architectures.tokenizer()):
        model(torch.tensor([[5, 6]]))
        with pytest.raises(ValueError, match=r"edited by rl.attach.*call detach\(\), and give the ReFT to harness"):
            harnessed(reft, model)
        with pytest.raises(ValueError, match="the model is edited"):
            lm.loglikelihood(asked("loglikelihood", PAIRS))
        with pytest.raises(ValueError, match="the model is edited"):
            lm.generate_until(asked("generate_until", [("the cat", {"until": ["<eos>"], "max_gen_toks": 3})]))
    assert lm.loglikelihood(asked("loglikelihood", PAIRS)) == expected


def task(folder, rows, **settings):
    """A task of multiple choice over a local file."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "task": "local", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        **settings,
    }  # fmt: skip


def evaluated(lm, settings):
    """The results of one task, with its rows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        lm, tasks=[settings], log_samples=True, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )
    return found, found["samples"]["local"]


def assert_rows(samples, rows, reft, bridge, tokenizer, delimiter=" ", bos=False):
    """Every answer's log-likelihood, and which answer is taken, by its own and per byte."""
    pairs = [(row["question"], delimiter + choice) for row in rows for choice in row["choices"]]
    every = iter(log_likelihoods(reft, bridge, tokenizer, pairs, bos=bos))
    for sample, row in zip(samples, rows, strict=True):
        scores = [score for score, _ in (next(every) for _ in row["choices"])]
        for (found, _), score in zip(sample["filtered_resps"], scores, strict=True):
            assert abs(float(found) - score) < 1e-4
        norm = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        assert sample["acc"] == float(max(range(len(scores)), key=scores.__getitem__) == row["gold"])
        assert sample["acc_norm"] == float(max(range(len(norm)), key=norm.__getitem__) == row["gold"])


ROWS = [
    {"question": "the cat sat on the", "choices": ["mat", "green hill"], "gold": 0},
    {"question": "a dog ran by the", "choices": ["moon", "mat and the hill"], "gold": 1},
    {"question": "over the green hill the moon", "choices": ["looked", "ran", "sat on the cat"], "gold": 2},
]


@pytest.mark.parametrize("bos", [False, True])
def test_a_local_task_is_scored_row_by_row_as_here_and_the_record_says_how(tmp_path, bos):
    reft, bridge, tokenizer = edit("f2+l2").float(), architectures.bridge("gpt2"), architectures.tokenizer()
    reads = bridge.tokenizer if bos else tokenizer  # that of a bridge puts BOS in front
    lm = harnessed(reft, architectures.hf_model("gpt2"), reads, add_bos_token=bos)
    found, samples = evaluated(lm, task(tmp_path, ROWS))
    assert_rows(samples, ROWS, reft, bridge, tokenizer, bos=bos)
    record = found["config"]["reftlens"]
    assert record["add_bos_token"] == bos
    assert "white space that ends a context" in record["boundary"] and record["edited"] == [f"{reft.sites[0]}: LoReFT"]


def test_a_file_of_answers_is_of_one_edit(tmp_path):
    pytest.importorskip("sqlitedict")
    from lm_eval.api.model import CachingLM

    reft, model = edit("f2+l2").float(), architectures.hf_model("gpt2")
    file, pairs = str(tmp_path / "answers.db"), asked("loglikelihood", PAIRS[:4])
    expected = harnessed(reft, model).loglikelihood(pairs)
    assert CachingLM(harnessed(reft, model), file).loglikelihood(pairs) == expected
    calls, again = [], harnessed(reft, model)
    again._model_call = calls.append
    assert CachingLM(again, file).loglikelihood(pairs) == expected and not calls
    for other in (None, edit("last").float(), reft.clone()):
        if other is not None and other.sites == reft.sites:
            other.reset(5)
        with pytest.raises(ValueError, match="give each edit, and the model as it is, a file of its own"):
            CachingLM(harnessed(other, model), file)


def test_white_space_that_ends_a_context_is_scored_with_the_answer(tmp_path):
    rows = [{**row, "question": row["question"] + " "} for row in ROWS]
    reft, bridge, tokenizer = edit("last").float(), architectures.bridge("llama"), architectures.tokenizer()
    lm = harnessed(reft, architectures.hf_model("llama"))
    _, samples = evaluated(lm, task(tmp_path, rows, target_delimiter=""))
    assert_rows(samples, rows, reft, bridge, tokenizer, delimiter="")


def steered(model, tokenizer, path, key, vector, coefficient=1.0):
    """lm-eval's own."""
    from lm_eval.models.hf_steered import SteeredModel

    how = {"steering_vector": vector, "steering_coefficient": coefficient, "action": "add"}
    torch.save({key: how}, path)
    return SteeredModel(pretrained=model, tokenizer=tokenizer, steer_path=str(path))


def test_the_steered_model_of_lm_eval_is_a_steering_vector_at_all_tokens(tmp_path):
    import reftlens as rl

    model, ids, vector = architectures.hf_model("llama"), torch.randint(5, 300, (3, 9)), torch.randn(D)
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.SteeringVector(D, vector)}).eval()
    ours = harnessed(reft, model)._model_call(ids)
    tokenizer, path = architectures.tokenizer(), tmp_path / "steer.pt"
    theirs = [
        steered(model, tokenizer, path, key, vector, sign)._model_call(ids)
        for key, sign in (("layers.1", 1.0), ("layers.2", 1.0), ("layers.1", -1.0))
    ]
    assert (theirs[0] - ours).abs().max() < 5e-6 * ours.abs().max()
    assert all((other - ours).abs().max() > 1 for other in theirs[1:])


def test_a_bridge_and_a_model_in_train_mode_are_refused_by_name():
    model = architectures.hf_model("llama")
    with pytest.raises(TypeError, match=r"got a TransformerBridge, expected a plain .*from_pretrained"):
        harnessed(None, architectures.bridge("llama"))
    with pytest.raises(ValueError, match=r"call model\.eval"):
        harnessed(None, model.train())
    with pytest.raises(ValueError, match=r"add_bos_token=True, and the tokenizer does not put BOS"):
        harnessed(None, model.eval(), add_bos_token=True)


# -- the default model ---------------------------------------------------------------------------------------

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def plain_smol(smol):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(smol.original_model.config.name_or_path).eval()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize(
    ("name", "count", "end", "bos", "edited"),
    [
        ("boolq", 67, " ", False, False),
        ("piqa", 67, "", False, False),
        ("arc_easy", 66, "", True, False),
        ("piqa", 8, "", True, True),
    ],
)
def test_rows_of_commonsense_sets_are_scored_as_here(smol, plain_smol, tmp_path, name, count, end, bos, edited):
    import transformers

    import reftlens as rl
    from reftlens.experiments.rows.loading import load_rows

    found = load_rows(name, "test", data=DATA, limit=count)
    rows = [
        {"question": f"{r.prompt}the correct answer is{end}", "choices": r.choices, "gold": r.choices.index(r.answer)}
        for r in found
    ]
    assert len(rows) == count
    folder = smol.original_model.config.name_or_path
    tokenizer = smol.tokenizer if bos else transformers.AutoTokenizer.from_pretrained(folder)
    reft = None
    if edited:
        reft = rl.ReFT(
            {rl.resid_post(8, "f2+l2"): rl.LoReFT(576, 4), rl.resid_post(16, "all"): rl.LoReFT(576, 4)}
        ).eval()
    lm = harnessed(reft, plain_smol, tokenizer, add_bos_token=bos)
    delimiter = "" if end else " "
    _, samples = evaluated(lm, task(tmp_path, rows, target_delimiter=delimiter))
    assert_rows(samples, rows, reft, smol, tokenizer, delimiter=delimiter, bos=bos)


@pytest.mark.slow
def test_the_default_model_steered_by_lm_eval_is_a_steering_vector(smol, plain_smol, tmp_path):
    import reftlens as rl

    ids, vector = torch.randint(5, 40_000, (4, 24)), 2 * torch.randn(576)
    reft = rl.ReFT({rl.resid_post(10, "all"): rl.SteeringVector(576, vector)}).eval()
    ours = harnessed(reft, plain_smol, smol.tokenizer)._model_call(ids)
    theirs = [
        steered(plain_smol, smol.tokenizer, tmp_path / "steer.pt", key, vector, sign)._model_call(ids)
        for key, sign in (("layers.10", 1.0), ("layers.11", 1.0), ("layers.10", -1.0))
    ]
    assert (theirs[0] - ours).abs().max() < 5e-6 * ours.abs().max()
    assert all((other - ours).abs().max() > 1 for other in theirs[1:])
