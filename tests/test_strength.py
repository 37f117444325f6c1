"""Doses: what an edit does at every strength, against computations by hand and truths that were planted."""

import math
import re
from dataclasses import replace
from functools import cache

import numpy
import pytest
import torch

from architectures import ARCHITECTURES, D, bridge, fresh_bridge

SLOW = pytest.mark.slow
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, -1.0)
TEXTS = [
    ("the cat sat on", " the mat and"),
    ("a dog", " ran by the"),
    ("looked at the moon", " over"),
    ("the green hill while", " a dog ran"),
    ("the moon over the", " mat"),
    ("and looked", " at the green hill"),
]


def _module(kind, scale=1.0, seed=1):
    import reftlens as rl

    g = torch.Generator().manual_seed(seed)
    if kind == "vector":
        return rl.SteeringVector(D, scale * torch.randn(D, generator=g))
    if kind == "DAS":
        return rl.DAS(D, rank=4, generator=g)
    module = rl.LoReFT(D, rank=3, generator=g)
    with torch.no_grad():
        module.b.add_(scale * torch.randn(3, generator=g))
    return module


def _reft(kind, layer=1, where="last", **kwargs):
    import reftlens as rl

    return rl.ReFT({rl.resid_post(layer, where): _module(kind, **kwargs)})


def _data(model, texts=TEXTS, sources=False):
    import reftlens as rl

    data = rl.encode(model, [rl.Example(*text) for text in texts])
    return data.with_sources(data[[*range(1, len(data)), 0]]) if sources else data


@cache
def _response(kind="LoReFT"):
    """Everything at once, on the tiny GPT-2."""
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    model, prompts = bridge("gpt2"), ["the cat sat", "a dog ran by"]
    texts = {} if kind == "DAS" else dict(prompts=prompts, decoding=rl.Decoding(max_new_tokens=8), score=len)
    return dose_response(
        _reft(kind),
        model,
        _data(model, sources=kind == "DAS"),
        STRENGTHS,
        progress=False,
        unrelated=_data(model, TEXTS[3:], sources=kind == "DAS"),
        **texts,
    )


def _logits(model, reft, data, strength):
    """Two full forward passes, by hand: edited and unedited logits at the targets."""
    import reftlens as rl

    def run():
        return model(data.tokens, attention_mask=data.attention_mask.long())[data.predicting]

    with torch.no_grad():
        plain = run()
        with reft.on(model, data, rl.Variant(strength)):
            return run(), plain


def _kl(edited, plain):
    p, q = (x.double().log_softmax(dim=-1) for x in (edited, plain))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)


def _means(values, data):
    return torch.stack([values[data.target_rows == row].mean() for row in range(len(data))])


def _dose(budget, reft, model, data, **settings):
    import reftlens as rl

    return rl.strength.at_kl(budget, {"reft": reft}, model, data, progress=False, **settings)["reft"]


# -- effect and KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LoReFT", "vector", "DAS"])
@pytest.mark.parametrize("architecture", [pytest.param(a, marks=() if a == "gpt2" else SLOW) for a in ARCHITECTURES])
def test_effect_accuracy_and_kl_are_those_of_two_full_forward_passes(architecture, kind):
    from reftlens.analysis.strength import dose_response

    model = bridge(architecture)
    reft, data = _reft(kind), _data(model, sources=kind == "DAS")
    found = dose_response(reft, model, data, STRENGTHS, progress=False)
    for v, strength in enumerate(STRENGTHS):
        edited, plain = (x.double().log_softmax(dim=-1) for x in _logits(model, reft, data, strength))
        ids = data.target_ids[:, None]
        kl = _kl(*_logits(model, reft, data, strength))
        # float32 logits of batches of other shapes
        close = dict(atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.on_data.kl[v], _means(kl, data), **close)
        torch.testing.assert_close(found.on_data.log_prob[v], _means(edited.gather(1, ids)[:, 0], data), **close)
        gained = _means((edited - plain).gather(1, ids)[:, 0], data)
        torch.testing.assert_close(found.on_data.effect[v], gained, **close)
        hits = (edited.argmax(dim=-1) == data.target_ids).double()
        assert torch.equal(found.on_data.accuracy[v], _means(hits, data))
    assert found.on_data.kl[STRENGTHS.index(2.0)].min() > 1e-3, "and it is not that nothing happens"


@pytest.mark.parametrize("kind", ["LoReFT", "vector", "DAS"])
def test_strength_zero_has_no_effect_and_no_kl_exactly(kind):
    found = _response(kind)
    zero = STRENGTHS.index(0.0)
    for table in (found.on_data.effect, found.on_data.kl, found.measure("edit_size"), found.measure("drift")):
        assert torch.equal(table[zero], torch.zeros_like(table[zero]))
        assert table[STRENGTHS.index(1.0)].abs().min() > 0


@pytest.mark.parametrize("sources", [False, True])
def test_an_edit_after_the_last_read_has_no_effect_and_no_kl(gpt2, sources):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    data = _data(gpt2)
    one = data[[0]].with_sources(data[[1]]) if sources else data[[0]]
    reft = rl.ReFT({rl.resid_post(1, "response"): _module("DAS" if sources else "vector", scale=9.0)})
    last = rl.positions.At(one.tokens.shape[1] - 1)
    found = dose_response(reft, gpt2, one, [1.0, 5.0], among=last, progress=False)
    assert found.measure("edit_size").min() > 0
    # the last token is a target, and nothing that is scored reads it
    assert found.on_data.kl.abs().max() < 1e-10 and found.on_data.effect.abs().max() < 1e-5


