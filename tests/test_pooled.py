"""ReFT-r1: what it computes, that padding, batches and reuse do not matter, and that it finds a planted concept."""

from dataclasses import replace

import pytest
import torch
from planted import ANSWERS, CORNERS, VALUES, D, planted

import reftlens as rl

CONCEPT = 2


def _module(k=2, **kwargs):
    module = rl.interventions.ReFTr1(D, k=k, generator=torch.Generator().manual_seed(0), **kwargs)
    with torch.no_grad():
        module.b.fill_(0.1)
    return module


def test_formula_written_out():
    module, h = _module(), torch.randn(7, D)
    rows = torch.tensor([3, 0, 3, 0, 3, 5, 3])
    w = module.basis()[:, 0].detach()
    assert w.norm() == pytest.approx(1.0)
    for i in range(7):
        mine = torch.relu(h[rows == rows[i]] @ w + 0.1).sort(descending=True).values[:2]
        torch.testing.assert_close(
            module(h, 0.5, origin=rl.interventions.Origin(rows))[i], h[i] + 0.5 * mine.mean() * w
        )
    module.zero_grad()
    module(h, origin=rl.interventions.Origin(rows))
    rest = [torch.relu(h[rows == r] @ w + 0.1).sort(descending=True).values[2:] for r in (0, 3, 5)]
    torch.testing.assert_close(module.penalty(), 5e-3 * torch.cat(rest).sum() / 7)
    module.anneal(0.5)
    assert module.penalty() is None, "nothing was seen in this step yet"
    module.eval()(h, origin=rl.interventions.Origin(rows))
    assert module.penalty() is None, "nothing is kept outside of training"


def test_padding_batches_reuse_and_generation_do_not_matter(gpt2):
    texts = ["one", "a longer prompt of several tokens", "two or three"]
    data = rl.encode(gpt2, [rl.Example(t, " yes") for t in texts])
    reft = rl.ReFT({rl.resid_post(1, "prompt"): _module()})
    together = rl.evaluate(reft, gpt2, data, progress=False)
    assert (together.loss[1] - together.loss[0]).abs().max() > 1e-4
    full = rl.evaluate(reft, gpt2, data, reuse=False, progress=False)
    alone = [rl.evaluate(reft, gpt2, data[[i]], progress=False).loss[1].item() for i in range(3)]
    torch.testing.assert_close(together.loss, full.loss, atol=1e-5, rtol=0)
    assert together.loss[1].tolist() == pytest.approx(alone, abs=1e-5)
    generation = rl.generate(reft, gpt2, texts, rl.Decoding(max_new_tokens=4), progress=False)
    single = [rl.generate(reft, gpt2, [t], rl.Decoding(max_new_tokens=4), progress=False).texts[0] for t in texts]
    assert list(generation.texts) == single


@pytest.mark.parametrize("lower", [False, True])
def test_targets_before_the_last_pooled_token_are_scored_as_without_reuse(gpt2, lower):
    """Of the last block, too, which a lower edit makes part of the cone."""
    data = rl.encode_prompts(gpt2, ["a prompt of several tokens", "one of four"])
    data = replace(data, target_mask=torch.zeros_like(data.target_mask).index_fill(1, torch.tensor(2), True))
    sites = {rl.resid_post(0, "first"): rl.SteeringVector(D, torch.linspace(-1, 1, D))} if lower else {}
    reft = rl.ReFT(sites | {rl.resid_post(2 if lower else 1, "prompt"): _module(k=8)})
    found, full = (rl.evaluate(reft, gpt2, data, reuse=reuse, progress=False) for reuse in (True, False))
    assert found.computation.startswith("light cone")
    assert (full.loss[1] - full.loss[0]).abs().max() > 1e-4
    torch.testing.assert_close(found.loss, full.loss, atol=1e-5, rtol=0)


