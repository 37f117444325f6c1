"""Scores among a few answers: the full softmax restricted to them, however it is computed."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from architectures import bridge, fresh_bridge

LABELS = [" cat", " dog", " moon"]
TEXTS = [("the dog ran by the green", " cat"), ("a", " moon"), ("the cat sat on the mat and looked at the", " dog")]


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def data_on(rl, model, labels=LABELS, texts=TEXTS):
    return rl.encode(model, [rl.Example(*row) for row in texts], end=False, among_answers=labels)


def reft_for(rl, where=None):
    return rl.ReFT({where or rl.resid_post(1, "f1+l1"): rl.LoReFT(32, 2)})


def losses_and_gradients(model, data, reft, reuse):
    """Losses, hits and gradients as the scorer gives them."""
    from reftlens.cone.plans import Job, Plan
    from reftlens.cone.scorer import Scorer

    scorer = Scorer(model, data, [Plan(reft)], reuse)
    ((one,),) = list(scorer.score([Job(0, tuple(range(len(data))))]))
    losses = F.cross_entropy(one.logits, one.batch.target_ids, reduction="none")
    hits = one.logits.argmax(dim=1) == one.batch.target_ids
    return [losses.detach(), hits, *torch.autograd.grad(losses.sum(), list(reft.parameters()))], one, scorer.computation


def restricted(model, data, reft):
    """The same from all logits of a plain pass, of which only the labels' columns are taken."""
    reft.zero_grad()
    with reft.on(model, data):
        logits = model(data.tokens, attention_mask=data.attention_mask.long(), use_cache=False)[data.predicting]
    logits, targets = logits[:, list(data.answers)], data.tokens[data.target_mask]
    losses = torch.stack([-x.log_softmax(0)[data.answers.index(int(t))] for x, t in zip(logits, targets, strict=True)])
    hits = torch.tensor([data.answers[int(x.argmax())] == int(t) for x, t in zip(logits, targets, strict=True)])
    return [losses.detach(), hits, *torch.autograd.grad(losses.sum(), list(reft.parameters()))]


def processed():
    model = fresh_bridge("gpt2", dtype=torch.float64)
    model.enable_compatibility_mode()
    return model


class Packed(torch.nn.Linear):
    """Stands for a matrix that is no plain one, as of quantised weights: nothing is known of its rows."""


def packed():
    model = fresh_bridge("llama", dtype=torch.float64)
    model.original_model.lm_head._original_component.__class__ = Packed
    return model


CASES = {a: (lambda a=a: bridge(a, torch.float64), {}) for a in ("gpt2", "neox", "gemma2", "llama")} | {
    "processed weights": (processed, {}),
    "no plain matrix": (packed, {}),
    "all unembedded": (lambda: bridge("llama", torch.float64), {"scored_only": False}),
    "nothing reused": (lambda: bridge("gemma2", torch.float64), None),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_hits_and_gradients_are_those_of_the_full_softmax_restricted(rl, case, doubles):
    make, settings = CASES[case]
    model = make()
    data, reft = data_on(rl, model), reft_for(rl).to(torch.float64)
    reuse = None if settings is None else rl.training.Reuse(**settings)
    results, one, computation = losses_and_gradients(model, data, reft, reuse)
    assert one.logits.shape == (len(TEXTS), len(LABELS)) and computation.endswith("; scored among 3 answers")
    assert computation.startswith("light cone" if settings is not None else "full")
    for mine, theirs in zip(results, restricted(model, data, reft), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=0, atol=1e-9)


def test_only_the_rows_of_the_labels_are_read(rl):
    model = fresh_bridge("llama")
    data, reft = data_on(rl, model), reft_for(rl)
    before = rl.evaluate(reft, model, data, progress=False)
    other = torch.ones(model.cfg.d_vocab, dtype=torch.bool)
    other[list(data.answers)] = False
    with torch.no_grad():
        model.original_model.lm_head._original_component.weight[other] = torch.inf
    after = rl.evaluate(reft, model, data, progress=False, reuse=rl.training.Reuse(verify=False))
    assert torch.equal(before.loss, after.loss) and torch.equal(before.accuracy, after.accuracy)


def test_what_is_remembered_knows_its_answers(rl, llama):
    data, reft = data_on(rl, llama), reft_for(rl)
    every = data.among_answers(None)
    first = [rl.evaluate(reft, llama, d, progress=False) for d in (every, data, data.among_answers(LABELS[::-1]))]
    again = [rl.evaluate(reft, llama, d, progress=False) for d in (data, every)]
    assert all(e.computation.startswith("6 of 6 scores") for e in again)
    assert torch.equal(again[0].loss, first[1].loss) and torch.equal(again[1].loss, first[0].loss)
    assert torch.allclose(first[1].loss, first[2].loss, atol=1e-6) and (first[0].loss - first[1].loss).min() > 0.5
    assert "among 3 answers" in str(first[1]) and "among" not in str(first[0]) + repr(every)
    assert "3 targets among 3 answers" in repr(data)
    assert len({every.fingerprint, data.fingerprint, data.among_answers(LABELS[::-1]).fingerprint}) == 3


def test_training_is_among_the_answers_and_its_record_says_so(rl, llama, tmp_path):
    data, path = data_on(rl, llama), tmp_path / "run.pt"
    run = rl.fit(reft := reft_for(rl), llama, data, steps=3, validation=data, checkpoint=path, progress=False)
    assert run.losses[0] == pytest.approx(rl.evaluate(reft_for(rl), llama, data, [0]).loss.mean().item(), abs=1.0)
    assert run.computation.endswith("scored among 3 answers") and run.encoding["answers"] == LABELS
    assert run.validation[-1][1] == pytest.approx(rl.evaluate(reft, llama, data, [1]).loss.mean().item(), abs=1e-5)
    with pytest.raises(rl.errors.CheckpointMismatch, match="data differ"):
        rl.fit(reft, llama, data.among_answers(None), steps=3, validation=data, checkpoint=path, progress=False)
    plans = [rl.training.plan(reft, llama, d, steps=3) for d in (data, data.among_answers(None))]
    saved = 2 * 2 * 32 * 8 * 3 * (llama.cfg.d_vocab - 3)  # forward and back, of 8 rows in each of 3 steps
    counted = [sum(step.operations for step in plan.steps) for plan in plans]
    assert counted[1] - counted[0] == saved and "among 3 answers" in plans[0].computation


def test_exchanges_are_scored_among_the_answers(rl, llama):
    data = data_on(rl, llama).resampled()
    own = replace(data, sources={})
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(32, 2)})
    scores = rl.causal.interchange_scores(das, llama, data, base=own, progress=False)
    hits = restricted(llama, data, das)[1]
    assert torch.equal(scores.hits, hits) and torch.equal(scores.base_hits, scores.unedited_hits)
    with pytest.raises(ValueError, match="base is scored among all tokens, and the data among 3 answers"):
        rl.causal.interchange_scores(das, llama, data, base=own.among_answers(None))


