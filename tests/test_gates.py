"""Gates: an edit behind one is `h' = h + strength · g · code @ basisᵀ`, and nothing at all where it is shut."""

import pytest
import torch

from architectures import ARCHITECTURES, D, bridge, hf_model

EXAMPLES = [
    ("the cat sat on the mat and", " looked at the moon"),
    ("a dog", " ran by the green hill while a dog"),
    ("the moon over the green hill while a cat looked at the mat", " the"),
]
SITES = (1, 2)
ROUNDING = 1e-5  # float32, sums in another order, as in test_generate.py


def direction():
    return torch.randn(D, generator=torch.Generator().manual_seed(7))


def gates():
    """Every gate and setting: open at some tokens of `EXAMPLES` or some of the way, and shut at others."""
    from reftlens.interventions import HardConcrete, Threshold

    return {
        "threshold per token": lambda: Threshold(direction(), 0.1),
        "hard concrete": lambda: HardConcrete(start=0.5, rate=0.25),
    }


NAMES = ("threshold per token", "hard concrete")


def test_the_table_of_this_file_has_every_gate():
    from reftlens.interventions import GATES

    assert tuple(gates()) == NAMES and {make().kind for make in gates().values()} == set(GATES)


def gated(name, inner=None, where="all", dtype=torch.float32):
    """The same gate before edits at two layers."""
    import reftlens as rl

    torch.manual_seed(3)
    modules = [rl.LoReFT(D, 3) if inner is None else inner() for _ in SITES]
    behind = [rl.interventions.Gated(m, gates()[name]() if isinstance(name, str) else name) for m in modules]
    return rl.ReFT({rl.resid_post(i - 1, where): m for i, m in zip(SITES, behind, strict=True)}).to(dtype).eval()


def shut(d=D):
    import reftlens as rl

    return rl.interventions.Threshold(direction()[:d], 1e9)


def encoded(model):
    import reftlens as rl

    return rl.encode(model, [rl.Example(*example) for example in EXAMPLES])


def logits_of(reft, model, batch, strength=1.0):
    import reftlens as rl

    with torch.no_grad(), reft.on(model, batch, rl.Variant(strength)):
        return model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)


# -- the formula ----------------------------------------------------------------------------------------------------


def test_a_threshold_is_open_where_the_projection_is_over_it_and_the_direction_is_of_any_length():
    import reftlens as rl

    h, v = torch.randn(50, D).double(), direction()
    expected = (h @ (v / v.norm()).double() > 0.3).double()[:, None]
    for scale in (1.0, 1e-3, 50.0):
        gate = rl.interventions.Threshold(scale * v, 0.3)
        assert torch.equal(gate.open(h), expected)
    assert 0.1 < expected.mean() < 0.9


@pytest.mark.parametrize("strength", [1.0, -0.5, torch.tensor([2.0, 0.0, 1.0])], ids=["1", "-0.5", "per direction"])
def test_a_gate_multiplies_the_code_and_where_it_is_shut_h_stays_bit_for_bit(strength):
    import reftlens as rl

    h, inner, gate = torch.randn(50, D), rl.LoReFT(D, 3), rl.interventions.Threshold(direction(), 0.3)
    h[:, 0] = -0.0
    g, out = gate.open(h), rl.interventions.Gated(inner, gate)(h, strength)
    with torch.no_grad():
        expected = h + g * (inner(h, strength) - h)
    torch.testing.assert_close(out, expected)
    closed = (g == 0)[:, 0]
    assert torch.equal(out[closed].view(torch.int32), h[closed].view(torch.int32))  # -0.0 too
    assert torch.equal(out[~closed], inner(h, strength)[~closed]) and not torch.equal(out[~closed], h[~closed])


def test_an_edit_that_is_not_finite_does_nothing_behind_a_shut_gate():
    import reftlens as rl

    inner, h = rl.SteeringVector(D, torch.ones(D)), torch.randn(5, D)
    with torch.no_grad():
        inner.vector.fill_(torch.inf)
    assert torch.equal(rl.interventions.Gated(inner, shut())(h), h)