def test_a_vector_that_nothing_reads_has_no_effect_and_its_twin_has():
    """Planted: W_out reads one neuron direction and not another, and both hold the value."""
    from planted import ANSWERS, VALUES, planted_neurons

    import reftlens as rl
    from reftlens.analysis.strength import dose_response
    from reftlens.text.batch import batch_from_rows

    truth = planted_neurons()
    rows = [[200 + i, 250 + i, VALUES[i], ANSWERS[int(truth.value[VALUES[i]])]] for i in range(8)]
    data = batch_from_rows(rows, [[1, 1, 1, 2]] * 8)
    site = rl.mlp_post(1, "last")

    def response(direction):
        vector = rl.SteeringVector(len(direction), direction[:, 0])
        return dose_response(rl.ReFT({site: vector}), truth.model, data, [-1.0, 1.0, 4.0], progress=False)

    nothing, something = response(truth.disconnected), response(truth.real)
    assert nothing.measure("edit_size")[1].min() > 1e-3
    assert nothing.on_data.kl.abs().max() < 1e-9 and nothing.on_data.effect.abs().max() < 1e-4  # float32
    assert something.on_data.kl.min() > 1e-6 and something.on_data.effect.abs().min() > 1e-3
    # moved towards one value: half of the rows have it, and the other half is moved the wrong way
    assert something.slopes.wrong.value == 0.5 and something.slopes.wrong.high < 0.9


def test_the_edit_is_as_large_as_by_hand(gpt2):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    data = _data(gpt2)
    h = rl.activations(gpt2, data, rl.resid_post(1, "l2"), progress=False).view(len(data), 2, D)
    for kind in ("LoReFT", "vector"):
        reft = _reft(kind, where="l2")
        found = dose_response(reft, gpt2, data, [0.5, -2.0], progress=False, batch_size=4)
        with torch.no_grad():
            by_hand = ((reft[0](h) - h).norm(dim=-1) / h.norm(dim=-1)).mean(dim=1).double()
        torch.testing.assert_close(found.unit_size, by_hand[None], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.measure("edit_size"), torch.stack([by_hand / 2, by_hand * 2]))
    exchange = rl.ReFT({rl.resid_post(1, "last"): rl.Interchange(D)})
    found = dose_response(exchange, gpt2, _data(gpt2, sources=True), [1.0], progress=False)
    last = h[:, 1]
    moved = (last[[*range(1, len(data)), 0]] - last).norm(dim=-1) / last.norm(dim=-1)
    torch.testing.assert_close(found.unit_size[0], moved.double(), atol=1e-5, rtol=1e-5)


def test_only_the_light_cone_is_computed_and_never_a_full_pass_for_each_strength(gpt2, monkeypatch):
    from reftlens.analysis.strength import dose_response
    from reftlens.cone import full
    from reftlens.editing import engine, reading

    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return engine.forward(*args, **kwargs)

    for module in (full, reading):
        monkeypatch.setattr(module, "forward", counted)
    found = dose_response(_reft("LoReFT", 2), gpt2, _data(gpt2), [i / 20 for i in range(40)], progress=False)
    assert found.computation.startswith("light cone: ")
    assert len(calls) <= 6, "one pass for the size of the edit, and some that check the ways of computing"
    again = dose_response(_reft("LoReFT", 2), gpt2, _data(gpt2), [0.5], progress=False, reuse=False)
    assert again.computation.startswith("full computation")
    torch.testing.assert_close(found.on_data.kl[10], again.on_data.kl[0], atol=1e-5, rtol=1e-4)


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_perplexity_is_transformers_own_loss(architecture):
    from reftlens.analysis.strength.texts import perplexity

    model = bridge(architecture)
    data = _data(model)
    found = perplexity(model, data, batch_size=4)
    for row in range(len(data)):
        one = data[row]
        labels = torch.where(one.target_mask, one.tokens, -100)
        with torch.no_grad():
            loss = model.original_model(input_ids=one.tokens, labels=labels).loss
        assert found[row].item() == pytest.approx(loss.exp().item(), rel=1e-4)  # float32


def test_repetition_is_the_share_of_n_grams_seen_before():
    from reftlens.analysis.strength.texts import repetition

    assert repetition([1, 2, 3, 4, 5]) == 0.0 and repetition([]) == 0.0 and repetition([1, 1]) == 0.0
    assert repetition([7] * 12) == pytest.approx(0.9)
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(0.25)
    assert repetition([1, 2, 1, 2], n=1) == 0.5
    with pytest.raises(ValueError, match="n=0"):
        repetition([1], n=0)


def test_what_is_written_is_what_generate_writes(gpt2):
    import reftlens as rl
    from reftlens.analysis.strength.texts import repetition

    found = _response()
    for v, strength in enumerate(STRENGTHS):
        made = rl.generate(
            _reft("LoReFT"),
            gpt2,
            ["the cat sat", "a dog ran by"],
            rl.Decoding(max_new_tokens=8),
            variant=rl.Variant(strength),
        )
        assert found.text.texts[v] == made.texts
        assert found.measure("repetition")[v].tolist() == [repetition(ids) for ids in made.ids]
        assert found.measure("score")[v].tolist() == [len(text) for text in made.texts]
    assert len(set(found.text.texts)) > 1, "strength matters"
    assert found.measure("perplexity").min() >= 1
    assert "reused" in found.text.computation
    with pytest.raises(ValueError, match="generation has none"):
        from reftlens.analysis.strength import dose_response

        dose_response(_reft("DAS"), gpt2, _data(gpt2, sources=True), [1.0], prompts=["the cat"], progress=False)