def test_labels_that_cannot_be_told_apart_by_one_token_are_refused(rl, llama):
    data = data_on(rl, llama, labels=None)
    for labels, words in {
        " cat dog": "expected a list of answers",
        (" cat",): "two or more",
        (" cat", " dog", " cat"): "one and the same token",
        (" cat", " looked at the"): "is 3 tokens",
        (" cat", " dog"): r"\(' moon'\) is to be scored among the answers .*, and is none of them",
    }.items():
        with pytest.raises((ValueError, TypeError), match=words):
            data.among_answers(labels)
    with pytest.raises(ValueError, match="end=False"):
        rl.encode(llama, [rl.Example(*row) for row in TEXTS], among_answers=LABELS)
    among = data.among_answers(LABELS)
    assert among.among_answers([llama.tokenizer(x).input_ids[-1] for x in LABELS]).answers == among.answers
    with pytest.raises(ValueError, match="different answers"):
        rl.Batch.join([among, data])
    with pytest.raises(ValueError, match="token ids"):
        replace(data, tokenizer=None, template=None).among_answers(LABELS)
    assert among[[1, 0]].answers == among.answers == rl.Batch.join([among, among]).answers


def test_every_result_says_so_and_no_other_does(rl, llama):
    data, reft = data_on(rl, llama), reft_for(rl)
    exchanged, das = data.resampled(), rl.ReFT({rl.resid_post(1, "last"): rl.DAS(32, 2)})
    quiet = {"progress": False}
    results = {
        "doses": lambda d, _: rl.dose_response(reft, llama, d, [0.5, 1], **quiet),
        "together": lambda d, _: rl.places.composition({"a": reft, "b": reft_for(rl)}, llama, {"it": d}, **quiet),
        "scores": lambda _, pairs: rl.causal.interchange_scores(das, llama, pairs, **quiet),
    }
    for name, result in results.items():
        among, over_all = result(data, exchanged), result(data.among_answers(None), exchanged.among_answers(None))
        assert "among 3 answers" in str(among) and "answers" not in str(over_all).replace("right answers", ""), name
        text = [
            [*axes.get_figure().findobj(match=lambda a: hasattr(a, "get_text"))]
            for axes in (among.plot(), over_all.plot())
        ]
        words = ["\n".join(t.get_text() for t in texts) for texts in text]
        assert "among 3 answers" in words[0] and "among 3 answers" not in words[1], name


def test_a_budget_of_kl_is_that_of_all_tokens(rl, llama):
    data, plans = data_on(rl, llama), {"reft": reft_for(rl)}
    settings = {"high": 30.0, "progress": False}
    among, over_all = (
        rl.strength.at_kl(0.05, plans, llama, d, **settings)["reft"] for d in (data, data.among_answers(None))
    )
    assert among.strength == over_all.strength and torch.equal(among.kl, over_all.kl)
    expected = rl.dose_response(plans["reft"], llama, data, [among.strength], progress=False).on_data.effect[0]
    assert torch.allclose(among.effect, expected) and not torch.allclose(over_all.effect, expected)


def test_an_answer_that_is_no_token_of_the_model_is_refused(rl):
    model = bridge("llama")
    data = data_on(rl, model)
    with pytest.raises(ValueError, match="a token is 0 or more"):
        data.among_answers([*data.answers, -1])
    with pytest.raises(ValueError, match="answer 1000000 of data is no token of the model"):
        rl.evaluate(reft_for(rl), model, data.among_answers([*data.answers, 1_000_000]), progress=False)