def test_an_exchange_takes_a_gate_as_any_kind_does():
    import reftlens as rl

    das, gate, (h, source) = rl.DAS(D, 2), rl.interventions.Threshold(direction()), torch.randn(2, 20, D)
    module, source = rl.interventions.Gated(das, gate), source[:, None]
    assert module.variables == das.variables
    expected = torch.where(gate.open(h) > 0, das(h, source=source), h)
    assert torch.equal(module(h, source=source), expected) and not torch.equal(expected, das(h, source=source))


# -- on a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_and_a_shut_gate_are_the_model_itself_bit_for_bit(any_model, name):
    import reftlens as rl

    reft, closed, batch = gated(name), gated(shut()), encoded(any_model)
    with torch.no_grad():
        base = any_model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
    assert torch.equal(logits_of(reft, any_model, batch, 0.0), base)
    assert torch.equal(logits_of(closed, any_model, batch), base)
    assert not torch.equal(logits_of(reft, any_model, batch), base)
    texts, decoding = [p for p, _ in EXAMPLES], rl.Decoding(max_new_tokens=3)
    plain, found = (rl.generate(r, any_model, texts, decoding, keep_logits=True) for r in (None, closed))
    assert plain.ids == found.ids and all(map(torch.equal, plain.logits, found.logits))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cone_equals_the_full_computation(architecture, name):
    from test_scorer import off, scored, worst

    import reftlens as rl

    model, reft = bridge(architecture), gated(name)
    data, rows = encoded(model), (2, 0, 1)
    expected, _ = scored(model, reft, data, None, rows=rows)
    for reuse in (off(), off(scored_only=False, buckets=1), rl.Reuse(remember=False)):
        found, said = scored(model, reft, data, reuse, rows=rows)
        assert said.startswith("light cone") and worst(found, expected) < ROUNDING
    base, _ = scored(model, reft, data, off(), rows=rows, variant=rl.Variant(0.0))
    assert not torch.allclose(base[1], expected[1], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_without_reuse_and_beside_others_as_alone(gpt2_double, name):
    import reftlens as rl

    data, config = encoded(gpt2_double), rl.FitConfig(steps=3, lr=1e-2, batch_size=2)
    alone, full, first, second = (gated(name, dtype=torch.float64) for _ in range(4))
    rl.fit(alone, gpt2_double, data, config, progress=False)
    rl.fit(full, gpt2_double, data, config, reuse=False, progress=False)
    rl.training.fit_many({"a": first, "b": second}, gpt2_double, data, config, progress=False)
    start = gated(name, dtype=torch.float64)
    for a, *others in zip(*(r.parameters() for r in (alone, full, first, second, start)), strict=True):
        for b in others[:3]:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
        assert not torch.equal(a, others[3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_plain_transformers_model_computes_the_same_padded_on_either_side(architecture, name):
    import reftlens as rl

    model, plain, reft = bridge(architecture), hf_model(architecture), gated(name)
    batch = encoded(model)
    expected, real = logits_of(reft, model, batch), batch.attention_mask
    shift = [int((~row).sum()) for row in real]
    tokens, mask = (torch.stack([r.roll(n) for r, n in zip(x, shift, strict=True)]) for x in (batch.tokens, real))
    with torch.no_grad(), rl.storage.on_transformers(reft, plain, batch):
        right = plain(batch.tokens, attention_mask=real.long()).logits
        left = plain(tokens, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(right[real], expected[real], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(left[mask], expected[real], atol=ROUNDING, rtol=0)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_gate_cannot_be_is_said():
    import reftlens as rl
    from reftlens.interventions import Gated, Threshold

    for make, message in (
        (lambda: Gated(Threshold(direction()), rl.LoReFT(D)), "expected an Intervention"),
        (lambda: Gated(rl.LoReFT(D), direction()), "expected a Gate"),
        (lambda: Gated(rl.LoReFT(D + 1), Threshold(direction())), f"width {D}, and LoReFT was made for d={D + 1}"),
        (lambda: Threshold(torch.zeros(D)), "direction is zero"),
        (lambda: Threshold(), "needs a direction"),
        (lambda: Threshold(direction(), "high"), "above="),
    ):
        with pytest.raises(Exception, match=f"{message}|Type-check error"):
            make()