def test_the_unedited_model_finds_its_own_greedy_text_most_fluent():
    found = _response()
    fluency = [one.value for one in found.estimate("perplexity")]
    assert min(fluency) == fluency[STRENGTHS.index(0.0)]


# -- every kind ----------------------------------------------------------------------------------------------


def test_there_is_a_response_to_doses_of_every_kind(gpt2):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    reference = torch.randn(D, generator=torch.Generator().manual_seed(2))
    red = rl.interventions.RED(D)
    red.bias.data.copy_(reference)  # it starts as the identity
    kinds = [
        rl.LoReFT(D, 2),
        rl.interventions.NoReFT(D, 2),
        rl.DiReFT(D, 2),
        rl.interventions.OrthoDiReFT(D, 2),
        rl.interventions.ConsReFT(D, 2),
        rl.interventions.LobiReFT(D, 2),
        red,
        rl.SteeringVector(D, reference),
        rl.Ablation(D),
        rl.Ablation(D, reference),
        rl.interventions.Noise(D, 0.5),
        rl.interventions.ReFTr1(D, k=2),
        rl.DAS(D, rank=2),
        rl.Interchange(D),
        rl.interventions.BoundlessDAS(D, rank=4),
        rl.interventions.MaskedDAS(D, rank=4),
        rl.interventions.SigmoidMask(D),
    ]
    for module in kinds:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        reft, data = rl.ReFT({rl.resid_post(1, "l2"): module}), _data(gpt2, sources=bool(module.variables))
        found = dose_response(reft, gpt2, data, [0.0, 0.5, 1.0], progress=False)
        assert found.computation.startswith("light cone"), module.kind
        assert torch.equal(found.on_data.kl[0], torch.zeros(len(data)).double()), module.kind
        assert found.on_data.kl[1:].mean(dim=1).min() > 1e-8 and found.unit_size.min() >= 0, module.kind
        by_hand = _means(_kl(*_logits(gpt2, reft, data, 0.5)), data)
        torch.testing.assert_close(found.on_data.kl[1], by_hand, atol=2e-5, rtol=1e-3)  # float32
        budget = 0.1 * found.on_data.kl[2].mean().item()
        dose = _dose(budget, reft, gpt2, data)
        assert dose.cost.value == pytest.approx(budget, rel=0.02) and len(dose.evaluations) <= 6, module.kind


def test_several_sites_act_together_and_their_sizes_are_each_their_own(gpt2):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    first, second = rl.resid_post(0, "last"), rl.mlp_out(2, "f1+l1")
    both = rl.ReFT({first: _module("LoReFT"), second: _module("vector", seed=2)})
    data = _data(gpt2)
    found = dose_response(both, gpt2, data, [1.0], progress=False)
    by_hand = _means(_kl(*_logits(gpt2, both, data, 1.0)), data)
    torch.testing.assert_close(found.on_data.kl[0], by_hand, atol=2e-5, rtol=1e-4)
    for n, site in enumerate((first, second)):
        alone = dose_response(rl.ReFT({site: both[site]}), gpt2, data, [1.0], progress=False)
        torch.testing.assert_close(found.unit_size[n], alone.unit_size[0])
        only = dose_response(both, gpt2, data, [1.0], sites=[n], progress=False)
        torch.testing.assert_close(only.on_data.kl, alone.on_data.kl, atol=1e-5, rtol=1e-4)
        assert torch.equal(only.unit_size, alone.unit_size)


# -- curves --------------------------------------------------------------------------------------------------


def test_slopes_are_those_of_polyfit():
    found = _response().slopes
    expected = numpy.polyfit(STRENGTHS, _response().on_data.effect.numpy(), 1)[0]
    torch.testing.assert_close(found.values, torch.tensor(expected))
    size = abs(expected).mean()
    assert found.wrong.value == pytest.approx((expected < -0.05 * size).mean())
    assert found.still.value == pytest.approx((abs(expected) <= 0.05 * size).mean())


