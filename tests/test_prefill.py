"""Prompts read once: every later generation from them is the one that reads them anew."""

import pytest
import torch

from architectures import ARCHITECTURES, bridge, fresh_bridge

PROMPTS = [
    "the cat sat on the mat and looked",
    "a dog",
    "the moon over the green hill while a cat looked at the mat and ran",
]


def _sites():
    import reftlens as rl

    return {
        "last": [rl.resid_post(1, "last")],
        "first": [rl.resid_pre(0, "f1+l1")],
        "two": [rl.resid_post(0, "l2"), rl.attn_out(2, "last")],
        "all": [rl.mlp_out(1, "all")],
        "embed": [rl.embeddings("last")],
        "final norm": [rl.final_norm("last")],
        "generated": [rl.resid_post(2, rl.positions.Generated())],
        "response": [rl.attn_q(1, rl.positions.Response())],
    }


SLOW = pytest.mark.slow


def _reft(name, dtype=torch.float32):
    import reftlens as rl

    return rl.ReFT({site: rl.LoReFT(32, 2) for site in _sites()[name]}).to(dtype)


@pytest.mark.parametrize("name", ["last", "first", "two", "all", "embed", "final norm", "generated", "response"])
@pytest.mark.parametrize("architecture", [pytest.param(a, marks=() if a == "gpt2" else SLOW) for a in ARCHITECTURES])
def test_generation_from_prefilled_prompts_is_generation(architecture, name):
    import reftlens as rl

    model, reft = bridge(architecture), _reft(name)
    prefilled = rl.generation.prefill(reft, model, PROMPTS)
    assert "reused" in prefilled.computation and prefilled.states
    for strength in (0.0, 0.5, 3.0, 0.5):
        settings = dict(variant=rl.Variant(strength=strength), max_new_tokens=5, keep_logits=True)
        found = rl.generate(reft, model, prefilled, **settings)
        expected = rl.generate(reft, model, PROMPTS, **settings)
        assert found.ids == expected.ids and found.edited == expected.edited
        for a, b in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # float32, sums in another order


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_the_difference_vanishes_in_float64(architecture):
    import reftlens as rl

    model, reft = bridge(architecture, torch.float64), _reft("two", torch.float64)
    prefilled = rl.generation.prefill(reft, model, PROMPTS)
    found = rl.generate(reft, model, prefilled, max_new_tokens=6, keep_logits=True)
    expected = rl.generate(reft, model, PROMPTS, max_new_tokens=6, keep_logits=True)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_beams_and_streams_go_on_from_prefilled_prompts(llama):
    import reftlens as rl

    reft = _reft("two")
    prefilled = rl.generation.prefill(reft, llama, PROMPTS[:1])
    beams = [rl.generate(reft, llama, p, max_new_tokens=4, beams=3) for p in (prefilled, PROMPTS[:1])]
    assert beams[0] == beams[1]
    texts = ["".join(rl.stream(reft, llama, p, max_new_tokens=6)) for p in (prefilled, PROMPTS[0])]
    assert texts[0] == texts[1]


def test_weights_of_the_edit_may_change_and_those_of_the_model_may_not():
    import reftlens as rl

    model, reft = fresh_bridge("llama"), _reft("last")
    prefilled = rl.generation.prefill(reft, model, PROMPTS)
    reft.reset(7)
    assert rl.generate(reft, model, prefilled, max_new_tokens=4) == rl.generate(reft, model, PROMPTS, max_new_tokens=4)
    with torch.no_grad():
        model.original_model.model.norm.weight.mul_(1.1)
    with pytest.raises(ValueError, match="call prefill again"):
        rl.generate(reft, model, prefilled, max_new_tokens=4)


def test_what_does_not_belong_together_is_refused(llama):
    import reftlens as rl

    prefilled = rl.generation.prefill(_reft("last"), llama, PROMPTS)
    with pytest.raises(ValueError, match="the prompts were read for edits at"):
        rl.generate(_reft("first"), llama, prefilled, max_new_tokens=2)
    with pytest.raises(ValueError, match="come with their template"):
        rl.generate(_reft("last"), llama, prefilled, chat=True, max_new_tokens=2)


def test_a_users_hook_sees_the_whole_prompt(llama):
    import reftlens as rl

    reft = _reft("last")
    prefilled = rl.generation.prefill(reft, llama, PROMPTS)
    expected = rl.generate(reft, llama, PROMPTS, max_new_tokens=2)
    seen = []
    llama.blocks[0].hook_out.add_hook(lambda h, hook: seen.append(h.shape[1]) and None)
    try:
        found = rl.generate(reft, llama, prefilled, max_new_tokens=2)
    finally:
        llama.reset_hooks()
    assert found.ids == expected.ids
    assert seen[0] == max(map(len, expected.prompt_ids))


# -- several strengths in one batch --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last", "two", "all", "generated"])
@pytest.mark.parametrize("read", [False, True], ids=["from the prompts", "prefilled"])
@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_strengths_in_one_batch_write_what_each_writes_alone(architecture, read, name):
    import reftlens as rl
    from reftlens.generation.writing import generate_each

    model, reft = bridge(architecture, torch.float64), _reft(name, torch.float64)
    variants = [rl.Variant(s) for s in (0.0, 1.0, (0.5, -3.0), 4.0)]
    batch = rl.encode_prompts(model, PROMPTS)
    found = generate_each(
        reft, model, rl.generation.prefill(reft, model, batch) if read else batch, variants, max_new_tokens=6
    )
    assert len(found) == len(variants)
    for variant, made in zip(variants, found, strict=True):
        alone = rl.generate(reft, model, PROMPTS, variant=variant, max_new_tokens=6)
        assert (made.texts, made.prompt_ids, made.ids, made.edited) == (
            alone.texts,
            alone.prompt_ids,
            alone.ids,
            alone.edited,
        )
    assert len({made.ids for made in found}) > 1, "strength matters"


def test_each_strength_samples_with_the_same_random_numbers(gpt2):
    import reftlens as rl
    from reftlens.generation.writing import generate_each

    batch, nothing = rl.encode_prompts(gpt2, PROMPTS), rl.SteeringVector(32, torch.zeros(32))
    settings = dict(max_new_tokens=8, temperature=1.0, seed=3)
    reft = rl.ReFT({rl.resid_post(1, "last"): nothing})
    twice = generate_each(reft, gpt2, batch, [rl.Variant(1.0), rl.Variant(2.0)], **settings)
    assert twice[0].ids == twice[1].ids == rl.generate(reft, gpt2, batch, **settings).ids
    assert twice[0].ids != generate_each(reft, gpt2, batch, [rl.Variant(1.0)], **(settings | {"seed": 4}))[0].ids


def test_variants_that_differ_in_more_than_strength_are_refused(gpt2):
    import reftlens as rl
    from reftlens.generation.writing import generate_each

    batch, reft = rl.encode_prompts(gpt2, PROMPTS), _reft("two")
    with pytest.raises(ValueError, match="differ in strength only"):
        generate_each(reft, gpt2, batch, [rl.Variant(), rl.Variant(sites=[0])])
    with pytest.raises(ValueError, match="0 variant"):
        generate_each(reft, gpt2, batch, [])