def test_it_trains_as_without_reuse_and_is_stored(gpt2, tmp_path):
    data = rl.encode(gpt2, [rl.Example(t, " yes") for t in ("one", "two or three", "four")])
    trained = []
    for reuse in (True, False):
        reft = rl.ReFT({rl.resid_post(1, "prompt"): _module(sparsity=0.5)})
        rl.fit(reft, gpt2, data, steps=3, lr=1e-2, reuse=reuse, progress=False)
        trained.append(reft)
    torch.testing.assert_close(trained[0][0].basis(), trained[1][0].basis(), atol=1e-5, rtol=0)
    assert not torch.allclose(trained[0][0].basis(), _module().basis(), atol=1e-3)
    rl.save(trained[0], tmp_path / "saved", gpt2)
    loaded = rl.load(tmp_path / "saved", gpt2)
    assert loaded[0].settings() == trained[0][0].settings()
    assert torch.equal(loaded[0].basis(), trained[0][0].basis()) and torch.equal(loaded[0].b, trained[0][0].b)


def _rows(count, seed, arbitrary=False):
    """`(positive, negative)`: the answer is the concept's where one of four tokens carries it, else the last one's.

    Or any answer at all.
    """
    from reftlens.text.batch import batch_from_rows

    generator = torch.Generator().manual_seed(seed)
    value = planted().value
    other = [t for t in VALUES if value[t] != CONCEPT]
    rows = torch.tensor(other)[torch.randint(len(other), (2 * count, 5), generator=generator)]
    answers = torch.tensor(ANSWERS)[value[rows[:, -1]]]
    carriers = torch.tensor([t for t in VALUES if value[t] == CONCEPT])
    where = torch.randint(4, (count,), generator=generator)
    rows[torch.arange(count), where] = carriers[torch.randint(len(carriers), (count,), generator=generator)]
    answers[:count] = ANSWERS[CONCEPT]
    if arbitrary:
        answers = torch.tensor(ANSWERS)[torch.randint(4, (2 * count,), generator=generator)]
    lists = [[*row.tolist(), int(answer)] for row, answer in zip(rows, answers, strict=True)]
    data = batch_from_rows(lists, [[1] * 5 + [2]] * len(lists))
    return data[:count], data[count:]


@pytest.mark.parametrize("arbitrary", [False, True])
def test_a_planted_concept_is_found_and_arbitrary_answers_find_none(arbitrary):
    truth = planted()
    config = rl.FitConfig(steps=150, lr=5e-2, batch_size=64, seed=1)
    trained = rl.directions.reft_r1(
        truth.model, *_rows(256, 0, arbitrary), rl.resid_post(1, "prompt"), k=1, config=config, progress=False
    )
    direction = torch.nn.functional.normalize(truth.subspace @ CORNERS[CONCEPT], dim=0).double()
    cosine = (trained.basis[:, 0] @ direction).item()
    positive, negative = _rows(100, 7)
    score = [
        (rl.activations(truth.model, d, rl.resid_post(1, "prompt"), progress=False).double() @ trained.basis[:, 0])
        .view(-1, 5)
        .amax(dim=1)
        for d in (positive, negative)
    ]
    auroc = (score[0][:, None] > score[1]).double().mean().item()
    if arbitrary:
        assert cosine < 0.6 and auroc < 0.8
    else:
        assert cosine > 0.9 and auroc > 0.99 and trained.scale[0] > 1
        steered = rl.ReFT({rl.resid_post(1, "last"): trained.as_steering()})
        data = replace(negative, tokens=negative.tokens.masked_fill(negative.target_mask, ANSWERS[CONCEPT]))
        told = rl.evaluate(steered, truth.model, data, progress=False)
        assert told.accuracy[1].sum() > 90 and told.accuracy[0].sum() < 10


def test_what_it_cannot_do_is_said(gpt2):
    with pytest.raises(ValueError, match="pools over a prompt"):
        rl.ReFT({rl.resid_post(1, "all"): _module()}).bind(gpt2)
    with pytest.raises(ValueError, match="which row each token"):
        _module()(torch.randn(3, D))
    with pytest.raises(ValueError, match="k=0"):
        rl.interventions.ReFTr1(D, k=0)
