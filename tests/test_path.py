"""The path of an edit: its components add up to what the logits really change by, on every architecture."""

import pytest
import torch
from planted import CORNERS, D, pairs, planted

from architectures import ARCHITECTURES, bridge, fresh_bridge

QUIET = dict(progress=False)


def _data(model):
    import reftlens as rl

    prompts = ["the cat sat", "a dog ran by the green hill while", "the moon"]
    return rl.encode(model, [rl.Example(p, " and looked") for p in prompts])


def _reft(model, *sites):
    import reftlens as rl

    reft = rl.ReFT({site: rl.LoReFT(rl.hooks(model)[site.hook].width, rank=2) for site in sites})
    reft.reset(1)
    return reft


def _logits(reft, model, data, variant=None):
    """Of the edited model where targets are predicted."""
    import reftlens as rl

    with torch.no_grad(), reft.on(model, data, variant or rl.Variant()):
        return model(data.tokens, attention_mask=data.attention_mask.long(), return_type="logits")[data.predicting]


def _places(rl, model):
    mixed = [rl.attn_z(0, "l2"), rl.mlp_post(1, "last"), rl.resid_post(1, "all"), rl.resid_pre(2, "last")]
    some = [
        [rl.resid_post(0, "prompt")],
        mixed,
        [rl.embeddings("first"), rl.resid_post(0, "all")],
        [rl.resid_post(2, "last")],
    ]
    parallel = getattr(model.cfg, "parallel_attn_mlp", False)
    return some if parallel else [*some, [rl.resid_mid(1, "all"), rl.resid_post(1, "last")]]


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a in ("qwen2", "llama") else ()) for a in ARCHITECTURES]
)
def test_components_add_up_to_the_change_of_the_logits(architecture, doubles):
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    model = bridge(architecture, torch.float64)
    data = _data(model)
    zero = rl.Variant(strength=0.0)
    capped = getattr(model.cfg, "output_logits_soft_cap", 0) or 0
    for places in _places(rl, model):
        reft = _reft(model, *places)
        found = edit_path(reft, model, data, batch_size=2, **QUIET)
        after, before = (_logits(reft, model, data, v).gather(1, data.target_ids[:, None])[:, 0] for v in (None, zero))
        change = torch.stack([(after - before)[data.target_rows == row].mean() for row in range(3)])
        assert torch.allclose(found.total, change, atol=1e-10) and change.abs().max() > 1e-3
        if capped > 0:
            raw = capped * (torch.atanh(after / capped) - torch.atanh(before / capped))
            change = torch.stack([raw[data.target_rows == row].mean() for row in range(3)])
            assert found.rest.abs().max() > 1e-6, "the soft-cap is in what is not attributed"
        assert torch.allclose(found.attributed.sum(dim=0), change, atol=1e-10), [str(site) for site in places]


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_each_component_is_what_the_edit_changed_in_that_output(architecture):
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    model = bridge(architecture, torch.float64)
    data = _data(model)
    reft = _reft(model, rl.resid_post(0, "all"))
    found = edit_path(reft, model, data, **QUIET)
    caches = []
    for strength in (0.0, 1.0):
        with torch.no_grad(), reft.on(model, data, rl.Variant(strength)):
            caches.append(model.run_with_cache(data.tokens, attention_mask=data.attention_mask.long())[1])
    gain, scale = model.ln_final.weight, caches[1]["ln_final.hook_in"][data.predicting]
    scale = (scale.var(dim=1, unbiased=False) + model.cfg.eps).sqrt()
    u = (model.W_U[:, data.target_ids] * gain[:, None]).T
    u = u - u.mean(dim=1, keepdim=True)
    names = ["blocks.1.hook_resid_pre", *(f"blocks.{n}.hook_{kind}_out" for n in (1, 2) for kind in ("attn", "mlp"))]
    assert [str(c) for c in found.components] == [
        "edit 0 resid_post",
        "attention 1",
        "MLP 1",
        "attention 2",
        "MLP 2",
        "norm",
    ]
    for name, share in zip(names, found.attributed, strict=False):
        change = (caches[1][name] - caches[0][name])[data.predicting]
        per_target = (u * change).sum(dim=1) / scale
        expected = torch.stack([per_target[data.target_rows == row].mean() for row in range(3)])
        assert torch.allclose(share, expected, atol=1e-10), name