def test_the_dose_of_half_the_effect_of_a_known_curve():
    from reftlens.analysis.strength.curves import half_effect

    strengths, top = [0.0, 0.5, 1.0, 2.0, 4.0], torch.tensor([1.0, 2.0, 3.0])
    hill = torch.tensor([s / (1 + s) for s in strengths]).double()[:, None] * top
    found = half_effect(strengths, hill, 1.0)
    exact = 0.5 * (0.25 / (1 / 3))  # half of 0.5, linear between 0 and 1/3 at 0.5
    assert found.strength.value == pytest.approx(exact)
    assert found.strength.low == pytest.approx(exact) == found.strength.high, "examples differ in size, not in shape"
    assert half_effect(strengths, -hill, 1.0).reason.startswith("the mean effect at strength 1")
    assert math.isnan(half_effect(strengths, -hill, 1.0).strength.value)
    line = torch.tensor(strengths).double()[:, None] * torch.ones(3)
    assert half_effect(strengths, line, 4.0).strength.value == pytest.approx(2.0)
    step = (torch.tensor(strengths) >= 1).double()[:, None] * torch.ones(3)
    assert half_effect(strengths, step, 4.0).strength.value == pytest.approx(0.75)
    falls = torch.tensor([0.0, 5.0, 1.0, 0.0, 2.0]).double()[:, None] * torch.ones(3)
    assert half_effect(strengths, falls, 4.0).strength.value == pytest.approx(0.1), "the first time it is reached"
    opposite = half_effect([-s for s in strengths], hill, -1.0).strength
    assert opposite.value == pytest.approx(-exact) and opposite.low <= opposite.value <= opposite.high


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.5], "1.50 [no interval; only 1 example]"),
        ([0.0] * 4, "0.00 [all alike; only 4 examples]"),
        ([0.0] * 40, "0.00 [all alike]"),
        ([0.0, 0.4], "0.20 [0.00, 0.40; only 2 examples]"),
        ([0.0, 1.0] * 20, "0.50 [0.35, 0.65]"),
    ],
)
def test_an_interval_of_few_or_of_like_examples_is_told_as_such(values, text):
    from reftlens.scoring.statistics import mean_of

    assert str(mean_of(torch.tensor(values))) == text


@pytest.mark.parametrize(("hits", "count"), [(0, 4), (4, 4), (3, 12), (0, 100)])
def test_a_share_has_the_exact_interval(hits, count):
    """Clopper-Pearson: at either end, the binomial tail is 2.5 %."""
    from reftlens.scoring.statistics import share_of

    found = share_of(torch.arange(count) < hits)

    def at_least(k, p):
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k, count + 1))

    assert at_least(hits, found.low) == pytest.approx(0.025, abs=1e-6) or (hits == 0 and found.low == 0)
    assert 1 - at_least(hits + 1, found.high) == pytest.approx(0.025, abs=1e-6) or (hits == count and found.high == 1)


def test_the_interval_of_the_half_dose_is_open_where_resamples_have_no_effect():
    from reftlens.analysis.strength.curves import half_effect

    effect = torch.tensor([[0.0] * 6, [3.0, -1, -1, 2, -1, -1], [6.0, -2, -2, 4, -2, -2]]).double()
    found = half_effect([0.0, 0.5, 1.0], effect, 1.0)
    assert found.strength.value == pytest.approx(0.5) and found.strength.high == math.inf


@SLOW
def test_intervals_hold_the_truth_as_often_as_they_say():
    """2,000 data sets of 60 examples (the simulation's own error is 0.5 %): 93 % to 97 % of 95 % intervals."""
    from reftlens.analysis.strength.curves import half_effect
    from reftlens.scoring.statistics import mean_of

    g = torch.Generator().manual_seed(0)
    strengths = [0.0, 0.25, 0.5, 1.0]
    inside = torch.zeros(2)
    for _ in range(2000):
        size = 1 + 0.8 * torch.randn(60, generator=g, dtype=torch.float64)
        shape = torch.tensor([0.0, 0.2, 0.6, 1.0]).double()[:, None]
        effect = size * shape + 0.4 * torch.randn(4, 60, generator=g, dtype=torch.float64) * (shape > 0)
        mean, half = mean_of(effect[3]), half_effect(strengths, effect, 1.0).strength
        truth = 0.25 + 0.25 * (0.5 - 0.2) / 0.4
        inside += torch.tensor([mean.low <= 1 <= mean.high, half.low <= truth <= half.high])
    assert (inside / 2000).min() > 0.93 and (inside / 2000).max() < 0.97, inside / 2000


def test_the_frontier_holds_no_dominated_point():
    from reftlens.analysis.strength.curves import not_dominated

    found = _response()
    rows, names = found.frontier(), ["effect", "kl", "perplexity"]
    every = found.by_strength()[names]

    def beats(a, b):
        better = [a.effect >= b.effect, a.kl <= b.kl, a.perplexity <= b.perplexity]
        return all(better) and (a.effect > b.effect or a.kl < b.kl or a.perplexity < b.perplexity)

    for strength, point in every.iterrows():
        beaten = any(beats(other, point) for _, other in every.iterrows())
        assert beaten != (strength in set(rows["strength"]))
    assert 0.0 in set(rows["strength"]), "nothing costs less than nothing"
    costs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert not_dominated(costs).tolist() == [True, True, False, True]


# -- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1e-4, 3e-3, 0.05])
@pytest.mark.parametrize("kind", ["LoReFT", "vector", "DAS"])
@pytest.mark.parametrize("architecture", [pytest.param(a, marks=() if a == "gpt2" else SLOW) for a in ARCHITECTURES])
def test_the_budget_is_met_in_six_evaluations(architecture, kind, budget):

    model = bridge(architecture)
    where = "last" if kind == "DAS" else "all"
    reft, data = _reft(kind, where=where, scale=2.0), _data(model, sources=kind == "DAS")
    dose = _dose(budget, reft, model, data)
    assert len(dose.evaluations) <= 6 and abs(dose.cost.value / budget - 1) <= 0.02
    kl = _means(_kl(*_logits(model, reft, data, dose.strength)), data)
    assert kl.mean().item() == pytest.approx(budget, rel=0.03)
    opposite = _dose(budget, reft, model, data, high=-10.0)
    assert opposite.strength < 0 and opposite.cost.value == pytest.approx(budget, rel=0.021)


