"""Prompts read once: every later generation from them is the one that reads them anew."""

from dataclasses import replace
from functools import cache

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
        decoding = rl.Decoding(max_new_tokens=5)
        found = rl.generate(reft, model, prefilled, decoding, variant=strength, keep_logits=True)
        expected = rl.generate(reft, model, PROMPTS, decoding, variant=strength, keep_logits=True)
        assert found.ids == expected.ids and found.edited == expected.edited
        for a, b in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # float32, sums in another order


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_the_difference_vanishes_in_float64(architecture):
    import reftlens as rl

    model, reft = bridge(architecture, torch.float64), _reft("two", torch.float64)
    prefilled = rl.generation.prefill(reft, model, PROMPTS)
    found = rl.generate(reft, model, prefilled, rl.Decoding(max_new_tokens=6), keep_logits=True)
    expected = rl.generate(reft, model, PROMPTS, rl.Decoding(max_new_tokens=6), keep_logits=True)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_beams_and_streams_go_on_from_prefilled_prompts(llama):
    import reftlens as rl

    reft = _reft("two")
    prefilled = rl.generation.prefill(reft, llama, PROMPTS[:1])
    beams = [rl.generate(reft, llama, p, rl.Decoding(max_new_tokens=4, beams=3)) for p in (prefilled, PROMPTS[:1])]
    assert beams[0] == beams[1]
    texts = [
        "".join(rl.generation.stream(reft, llama, p, rl.Decoding(max_new_tokens=6))) for p in (prefilled, PROMPTS[0])
    ]
    assert texts[0] == texts[1]


def test_weights_of_the_edit_may_change_and_those_of_the_model_may_not():
    import reftlens as rl

    model, reft = fresh_bridge("llama"), _reft("last")
    prefilled = rl.generation.prefill(reft, model, PROMPTS)
    reft.reset(7)
    assert rl.generate(reft, model, prefilled, rl.Decoding(max_new_tokens=4)) == rl.generate(
        reft, model, PROMPTS, rl.Decoding(max_new_tokens=4)
    )
    with torch.no_grad():
        model.original_model.model.norm.weight.mul_(1.1)
    with pytest.raises(ValueError, match="call prefill again"):
        rl.generate(reft, model, prefilled, rl.Decoding(max_new_tokens=4))


CHANGES = {  # of a weight `w`, through `.data`, which torch does not count, and by other means
    "data +=": lambda w: w.data.add_(0.05),
    "data *=": lambda w: w.data.mul_(1.01),
    "data = others": lambda w: setattr(w, "data", w.data.flip(0).clone()),
    "copied": lambda w: w.data.copy_(torch.randn_like(w)),
    "counted": lambda w: w.detach().add_(0.05),
}