def test_transformer_lens_says_the_same_in_its_compatibility_mode():
    """Its attribution is linear in the stream: that of the edited run less that of the unedited one."""
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    model = fresh_bridge("gpt2", dtype=torch.float64)
    model.enable_compatibility_mode(disable_warnings=True)
    data = rl.encode(model, [rl.Example("the cat sat on", " the")], end=False)
    reft = _reft(model, rl.resid_post(0, "all"))
    found = edit_path(reft, model, data, **QUIET)
    stacks = []
    for strength in (0.0, 1.0):
        with torch.no_grad(), reft.on(model, data, rl.Variant(strength)):
            cache = model.run_with_cache(data.tokens, attention_mask=data.attention_mask.long())[1]
        column = int(data.predicting[1][0])
        stacks.append(cache.decompose_resid(apply_ln=False, pos_slice=column, return_labels=True))
    (before, labels), (after, _) = stacks
    theirs = cache.logit_attrs(after - before, tokens=data.target_ids[:1], pos_slice=column)[:, 0]
    mine = {str(c): v.item() for c, v in zip(found.components, found.attributed[:, 0], strict=True)}
    for kind, label in (("attention", "attn_out"), ("MLP", "mlp_out")):
        for layer in (1, 2):
            assert mine[f"{kind} {layer}"] == pytest.approx(theirs[labels.index(f"{layer}_{label}")].item(), abs=1e-8)
    assert found.rest.abs().max() < 1e-8


def test_in_a_network_whose_blocks_add_nothing_the_edit_goes_straight_through():
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    truth = planted()
    data, base = pairs(truth.value, 12, 3)
    das = rl.DAS(D, basis=truth.subspace)
    found = edit_path(rl.ReFT({rl.resid_post(0, "last"): das}), truth.model, data, **QUIET)
    kinds = [c.kind for c in found.components]
    assert kinds == ["edit", "attention", "MLP", "attention", "MLP", "norm"]
    assert (found.attributed[1:5] == 0).all() and found.rest.abs().max() < 1e-5
    assert found.contribution(found.components[0]).low > 0.5
    contrast = edit_path(rl.ReFT({rl.resid_post(0, "last"): das}), truth.model, data, against=base, **QUIET)
    same = data.target_ids == base.target_ids
    assert (contrast.attributed[:, same] == 0).all() and (contrast.total[~same] > found.total[~same]).all()
    vector = rl.SteeringVector(D, 4 * truth.subspace @ CORNERS[0])
    elsewhere = edit_path(rl.ReFT({rl.resid_post(0, "f3"): vector}), truth.model, data, **QUIET)
    assert (elsewhere.attributed == 0).all() and (elsewhere.total == 0).all(), "an edit at the fillers goes nowhere"


def test_the_path_of_a_variant_and_of_none():
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    model = bridge("gpt2", torch.float64)
    data = _data(model)
    reft = _reft(model, rl.resid_post(0, "prompt"), rl.resid_post(1, "last"))
    one = edit_path(reft, model, data, variant=rl.Variant(sites=[1]), **QUIET)
    alone = edit_path(rl.ReFT({reft.sites[1]: reft[1]}), model, data, **QUIET)
    assert one.components == alone.components and torch.equal(one.attributed, alone.attributed)
    idle = edit_path(reft, model, data, variant=rl.Variant(strength=0.0), **QUIET)
    assert (idle.attributed == 0).all() and (idle.total == 0).all()


def test_it_can_be_read_and_seen_and_a_second_run_gives_the_same(gpt2):
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    data = _data(gpt2)
    reft = _reft(gpt2, rl.resid_post(0, "last"), rl.resid_mid(1, "last"))
    once, again = (edit_path(reft, gpt2, data, **QUIET) for _ in range(2))
    frame = once.to_frame()
    assert frame.equals(again.to_frame()) and list(frame["component"])[-2:] == ["not attributed", "total"]
    parts = frame.iloc[:-1]["logit_change"].sum()
    assert parts == pytest.approx(frame.iloc[-1]["logit_change"], abs=1e-6)
    ax = once.plot()
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels == ["edit 0 resid_post", "edit 1 resid_mid", "1", "2", "norm", "not attributed"]
    assert "logit" in ax.get_ylabel() and "not attributed" in str(once)


def test_what_has_no_path_is_refused(gpt2):
    import reftlens as rl
    from reftlens.analysis.places.path import edit_path

    data = _data(gpt2)
    with pytest.raises(ValueError, match="no way through the residual stream"):
        edit_path(_reft(gpt2, rl.final_norm("last")), gpt2, data, **QUIET)
    with pytest.raises(ValueError, match="targets in other places"):
        edit_path(_reft(gpt2, rl.resid_post(0, "last")), gpt2, data, against=data[[0, 2, 1]], **QUIET)
    with pytest.raises(ValueError, match="have no target"):
        edit_path(_reft(gpt2, rl.resid_post(0, "last")), gpt2, rl.encode_prompts(gpt2, ["the cat"]), **QUIET)
