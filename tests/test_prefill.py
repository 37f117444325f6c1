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
        "last": [rl.resid_post(1, "last")], "first": [rl.resid_pre(0, "f1+l1")],
        "two": [rl.resid_post(0, "l2"), rl.attn_out(2, "last")], "all": [rl.mlp_out(1, "all")],
        "embed": [rl.embed("last")], "final norm": [rl.final_norm("last")],
        "generated": [rl.resid_post(2, rl.Generated())], "response": [rl.attn_q(1, rl.Response())],
    }  # fmt: skip


SLOW = pytest.mark.slow


def _reft(name, dtype=torch.float32):
    import reftlens as rl

    return rl.ReFT({site: rl.LoReFT(32, 2) for site in _sites()[name]}).to(dtype)


@pytest.mark.parametrize("name", ["last", "first", "two", "all", "embed", "final norm", "generated", "response"])
@pytest.mark.parametrize("architecture", [pytest.param(a, marks=() if a == "gpt2" else SLOW) for a in ARCHITECTURES])
def test_generation_from_prefilled_prompts_is_generation(architecture, name):
    import reftlens as rl

    model, reft = bridge(architecture), _reft(name)
    prefilled = rl.prefill(reft, model, PROMPTS)
    assert "reused" in prefilled.said and prefilled.keys
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
    prefilled = rl.prefill(reft, model, PROMPTS)
    found = rl.generate(reft, model, prefilled, max_new_tokens=6, keep_logits=True)
    expected = rl.generate(reft, model, PROMPTS, max_new_tokens=6, keep_logits=True)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_beams_and_streams_go_on_from_prefilled_prompts(llama):
    import reftlens as rl

    reft = _reft("two")
    prefilled = rl.prefill(reft, llama, PROMPTS[:1])
    beams = [rl.generate(reft, llama, p, max_new_tokens=4, beams=3) for p in (prefilled, PROMPTS[:1])]
    assert beams[0] == beams[1]
    texts = ["".join(rl.stream(reft, llama, p, max_new_tokens=6)) for p in (prefilled, PROMPTS[0])]
    assert texts[0] == texts[1]


def test_weights_of_the_edit_may_change_and_those_of_the_model_may_not():
    import reftlens as rl

    model, reft = fresh_bridge("llama"), _reft("last")
    prefilled = rl.prefill(reft, model, PROMPTS)
    reft.reset(7)
    assert rl.generate(reft, model, prefilled, max_new_tokens=4) == rl.generate(reft, model, PROMPTS, max_new_tokens=4)
    with torch.no_grad():
        model.original_model.model.norm.weight.mul_(1.1)
    with pytest.raises(ValueError, match="call prefill again"):
        rl.generate(reft, model, prefilled, max_new_tokens=4)


def test_what_does_not_belong_together_is_refused(llama):
    import reftlens as rl

    prefilled = rl.prefill(_reft("last"), llama, PROMPTS)
    with pytest.raises(ValueError, match="the prompts were read for edits at"):
        rl.generate(_reft("first"), llama, prefilled, max_new_tokens=2)
    with pytest.raises(ValueError, match="come with their template"):
        rl.generate(_reft("last"), llama, prefilled, chat=True, max_new_tokens=2)


def test_a_users_hook_sees_the_whole_prompt(llama):
    import reftlens as rl

    reft = _reft("last")
    prefilled = rl.prefill(reft, llama, PROMPTS)
    expected = rl.generate(reft, llama, PROMPTS, max_new_tokens=2)
    seen = []
    llama.blocks[0].hook_out.add_hook(lambda h, hook: seen.append(h.shape[1]) and None)
    try:
        found = rl.generate(reft, llama, prefilled, max_new_tokens=2)
    finally:
        llama.reset_hooks()
    assert found.ids == expected.ids
    assert seen[0] == max(map(len, expected.prompt_ids))