CURVES = {
    "quadratic": lambda s: s**2,
    "saturates": lambda s: 3 * s**2 / (1 + s**2),
    "grows slower": lambda s: s**2 / (1 + s),
    "grows faster": lambda s: 0.01 * s**2 + s**4,
    "at once": lambda s: 3 * (1 - math.exp(-(s**2))),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_search_meets_budgets_over_four_decades_on_curves_of_any_scale(name):
    from reftlens.analysis.strength.dose_search import Search

    counts = []
    for scale in (0.1, 0.5, 1.0, 3.0):
        for budget in (1e-4, 1e-3, 1e-2, 0.1, 1.0):
            if CURVES[name](10.0 / scale) < 1.02 * budget:
                continue
            search = Search(budget, 10.0, 0.02)
            while (dose := search.next()) is not None:
                search.tell(dose, CURVES[name](dose / scale))
                assert 0 < dose <= 10.0 and len(search.measured) < 20
            assert search.met and not search.problem
            counts.append(len(search.measured))
    assert max(counts) <= 6


def test_a_way_of_computing_is_checked_once(monkeypatch):
    from reftlens.cone import probe

    model, checked = fresh_bridge("gpt2"), []
    honest = probe.Probe._on_short_rows
    monkeypatch.setattr(probe.Probe, "_on_short_rows", lambda *a: checked.append(a[1]) or honest(*a))
    dose = _dose(0.01, _reft("vector"), model, _data(model))
    assert len(dose.evaluations) > 1 and 1 <= len(checked) == len(set(checked))
    before = len(checked)
    _dose(0.01, _reft("vector"), model, _data(model))
    assert len(checked) == before, "what is known of the model as it is stays known"
    with torch.no_grad():
        next(model.original_model.parameters()).mul_(1.0)
    monkeypatch.setattr(probe.Probe, "_on_short_rows", lambda *a: checked.append(a[1]) or "it differs")
    with pytest.warns(UserWarning, match="it differs"):
        whole = _dose(0.01, _reft("vector"), model, _data(model))
    assert len(checked) == before + 1 and whole.strength == pytest.approx(dose.strength, rel=1e-3)


def test_a_budget_that_is_never_reached_is_an_error_that_says_how_far_it_went(gpt2):
    from reftlens.analysis.strength.dose_search import Search

    with pytest.raises(ValueError, match=r"only .* at strength 0.01: raise high"):
        _dose(5.0, _reft("vector"), gpt2, _data(gpt2), high=0.01)
    with pytest.raises(ValueError, match="allow more evaluations"):
        _dose(0.1, _reft("vector"), gpt2, _data(gpt2), evaluations=1)
    for budget, wrong in ((0.0, {}), (0.1, dict(high=0.0)), (0.1, dict(tolerance=0.0))):
        with pytest.raises(ValueError, match="expected a budget above 0"):
            _dose(budget, _reft("vector"), gpt2, _data(gpt2), **wrong)
    nothing = Search(1.0, 10.0, 0.02)
    while (dose := nothing.next()) is not None and len(nothing.measured) < 20:
        nothing.tell(dose, 0.0)
    assert "only 0 at strength 10" in nothing.problem and len(nothing.measured) <= 6, "an edit that does nothing"
    overflows = Search(1.0, 10.0, 0.02)
    while (dose := overflows.next()) is not None and len(overflows.measured) < 20:
        overflows.tell(dose, dose**2 / 4 if dose < 3 else math.nan)
    assert overflows.met, "what is no number counts as over the budget"


def test_methods_are_compared_at_equal_kl(gpt2):
    import reftlens as rl

    data = _data(gpt2, sources=True)
    methods = {kind: _reft(kind) for kind in ("LoReFT", "vector", "DAS")}
    methods["weak"] = _reft("vector", scale=1e-4)
    found = rl.strength.at_kl(0.05, methods, gpt2, data, progress=False)
    assert [bool(d.problem) for d in found.doses.values()] == [False, False, False, True]
    for n, name in enumerate(["LoReFT", "vector", "DAS"]):
        alone = _dose(0.05, methods[name], gpt2, data)
        assert found.doses[name].strength == pytest.approx(alone.strength, rel=1e-3)
        assert found.doses[name].cost.value == pytest.approx(0.05, rel=0.02)
        torch.testing.assert_close(found.effect[n], alone.effect, atol=1e-4, rtol=1e-3)
    frame = found.to_frame()
    assert frame.index[0] == found.best and frame.loc["weak", "problem"].startswith("the budget")
    others = [n for n in methods if n not in (found.best, "weak")]
    assert set(found.p()) == set(others)
    for name in others:
        difference = (found.effect[list(methods).index(name)] - found.effect[list(methods).index(found.best)]).mean()
        assert found.difference(name).value == pytest.approx(difference.item()) and found.difference(name).value <= 0
        assert 0 < found.p()[name] <= 1
    for name in [found.best, *others]:
        dosed = rl.evaluate(methods[name], gpt2, data, [found[name].strength], progress=False)
        assert (
            torch.equal(found[name].hits, dosed.accuracy[0]) and found[name].accuracy == dosed.estimate("accuracy")[0]
        )
        assert frame.loc[name, "accuracy_low"] <= frame.loc[name, "accuracy"] <= frame.loc[name, "accuracy_high"]
        assert f"accuracy {found[name].accuracy}" in " ".join(str(found).split())
    assert found["weak"].hits.isnan().all() and math.isnan(frame.loc["weak", "accuracy"])
    assert re.search("weak: .*the budget is", str(found)) and "the best" in str(found)
    assert "nats per target token" in found.plot().get_xlabel()
    with pytest.raises(ValueError, match="weak: the budget is"):
        rl.strength.at_kl(0.05, {"weak": methods["weak"]}, gpt2, data, progress=False)


def test_a_plan_says_at_which_tokens_and_sites_the_dose_acts(gpt2):
    """A plan's own strength is the unit of its dose, whether a number or one for each direction."""
    import reftlens as rl
    from reftlens.cone.plans import Plan

    data, reft = _data(gpt2), _reft("LoReFT", where="all")
    last = Plan(reft, rl.Variant(among="last"))
    plans = {"last": last, "twice": last._replace(variant=rl.Variant(2.0, among="last")), "everywhere": reft}
    plans["each"] = Plan(reft, rl.Variant([2.0, 2.0, 2.0], among="last"))
    found = rl.strength.at_kl(0.01, plans, gpt2, data, progress=False)
    assert found["twice"].strength == pytest.approx(found["last"].strength / 2, rel=1e-2)
    assert found["each"].strength == pytest.approx(found["last"].strength / 2, rel=1e-2)
    assert found["everywhere"].strength < 0.9 * found["last"].strength
    again = rl.ReFT({rl.resid_post(1, "l1"): reft[0]})
    kl = _means(_kl(*_logits(gpt2, again, data, found["last"].strength)), data)
    assert kl.mean().item() == pytest.approx(0.01, rel=0.03)
    with pytest.raises(ValueError, match="no intervention 'first', there are: 'last', 'twice', 'everywhere', 'each'"):
        found.difference("first")
    with pytest.raises(TypeError, match=r"expected \{name: reft\}, one or more"):
        rl.strength.at_kl(0.01, {}, gpt2, data, progress=False)


def test_equals_do_not_differ_and_a_real_difference_survives_the_correction(gpt2):
    from reftlens.analysis.strength.equal_kl import Dose, EqualKL

    g = torch.Generator().manual_seed(0)
    base = torch.randn(40, generator=g, dtype=torch.float64)
    noise = 0.1 * torch.randn(3, 40, generator=g, dtype=torch.float64)
    effects = dict(zip("abc", torch.stack([base, base, base - 0.2]) + noise, strict=True))
    found = EqualKL(
        {name: Dose(1.0, 0.1, base.abs(), effect, effect, ((1.0, 0.1),)) for name, effect in effects.items()}
    )
    assert found.p()["c"] < 0.01 and found.difference("c").high < 0
    assert found.p()[({"a", "b"} - {found.best}).pop()] > 0.05


def test_the_budget_can_be_spent_on_unrelated_prompts(gpt2):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    data, other = _data(gpt2, TEXTS[:3]), _data(gpt2, TEXTS[3:])
    found = rl.strength.at_kl(0.1, {"one": _reft("LoReFT")}, gpt2, data, spent_on=other, progress=False)
    strength = found.doses["one"].strength
    again = dose_response(_reft("LoReFT"), gpt2, data, [strength], unrelated=other, progress=False)
    assert again.estimate("drift")[0].value == pytest.approx(0.1, rel=0.03)
    torch.testing.assert_close(again.on_data.effect, found.effect, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(again.unrelated.kl[0], found["one"].kl, atol=1e-4, rtol=1e-3)
    assert torch.equal(again.on_data.accuracy[0], found["one"].hits), "right on the data, not where the KL is spent"
    assert found.p() == {}, "nothing to compare with"


def test_both_signs_are_searched_and_the_better_one_is_reported_on_rows_that_did_not_choose_it(gpt2):
    """An edit and its opposite find the same dose with the other sign, and the numbers are those of that sign alone."""
    import reftlens as rl
    from reftlens.cone.plans import Plan

    data, reft = _data(gpt2), _reft("vector")
    plans = {"one": Plan(reft), "turned": Plan(reft, rl.Variant(-1.0))}
    settings = dict(progress=False, evaluations=8)
    found = rl.strength.at_kl(0.05, plans, gpt2, data, signs="both", **settings)
    given = {sign: rl.strength.at_kl(0.05, plans, gpt2, data, high=10.0 * sign, **settings)["one"] for sign in (1, -1)}
    assert found["one"].strength == pytest.approx(-found["turned"].strength, rel=1e-3)
    best = max((1, -1), key=lambda sign: given[sign].effect[::2].mean())
    assert math.copysign(1, found["one"].strength) == best and found.chosen_on == tuple(range(0, len(data), 2))
    for dose, sign in ((found["one"], best), (found["one"].opposite, -best)):
        assert dose.strength == pytest.approx(given[sign].strength, rel=1e-6)
        torch.testing.assert_close(dose.effect, given[sign].effect[1::2], atol=1e-9, rtol=1e-6)
        assert torch.equal(dose.hits, given[sign].hits[1::2])
    frame, text = found.to_frame(), " ".join(str(found).split())
    assert frame.loc["one", "opposite_strength"] == found["one"].opposite.strength
    assert (
        f"signs chosen by mean effect on {len(found.chosen_on)} rows" in text and "the opposite edit: strength" in text
    )
    axes = found.plot(measure="accuracy")
    assert axes.get_xlabel().startswith("share of targets") and len(axes.collections) >= 2
    assert axes.get_legend_handles_labels()[1] == ["opposite edit"]
    for bad in ({"high": -1.0}, {"data": data[:3]}):
        with pytest.raises(ValueError, match=r"signs='both' with high=.* expected above 0, and four or more"):
            rl.strength.at_kl(0.05, plans, gpt2, bad.pop("data", data), signs="both", progress=False, **bad)


def test_the_choice_of_a_sign_flatters_nothing():
    """Where neither sign does anything, the better half is above 0 where it was chosen, and 0 where it is reported."""
    from reftlens.analysis.strength.budgets import _better
    from reftlens.analysis.strength.equal_kl import Dose

    g, chosen, reported = torch.Generator().manual_seed(0), [], []
    for _ in range(300):
        plus, minus = torch.randn(2, 20, generator=g, dtype=torch.float64)
        doses = [Dose(sign, 0.1, x.abs(), x, x, ((sign, 0.1),)) for sign, x in ((1.0, plus), (-1.0, minus))]
        better = _better(*doses)
        chosen.append((plus if better.strength > 0 else minus)[::2].mean())
        reported.append(better.effect.mean())
    spread = (1 / 10 / 300) ** 0.5
    assert torch.stack(chosen).mean() > 4 * spread and torch.stack(reported).mean().abs() < 4 * spread


# -- several seeds -------------------------------------------------------------------------------------------


def test_runs_are_pooled_as_each_is_measured(gpt2):
    import reftlens as rl

    data, doses, refts = _data(gpt2), (1.0, 0.0, 0.5), _reft("LoReFT").seeds([0, 1, 2])
    runs = {name: rl.dose_response(reft, gpt2, data, doses, progress=False) for name, reft in refts.items()}
    pooled = rl.strength.PooledDoses(runs)
    for name in pooled.measured:
        means = torch.stack([run.measure(name).nanmean(dim=1) for run in runs.values()])
        assert [e.value for e in pooled.estimate(name)] == pytest.approx(means.mean(dim=0).tolist(), abs=1e-12)
        assert pooled.spread(name).tolist() == pytest.approx(means.std(dim=0).tolist())
        assert all(e.low <= e.value <= e.high for e in pooled.estimate(name))
    assert all(e.low >= 0 and e.high <= 1 for e in pooled.estimate("accuracy"))
    effect = pooled.estimate("effect")
    assert effect[1].low == effect[1].high == 0.0, "strength 0 does nothing in any run"
    alone = runs["seed 0"].estimate("effect")[0]
    assert effect[0].high - effect[0].low > alone.high - alone.low, "seeds differ"
    table, frame = pooled.by_strength(), pooled.to_frame()
    assert table.loc[1.0, "effect"] == effect[0].value and table.loc[1.0, "effect_spread"] > 0
    assert len(frame) == 3 * len(runs["seed 0"].to_frame()) and set(frame["run"]) == set(runs)
    axes = pooled.plot()
    thin = [line for line in axes.lines if line.get_linewidth() == 0.7]
    for line, run in zip(thin, runs.values(), strict=True):
        ordered = sorted(zip(doses, run.on_data.effect.mean(dim=1).tolist(), strict=True))
        assert line.get_ydata().tolist() == pytest.approx([y for _, y in ordered])
    assert "mean of 3 seeds" in axes.get_legend_handles_labels()[1] and "3 runs on" in str(pooled)
    assert pooled["seed 1"] is runs["seed 1"]
    other = rl.dose_response(refts["seed 0"], gpt2, data[:2], doses, progress=False)
    with pytest.raises(ValueError, match=r"effect is of \[\d+, 2\] rows"):
        rl.strength.PooledDoses({"a": runs["seed 0"], "b": other}).estimate("effect")
    for bad in ({"a": other}, {"a": other, "b": replace(other, strengths=(2.0, 0.0, 0.5))}):
        with pytest.raises(ValueError, match="expected two or more, all at the same"):
            rl.strength.PooledDoses(bad)


def test_no_pooled_interval_of_a_divergence_or_a_size_reaches_below_zero(gpt2):
    import reftlens as rl

    data, base = _data(gpt2), _reft("LoReFT")
    one = rl.dose_response(base, gpt2, data, (1.0, 0.5), progress=False)
    factors = torch.tensor([0.01, 0.01, 2.0], dtype=torch.float64)  # the seeds differ more than their mean is large
    scaled = [replace(one.on_data, kl=factor * one.on_data.kl) for factor in factors]
    runs = {
        str(i): replace(one, on_data=each, unit_size=f * one.unit_size)
        for i, (each, f) in enumerate(zip(scaled, factors, strict=True))
    }
    pooled = rl.strength.PooledDoses(runs)
    for name in ("kl", "edit_size"):
        assert all(0.0 == e.low < e.value < e.high for e in pooled.estimate(name)), name


@pytest.mark.parametrize(("between", "within"), [(1.0, 0.2), (0.3, 1.0), (0.0, 1.0)])
def test_an_interval_over_seeds_and_examples_holds_the_truth_as_often_as_it_says(between, within):
    """Three runs on thirty examples, whose truth is 0; without the stretch for few runs 0.75 in the first case."""
    from reftlens.scoring.statistics import over_two

    g, held, count = torch.Generator().manual_seed(0), 0, 120
    for _ in range(count):
        x = between * torch.randn(3, 1, generator=g) + within * torch.randn(1, 30, generator=g)
        estimate = over_two(x.double() + 0.3 * torch.randn(3, 30, generator=g))
        held += estimate.low <= 0 <= estimate.high
    assert held / count > 0.91, "0.95 less two standard errors"


def test_runs_that_are_one_and_the_same_add_nothing_to_the_interval_of_the_examples():
    from reftlens.scoring.statistics import mean_of, over_two, student_t

    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alike, alone = over_two(x.expand(3, 40)), mean_of(x)
    assert (alike.low, alike.high) == pytest.approx((alone.low, alone.high), abs=0.03)
    with pytest.raises(ValueError, match="expected two runs or more"):
        over_two(x[None])
    assert [student_t(n) for n in (1, 10, 30)] == pytest.approx([12.706, 2.228, 2.042], abs=2e-3)


# -- results -------------------------------------------------------------------------------------------------


def test_a_second_run_is_the_same_bit_for_bit(gpt2):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response

    sampling = rl.Decoding(max_new_tokens=6, temperature=1.0, seed=3)
    settings = dict(prompts=["the cat sat"], decoding=sampling, progress=False)
    once, again = (dose_response(_reft("LoReFT"), gpt2, _data(gpt2), [0.0, 0.5, 1.0], **settings) for _ in range(2))
    assert once.to_frame().equals(again.to_frame()) and once.by_strength().equals(again.by_strength())
    assert once.ec50() == again.ec50() and str(once) == str(again)


def test_the_result_can_be_read_and_seen():
    found = _response()
    frame, count = found.to_frame(), len(TEXTS)
    assert len(frame) == len(STRENGTHS) * (count + 3 + 2)
    mine = frame[(frame["rows"] == "data") & (frame["strength"] == 1.0)]
    assert mine["effect"].tolist() == found.on_data.effect[STRENGTHS.index(1.0)].tolist()
    assert frame[frame["rows"] == "prompts"]["text"].notna().all()
    table = found.by_strength()
    assert list(table.index) == list(STRENGTHS) and (table["effect_low"] <= table["effect_high"]).all()
    for measure in found.measured:
        assert found.plot(measure=measure).get_xlabel().startswith("strength")
    assert "nats per token" in found.plot_frontier().get_xlabel()
    assert max(map(len, found.plot().get_ylabel().splitlines())) <= 40, "longer than a plot is high"
    assert "drift" not in _response("DAS").plot_frontier(cost="drift").get_ylabel()
    assert "moves the wrong way" in str(found) and "strength 1:" in str(found)
    assert found.ec50("score").reference == 1.0

    whole = torch.tensor([[1.0] * 6, [0.0] * 6, [0.5] * 6] * 2, dtype=torch.float64)
    with_hits = replace(found, on_data=replace(found.on_data, accuracy=whole))
    high, low, half, *_ = with_hits.estimate("accuracy")
    assert high.low == pytest.approx(0.025 ** (1 / 6)) and low.high == pytest.approx(1 - 0.025 ** (1 / 6))
    assert half.low == half.high == 0.5, "the bootstrap's, of parts of an answer"

    dose = _dose(0.1, _reft("vector"), bridge("gpt2"), _data(bridge("gpt2")))
    assert len(dose.to_frame()) == len(dose.evaluations) and "0.1 nats" in str(dose)
    assert "nats" in dose.plot().get_ylabel()


def test_what_cannot_be_measured_is_said(gpt2):
    from reftlens.analysis.strength import dose_response

    data, settings = _data(gpt2), dict(progress=False)
    with pytest.raises(ValueError, match="each of them once"):
        dose_response(_reft("vector"), gpt2, data, [1.0, 1], **settings)
    with pytest.raises(ValueError, match="expected one or more"):
        dose_response(_reft("vector"), gpt2, data, [], **settings)
    with pytest.raises(ValueError, match="pass prompts="):
        dose_response(_reft("vector"), gpt2, data, [1.0], score=len, **settings)
    found = dose_response(_reft("vector"), gpt2, data, 1, **settings)
    assert found.strengths == (1.0,)
    less, more = (
        replace(found, on_data=replace(found.on_data, effect=sign * found.on_data.effect.abs())) for sign in (-1, 1)
    )
    assert "there is no half of it" in str(less.ec50()), "no other strengths would help"
    with pytest.raises(ValueError, match="give strengths between 0 and 1"):
        more.ec50()
    with pytest.raises(ValueError, match="pass unrelated="):
        found.measure("drift")
    with pytest.raises(ValueError, match="pass prompts= and score="):
        found.measure("score")
    with pytest.raises(ValueError, match="expected one of 'effect'"):
        found.measure("joy")
    with pytest.raises(ValueError, match="two different ones"):
        found.slopes  # noqa: B018
    with pytest.raises(ValueError, match="give 0 among"):
        found.ec50("kl")
    with pytest.raises(ValueError, match="expected one of the strengths"):
        found.ec50(reference=0.3)
    with pytest.raises(ValueError, match="no such source"):
        dose_response(_reft("DAS"), gpt2, data, [1.0], **settings)