@cache
def _changed(dtype):
    """A model whose weights each test changes once more."""
    return fresh_bridge("llama", dtype=dtype)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("weight", ["embed_tokens", "q_proj", "down_proj", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_change_of_a_weight_is_noticed_whatever_way_it_is_made(change, weight, dtype):
    from reftlens.bridge.weights import weights_state

    model = _changed(dtype)
    w = next(p for n, p in model.original_model.named_parameters() if weight in n)
    before = weights_state(model)
    assert weights_state(model) == before
    CHANGES[change](w)
    assert weights_state(model) != before


def test_a_prompt_that_was_read_with_other_weights_is_refused_though_torch_counts_no_change():
    import reftlens as rl

    model, reft = fresh_bridge("llama"), _reft("last")
    prefilled = rl.generation.prefill(reft, model, PROMPTS)
    model.original_model.model.layers[0].mlp.up_proj.weight.data += 0.05
    with pytest.raises(ValueError, match="call prefill again"):
        rl.generate(reft, model, prefilled, rl.Decoding(max_new_tokens=1))


def test_what_does_not_belong_together_is_refused(llama):
    import reftlens as rl

    prefilled = rl.generation.prefill(_reft("last"), llama, PROMPTS)
    with pytest.raises(ValueError, match="the prompts were read for edits at"):
        rl.generate(_reft("first"), llama, prefilled, rl.Decoding(max_new_tokens=2))
    with pytest.raises(ValueError, match="a PromptCache comes with the template of its prompts"):
        rl.generate(_reft("last"), llama, prefilled, rl.Decoding(max_new_tokens=2), chat=True)


def test_a_users_hook_sees_the_whole_prompt(llama):
    import reftlens as rl

    reft = _reft("last")
    prefilled = rl.generation.prefill(reft, llama, PROMPTS)
    expected = rl.generate(reft, llama, PROMPTS, rl.Decoding(max_new_tokens=2))
    seen = []
    llama.blocks[0].hook_out.add_hook(lambda h, hook: seen.append(h.shape[1]) and None)
    try:
        found = rl.generate(reft, llama, prefilled, rl.Decoding(max_new_tokens=2))
    finally:
        llama.reset_hooks()
    assert found.ids == expected.ids
    assert seen[0] == max(map(len, expected.prompt_ids))


# -- several strengths in one batch --------------------------------------------------------------------------


def rows_of(generation):
    return generation.texts, generation.prompt_ids, generation.ids, generation.edited


ALONE = {}
"""What each strength writes alone, by architecture, edit and beams; prompts that were read before do not change it."""


@pytest.mark.parametrize("name", ["last", "two", "all", "generated"])
@pytest.mark.parametrize("read", [False, True], ids=["from the prompts", "prefilled"])
@pytest.mark.parametrize(
    "architecture, beams", [("gpt2", 1), ("gpt2", 3), ("neox", 1), pytest.param("neox", 3, marks=pytest.mark.slow)]
)
def test_strengths_in_one_batch_write_what_each_writes_alone(architecture, read, name, beams):
    import reftlens as rl

    model = bridge(architecture, torch.float64)
    torch.manual_seed(0)  # one edit for all that share what it writes alone, whether the model was there or not
    reft = _reft(name, torch.float64)
    variants, decoding = [0.0, rl.Variant(1.0), rl.Variant((0.5, -3.0)), 4], rl.Decoding(max_new_tokens=6, beams=beams)
    prompts = rl.generation.prefill(reft, model, PROMPTS) if read else PROMPTS
    together = rl.generate(reft, model, prompts, decoding, variant=variants)
    key = architecture, name, beams
    if key not in ALONE:
        ALONE[key] = [rows_of(rl.generate(reft, model, PROMPTS, decoding, variant=variant)) for variant in variants]
    assert [rows_of(generation) for generation in together] == ALONE[key]
    assert len({generation.ids for generation in together}) > 1, "strength matters"


@pytest.mark.parametrize("read", [False, True], ids=["from the prompts", "prefilled"])
def test_variants_that_differ_in_more_than_strength_are_written_in_their_order_each_as_alone(gpt2, read):
    import reftlens as rl

    reft, decoding = _reft("two"), rl.Decoding(max_new_tokens=5)
    prompts = rl.generation.prefill(reft, gpt2, PROMPTS) if read else PROMPTS
    variants = [
        rl.Variant(3.0),
        rl.Variant(3.0, sites=[1]),
        0,
        rl.Variant(-2.0, sites=[1]),
        rl.Variant(2.0, among="last"),
        3.0,
    ]
    together = rl.generate(reft, gpt2, prompts, decoding, variant=variants, keep_logits=True)
    for variant, generation in zip(variants, together, strict=True):
        alone = rl.generate(reft, gpt2, PROMPTS, decoding, variant=variant, keep_logits=True)
        assert rows_of(generation) == rows_of(alone)
        for a, b in zip(generation.logits, alone.logits, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # float32, sums in another order
    assert len({generation.edited for generation in together}) > 1


def test_each_strength_samples_with_the_same_random_numbers(gpt2):
    import reftlens as rl

    nothing = rl.SteeringVector(32, torch.zeros(32))
    decoding = rl.Decoding(max_new_tokens=8, temperature=1.0, seed=3)
    reft = rl.ReFT({rl.resid_post(1, "last"): nothing})
    one, two = rl.generate(reft, gpt2, PROMPTS, decoding, variant=[1.0, 2.0])
    assert one.ids == two.ids == rl.generate(reft, gpt2, PROMPTS, decoding).ids
    assert one.ids != rl.generate(reft, gpt2, PROMPTS, replace(decoding, seed=4)).ids


def test_no_variant_at_all_is_refused(gpt2):
    import reftlens as rl

    with pytest.raises(ValueError, match="expected one or more"):
        rl.generate(_reft("two"), gpt2, PROMPTS, variant=[])
