"""Every kind of site on every architecture: trained, generated with, and equal to a patch of plain transformers."""

from copy import deepcopy
from functools import cache

import pytest
import torch

from architectures import ARCHITECTURES, D_HEAD, D_MLP, KV_HEADS, D, bridge, fresh_bridge, hf_model

LAYER = 1
KV_WIDTH = {a: D if a in ("gpt2", "neox") else KV_HEADS * D_HEAD for a in ARCHITECTURES}
"""Width of keys and values: only the llama-like share them between heads."""

# name in reftlens, heads, width of what is edited
KINDS = {
    "resid_pre": ("resid_pre", None, lambda a: D),
    "resid_mid": ("resid_mid", None, lambda a: D),
    "resid_post": ("resid_post", None, lambda a: D),
    "attn_out": ("attn_out", None, lambda a: D),
    "mlp_out": ("mlp_out", None, lambda a: D),
    "mlp_post": ("mlp_post", None, lambda a: D_MLP),
    "q": ("attn_q", None, lambda a: D),
    "k": ("attn_k", None, KV_WIDTH.__getitem__),
    "v": ("attn_v", None, KV_WIDTH.__getitem__),
    "z": ("attn_z", None, lambda a: D),
    "q heads 3 1": ("attn_q", (3, 1), lambda a: 2 * D_HEAD),
    "k head 1": ("attn_k", (1,), lambda a: D_HEAD),
    "v head 0": ("attn_v", (0,), lambda a: D_HEAD),
    "z heads 0 2": ("attn_z", (0, 2), lambda a: 2 * D_HEAD),
    "embed": ("embeddings", None, lambda a: D),
    "final_norm": ("final_norm", None, lambda a: D),
}
ABSENT = {("neox", "resid_mid"): "its blocks compute attention and MLP in parallel from one residual stream"}
CELLS = [(a, k) for a in ARCHITECTURES for k in KINDS if (a, k) not in ABSENT]
FAST = ("gpt2", "neox", "gemma3")
LEARNING = [pytest.param(a, k, marks=() if a in FAST else pytest.mark.slow) for a, k in CELLS]
"""Fast where q, k and v are one matrix (gpt2), blocks are parallel (neox), heads are grouped and normed (gemma3)."""


def site(kind, positions):
    """The site of a row of the table."""
    import reftlens as rl

    name, heads, _ = KINDS[kind]
    make = getattr(rl, name)
    if name in ("embeddings", "final_norm"):
        return make(positions)
    return make(LAYER, positions, heads) if heads is not None else make(LAYER, positions)


def width(architecture, kind):
    return KINDS[kind][2](architecture)


@cache
def texts(architecture):
    """Three rows of different lengths with completions."""
    import reftlens as rl

    rows = [("the cat sat", " on the mat"), ("a dog ran by the green hill and looked", " at the moon"), ("the", " cat")]
    return rl.encode(bridge(architecture), [rl.Example(p, c) for p, c in rows])


@cache
def trained(architecture, kind):
    """A LoReFT at one site that was the identity and then learned the three rows by heart a little."""
    import reftlens as rl

    torch.manual_seed(0)
    reft = rl.ReFT({site(kind, "all"): rl.LoReFT(width(architecture, kind), rank=4, init="identity")})
    run = rl.fit(reft, bridge(architecture), texts(architecture), steps=3, lr=0.04, schedule="constant", progress=False)
    return reft, run


PROMPTS = ["the cat sat on", "a dog ran by the hill and looked at the moon over"]


def two_tokens(reft, architecture, strength=1.0):
    import reftlens as rl

    model, decoding = bridge(architecture), rl.Decoding(max_new_tokens=2)
    return rl.generate(reft, model, PROMPTS, decoding, variant=strength, keep_logits=True)


@cache
def unedited(architecture):
    return two_tokens(None, architecture)


def hf_logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False).logits


@cache
def plain_model(architecture):
    return hf_model(architecture)


@cache
def plain_logits(architecture):
    return hf_logits(plain_model(architecture), texts(architecture))


@cache
def base_logits(architecture):
    """Of the bridge, unedited."""
    model, batch = bridge(architecture), texts(architecture)
    with torch.no_grad():
        return model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)


def logits_on(reft, model, batch, variant=None):
    import reftlens as rl

    with torch.no_grad(), reft.on(model, batch, variant or rl.Variant()):
        return model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)


# -- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, kind", LEARNING)
def test_every_site_starts_as_the_identity_and_learns(architecture, kind):
    _, run = trained(architecture, kind)
    batch = texts(architecture)
    losses = torch.nn.functional.cross_entropy(plain_logits(architecture)[batch.predicting], batch.target_ids)
    assert run.losses[0] == pytest.approx(losses.item(), abs=1e-5)  # float32 rounding of a mean of a few logits
    assert run.losses[-1] < run.losses[0] - 0.003  # the least is 0.008: one key head of gemma3, which norms its keys
    assert all(norm > 0 for norm in run.gradient_norms)


@pytest.mark.parametrize("architecture, kind", LEARNING)
def test_every_site_is_generated_with_and_strength_zero_is_the_unedited_model(architecture, kind):
    import reftlens as rl

    reft, _ = trained(architecture, kind)
    plain = unedited(architecture)
    off, edited = two_tokens(reft, architecture, 0.0), two_tokens(reft, architecture, 3.0)
    assert off.ids == plain.ids
    for row in range(2):
        assert torch.equal(off.logits[row], plain.logits[row])
        assert (edited.logits[row][0] - plain.logits[row][0]).abs().max() > 1e-3
    batch = edited.batch()
    forced = logits_on(reft, bridge(architecture), batch, rl.Variant(strength=3.0))
    for row in range(2):
        start = len(edited.prompt_ids[row]) - 1
        same = forced[row, start : start + len(edited.ids[row])]
        # float32, matmuls of other shapes: the largest difference measured over all cells is 3e-6
        torch.testing.assert_close(edited.logits[row], same, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture, kind", CELLS)
def test_an_edit_equals_a_patch_of_the_plain_transformers_model(architecture, kind):
    import reftlens as rl

    torch.manual_seed(1)
    module = rl.LoReFT(width(architecture, kind), rank=3)
    reft = rl.ReFT({site(kind, "f1+l2"): module})
    batch, strength = texts(architecture), -1.5
    W, b, R = (t.detach() for t in (module.W, module.b, module.basis()))

    def by_hand(h):
        """[batch, seq, heads, d_head] or [batch, seq, d] → the same, edited token by token."""
        h = h.clone()
        heads = KINDS[kind][1]
        for i in range(len(batch)):
            prompt = int(batch.prompt_mask[i].sum())
            for p in {0, prompt - 1, max(0, prompt - 2)}:
                old = h[i, p].flatten() if heads is None else torch.cat([h[i, p, k] for k in heads])
                new = old + strength * ((W @ old + b) - old @ R) @ R.T
                if heads is None:
                    h[i, p] = new.view_as(h[i, p])
                else:
                    for n, k in enumerate(heads):
                        h[i, p, k] = new[n * D_HEAD : (n + 1) * D_HEAD]
        return h

    plain, before = deepcopy(plain_model(architecture)), plain_logits(architecture)
    patch_plain_model(plain, architecture, kind, by_hand)
    after = hf_logits(plain, batch)
    ours = logits_on(reft, bridge(architecture), batch, rl.Variant(strength=strength))
    real = batch.attention_mask
    # float32, logits up to 6, and eager attention beside the fused one: the largest difference measured is 4e-6
    torch.testing.assert_close(ours[real], after[real], atol=2e-5, rtol=0)
    assert (after[real] - before[real]).abs().max() > 1e-2  # and the patch does something


@pytest.mark.parametrize("architecture, kind", list(ABSENT))
def test_an_absent_site_is_refused_with_the_reason(architecture, kind):
    import reftlens as rl

    reft = rl.ReFT({site(kind, "all"): rl.LoReFT(D, rank=2)})
    with pytest.raises(rl.errors.HookNotFound, match="attention and MLP in parallel"):
        reft.bind(bridge(architecture))
    with pytest.raises(KeyError):
        rl.hooks(bridge(architecture))[site(kind, "all").hook]


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if (a, "resid_mid") not in ABSENT])
def test_resid_mid_edits_the_residual_stream_and_not_only_what_the_mlp_reads(architecture):
    # TransformerLens' hook_resid_mid is the input of the norm before the MLP: an edit there alone leaves the skip
    # connection as it was. `blocks.1.ln2.hook_in` still means just that.
    import reftlens as rl

    model, batch = bridge(architecture), texts(architecture)
    vector = torch.zeros(D)
    vector[3] = 1000.0  # the norm hides its size from the MLP, so the stream must carry it
    out = {}
    for name in ("hook_resid_mid", "ln2.hook_in"):
        reft = rl.ReFT({rl.Site(f"blocks.{LAYER}.{name}", "all"): rl.SteeringVector(D, vector)})
        with torch.no_grad(), reft.on(model, batch):
            _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask.long())
        out[name] = cache[f"blocks.{LAYER}.hook_resid_post"][:, :, 3][batch.attention_mask]
    assert (out["hook_resid_mid"] > 900).all()
    assert (out["ln2.hook_in"] < 100).all()


# -- where an edit reaches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, kind", CELLS)
def test_an_edit_changes_no_logits_before_its_token_and_none_of_another_row(architecture, kind):
    import reftlens as rl

    model, batch = bridge(architecture), texts(architecture)
    torch.manual_seed(2)
    reft = rl.ReFT({site(kind, [4]): rl.LoReFT(width(architecture, kind), rank=3)})
    base, edited = base_logits(architecture), logits_on(reft, model, batch)
    rows_with_token_4 = batch.attention_mask.sum(dim=1) > 4
    assert rows_with_token_4.tolist() == [True, True, False]
    assert torch.equal(edited[:, :4], base[:, :4])
    assert torch.equal(edited[2], base[2])
    assert not torch.isclose(edited[0, 4:6], base[0, 4:6], atol=1e-6).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["q heads 3 1", "k head 1", "v head 0", "z heads 0 2"])
def test_chosen_heads_are_edited_and_the_others_untouched(architecture, kind):
    import reftlens as rl

    name, heads, _ = KINDS[kind]
    model, batch = bridge(architecture), texts(architecture)
    torch.manual_seed(3)
    reft = rl.ReFT({site(kind, "prompt"): rl.LoReFT(width(architecture, kind), rank=3)})
    hook = f"blocks.{LAYER}.attn.hook_{name[-1]}"
    _, before = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask.long(), names_filter=hook)
    with torch.no_grad(), reft.on(model, batch):
        _, after = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask.long(), names_filter=hook)
    before, after = before[hook], after[hook]
    assert before.ndim == 4
    chosen = torch.zeros_like(before, dtype=torch.bool)
    for head in heads:
        chosen[:, :, head] = batch.prompt_mask[:, :, None]
    assert torch.equal(before[~chosen], after[~chosen])
    assert ((before - after)[chosen].view(-1, D_HEAD).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_indices_at_k_and_v_count_key_value_heads(architecture):
    import reftlens as rl

    model = bridge(architecture)
    count, table = KV_WIDTH[architecture] // D_HEAD, rl.hooks(model)
    for make in (rl.attn_k, rl.attn_v):
        assert table[make(LAYER, "last").hook].heads == count
        rl.training.preflight(rl.ReFT({make(LAYER, "last", count - 1): rl.LoReFT(D_HEAD, rank=2)}), model)
        with pytest.raises(ValueError, match=rf"has heads 0 to {count - 1}, got heads=\[{count}\]"):
            rl.training.preflight(rl.ReFT({make(LAYER, "last", count): rl.LoReFT(D_HEAD, rank=2)}), model)
    assert table[rl.attn_q(LAYER, "last").hook].heads == 4


def test_heads_beyond_the_last_and_heads_where_there_are_none_are_refused_in_any_forward_pass(llama):
    import reftlens as rl

    batch = texts("llama")
    for place, why in (
        (rl.attn_k(1, "last", 2), r"blocks.1.attn.k.hook_out has heads 0 to 1, got heads=\[2\]"),
        (rl.Site("blocks.1.hook_resid_post", "last", 0), r"has no heads .* drop heads=\[0\]"),
    ):
        reft = rl.ReFT({place: rl.LoReFT(D_HEAD, rank=2)})
        with pytest.raises(ValueError, match=why):
            logits_on(reft, llama, batch)
        with pytest.raises(ValueError, match=why):
            rl.generate(reft, llama, ["the cat"], rl.Decoding(max_new_tokens=2))


@pytest.mark.parametrize("heads", [[], [1, 1], [-1], -1])
def test_a_choice_of_heads_that_means_nothing_is_refused_at_once(heads):
    import reftlens as rl

    with pytest.raises(ValueError, match="need distinct head indices from 0"):
        rl.attn_z(0, "last", heads)


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("blocks.1.hook_resid_pos", "blocks.1.hook_resid_post"),
        ("blocks.1.atn.hook_z", "blocks.1.attn.hook_z"),
        ("block.1.hook_mlp_out", "blocks.1.hook_mlp_out"),
        ("hook_embd", "hook_embed"),
    ],
)
def test_a_misspelt_hook_suggests_near_names(llama, misspelt, meant):
    import reftlens as rl

    with pytest.raises(rl.errors.HookNotFound, match=meant.replace(".", r"\.")) as caught:
        rl.ReFT({rl.Site(misspelt, "last"): rl.LoReFT(D)}).bind(llama)
    assert misspelt in str(caught.value) and "did you mean" in str(caught.value)


def test_a_name_like_no_hook_points_to_the_list_of_sites(llama):
    import reftlens as rl

    with pytest.raises(rl.errors.HookNotFound, match=r"rl\.hooks\(model\) lists"):
        rl.ReFT({rl.Site("xyzzy", "last"): rl.LoReFT(D)}).bind(llama)


def test_a_layer_beyond_the_last_is_refused(any_model):
    import reftlens as rl

    with pytest.raises(rl.errors.HookNotFound, match=r"has no hook 'blocks\.3\.hook_resid_post'"):
        rl.ReFT({rl.resid_post(3, "last"): rl.LoReFT(D)}).bind(any_model)


def test_alias_and_canonical_name_are_the_same_place(any_model):
    import reftlens as rl

    batch = texts(architecture_of(any_model))
    torch.manual_seed(4)
    module = rl.LoReFT(D, rank=2)
    by_alias = logits_on(rl.ReFT({rl.Site("blocks.0.hook_resid_post", "last"): module}), any_model, batch)
    by_name = logits_on(rl.ReFT({rl.Site("blocks.0.hook_out", "last"): module}), any_model, batch)
    assert torch.equal(by_alias, by_name)


@pytest.mark.parametrize(
    "first, second",
    [("blocks.0.hook_resid_post", "blocks.0.hook_resid_post"), ("blocks.0.hook_resid_post", "blocks.0.hook_out")],
)
def test_one_place_named_twice_is_refused(llama, first, second):
    import reftlens as rl

    sites = {rl.Site(first, "last"): rl.LoReFT(D)}
    sites[rl.Site(second, "l1")] = rl.LoReFT(D)
    if first == second:
        assert len(sites) == 1  # equal sites are one key
        return
    with pytest.raises(ValueError, match="two sites are one and the same place"):
        rl.ReFT(sites).bind(llama)


SWITCHES = {
    "blocks.1.attn.hook_result": ("set_use_attn_result", 4 * D),
    "blocks.1.hook_q_input": ("set_use_split_qkv_input", 4 * D),
    "blocks.1.hook_mlp_in": ("set_use_hook_mlp_in", D),
    "blocks.1.hook_attn_in": ("set_use_attn_in", 4 * D),
}


@pytest.mark.parametrize("hook", SWITCHES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_hook_behind_a_switch_is_refused_naming_the_switch_and_works_once_it_is_set(architecture, hook):
    import reftlens as rl

    model, (switch, d) = fresh_bridge(architecture), SWITCHES[hook]
    reft = rl.ReFT({rl.Site(hook, "last"): rl.LoReFT(d, rank=2, init="identity")})
    data = texts(architecture)
    for refused in (
        lambda: reft.bind(model),
        lambda: rl.fit(reft, model, data, steps=1, progress=False),
        lambda: rl.generate(reft, model, ["the cat sat"], rl.Decoding(max_new_tokens=1)),
    ):
        with pytest.raises(ValueError, match=rf"{switch}\(True\)"):
            refused()
    assert f"{switch}(True)" in rl.hooks(model, unusable=True)[hook].problem
    getattr(model, switch)(True)
    run = rl.fit(reft, model, data, steps=3, lr=0.02, schedule="constant", progress=False)
    assert run.losses[-1] < run.losses[0]
    plain = rl.generate(None, model, ["the cat sat"], rl.Decoding(max_new_tokens=1), keep_logits=True)
    edited = rl.generate(reft, model, ["the cat sat"], rl.Decoding(max_new_tokens=1), keep_logits=True)
    assert not torch.equal(plain.logits[0], edited.logits[0])


def test_another_width_is_refused_naming_both(any_model):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D + 1)})
    with pytest.raises(ValueError, match=f"width {D}, and its LoReFT was made for d={D + 1}"):
        rl.training.preflight(reft, any_model)
    with pytest.raises(ValueError, match=f"width {D}, and LoReFT was made for d={D + 1}"):
        logits_on(reft, any_model, texts(architecture_of(any_model)))


# -- several sites ------------------------------------------------------------------------------------------------


def test_sites_at_one_hook_act_in_the_order_given(any_model):
    import reftlens as rl

    batch = texts(architecture_of(any_model))
    torch.manual_seed(5)
    set_to, scale = rl.interventions.ConsReFT(D, rank=D), rl.SteeringVector(D, torch.randn(D))
    place, again = rl.resid_post(1, "l1"), rl.resid_post(1, "l2")  # both choose the last prompt token

    def last_hidden(*order):
        reft = rl.ReFT(dict(order))
        hook = "blocks.1.hook_resid_post"
        with torch.no_grad(), reft.on(any_model, batch):
            _, cache = any_model.run_with_cache(
                batch.tokens, attention_mask=batch.attention_mask.long(), names_filter=hook
            )
        return cache[hook][0, int(batch.prompt_mask[0].sum()) - 1]

    constant = set_to.basis().detach() @ set_to.b.detach()  # rank d: the whole vector becomes a constant
    torch.testing.assert_close(
        last_hidden((place, set_to), (again, scale)), constant + scale.vector.detach(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(last_hidden((again, scale), (place, set_to)), constant, atol=1e-5, rtol=0)


def test_tied_sites_share_weights_and_untied_ones_do_not(llama):
    import reftlens as rl

    torch.manual_seed(6)
    shared = rl.LoReFT(D, rank=2)
    tied = rl.ReFT({rl.resid_post(0, "f1"): shared, rl.resid_post(2, "l1"): shared})
    apart = rl.ReFT({rl.resid_post(0, "f1"): rl.LoReFT(D, rank=2), rl.resid_post(2, "l1"): rl.LoReFT(D, rank=2)})
    assert tied[0] is tied[1] is shared and tied.which == (0, 0) and apart.which == (0, 1)
    assert 2 * tied.parameter_count(llama).stored == apart.parameter_count(llama).stored == 2 * (2 * D * 2 + 2)
    for i in (0, 1):
        apart[i].load_state_dict(shared.state_dict())
    batch = texts("llama")
    assert torch.equal(logits_on(tied, llama, batch), logits_on(apart, llama, batch))

    def gradients(reft, of):
        with reft.on(llama, batch):
            logits = llama(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
            return torch.autograd.grad(logits.pow(2).mean(), of)

    (together,) = gradients(tied, [shared.W])
    first, second = gradients(apart, [apart[0].W, apart[1].W])
    torch.testing.assert_close(together, first + second, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(first, second, atol=1e-6)


def test_B13_an_identity_tied_over_layers_carries_nothing_from_one_layer_to_the_other(any_model):
    import reftlens as rl

    architecture = architecture_of(any_model)
    shared = rl.DiReFT(D, rank=2, init="identity")
    reft = rl.ReFT({rl.resid_post(0, "all"): shared, rl.resid_post(1, "all"): shared})
    assert torch.equal(logits_on(reft, any_model, texts(architecture)), base_logits(architecture))


def test_B23_a_token_that_two_selectors_choose_is_edited_once(any_model):
    import reftlens as rl

    batch = rl.encode_prompts(any_model, ["the"])  # with or without BOS shorter than three
    vector = torch.linspace(-1, 1, D)
    twice = rl.ReFT({rl.resid_post(1, "f3+l3"): rl.SteeringVector(D, vector)})
    once = rl.ReFT({rl.resid_post(1, "prompt"): rl.SteeringVector(D, vector)})
    assert torch.equal(logits_on(twice, any_model, batch), logits_on(once, any_model, batch))


def test_a_variant_chooses_among_sites(llama):
    import reftlens as rl

    batch = texts("llama")
    torch.manual_seed(7)
    first, second = rl.LoReFT(D, rank=2), rl.LoReFT(D, rank=2)
    both = rl.ReFT({rl.resid_post(0, "last"): first, rl.resid_post(1, "f1"): second})
    for index, alone in (
        (0, rl.ReFT({rl.resid_post(0, "last"): first})),
        (1, rl.ReFT({rl.resid_post(1, "f1"): second})),
    ):
        chosen = logits_on(both, llama, batch, rl.Variant(sites=[index]))
        assert torch.equal(chosen, logits_on(alone, llama, batch))
    everything = logits_on(both, llama, batch)
    assert torch.equal(logits_on(both, llama, batch, rl.Variant(sites=(1, 0))), everything)  # a choice, not an order
    assert not torch.equal(logits_on(both, llama, batch, rl.Variant(sites=(0,))), everything)
    for wrong in ((), (2,), (-1,), (0, 0)):
        with pytest.raises(ValueError, match="expected one or more of 0 to 1, each of them once"):
            logits_on(both, llama, batch, rl.Variant(sites=wrong))


def test_a_variant_narrows_the_positions(llama):
    import reftlens as rl

    batch = texts("llama")
    torch.manual_seed(8)
    module = rl.LoReFT(D, rank=2)
    reft = rl.ReFT({rl.resid_post(0, "prompt"): module})
    narrow = logits_on(reft, llama, batch, rl.Variant(among="last"))
    assert torch.equal(narrow, logits_on(rl.ReFT({rl.resid_post(0, "last"): module}), llama, batch))
    assert not torch.equal(narrow, logits_on(reft, llama, batch))
    with pytest.raises(ValueError, match=r"among .* chooses no token in any of 3 row"):
        logits_on(reft, llama, batch, rl.Variant(among="response"))


def test_strength_scales_the_edit_as_a_number_and_per_direction(llama):
    import reftlens as rl

    torch.manual_seed(9)
    batch, module = texts("llama"), rl.LoReFT(D, rank=3)
    reft = rl.ReFT({rl.resid_post(2, "all"): module})

    def moved(strength):
        hook = "blocks.2.hook_resid_post"
        with torch.no_grad(), reft.on(llama, batch, rl.Variant(strength=strength)):
            _, cache = llama.run_with_cache(batch.tokens, names_filter=hook)
        return cache[hook][0, :5]

    still, one = moved(0.0), moved(1.0)
    torch.testing.assert_close(moved(-2.0) - still, -2 * (one - still), atol=1e-5, rtol=1e-5)
    each = [moved([float(i == k) for i in range(3)]) - still for k in range(3)]
    torch.testing.assert_close(each[0] + each[1] + each[2], one - still, atol=1e-5, rtol=1e-5)
    for k in range(3):  # the edit of direction k lies along column k of the basis
        along = module.basis()[:, k].detach()
        torch.testing.assert_close(each[k], (each[k] @ along)[:, None] * along, atol=1e-5, rtol=1e-5)
    assert torch.equal(moved([0.0, 0.0, 0.0]), still)
    with pytest.raises(ValueError, match=r"strength has 2 values, and LoReFT .* has rank 3"):
        moved([1.0, 1.0])


# -- silence is refused -------------------------------------------------------------------------------------------


def test_a_site_that_never_fires_raises(any_model):
    import reftlens as rl

    batch = texts(architecture_of(any_model))
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    with pytest.raises(rl.errors.SiteNeverFired, match="nothing was edited there"), reft.on(any_model, batch):
        pass
    with pytest.raises(rl.errors.SiteNeverFired), reft.on(any_model, batch), torch.no_grad():
        any_model(batch.tokens, stop_at_layer=1)


def test_a_hook_that_the_model_never_uses_is_refused_by_generation_too(gpt2):
    import reftlens as rl

    reft = rl.ReFT({rl.Site("blocks.1.attn.qkv.hook_out", "last"): rl.LoReFT(3 * D)})
    with pytest.raises(rl.errors.SiteNeverFired, match=r"blocks\.1\.attn\.qkv\.hook_out"):
        rl.generate(reft, gpt2, ["the cat"], rl.Decoding(max_new_tokens=1))


def test_the_model_run_on_another_batch_is_refused(any_model):
    import reftlens as rl

    batch = texts(architecture_of(any_model))
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    rows, length = batch.tokens.shape
    with (
        pytest.raises(ValueError, match=rf"tokens of shape \[1, 7\], and the batch has \[{rows}, {length}\]"),
        torch.no_grad(),
        reft.on(any_model, batch),
    ):
        any_model(torch.zeros(1, 7, dtype=torch.long))


def test_a_site_that_chooses_no_token_is_refused(llama):
    import reftlens as rl

    batch = rl.encode_prompts(llama, ["the cat", "the dog ran"])
    reft = rl.ReFT({rl.resid_post(1, "response"): rl.LoReFT(D)})
    with pytest.raises(ValueError, match="chooses no token in any of 2 row"):
        logits_on(reft, llama, batch)


def architecture_of(model):
    return next(a for a in ARCHITECTURES if bridge(a) is model)


# -- the oracle: forward hooks of torch on the plain transformers model -------------------------------------------


def patch_plain_model(model, architecture, kind, edit):
    """Let `edit` act at a site of the plain model; heads come as `[batch, seq, head, d_head]`."""
    parts = plain_parts(model, architecture)
    name, heads, _ = KINDS[kind]

    def by_heads(flat):
        split = flat.view(*flat.shape[:2], -1, D_HEAD)
        return edit(split).reshape(flat.shape)

    per_head = by_heads if heads is not None else edit
    if name in ("attn_q", "attn_k", "attn_v"):
        patch_qkv(parts, architecture, name[-1], per_head)
    elif name == "resid_pre":
        before(parts["block"], edit)
    elif name == "resid_mid":
        patch_resid_mid(parts, edit)
    elif name in ("mlp_post", "attn_z"):
        before(parts[name], per_head)
    else:
        after(parts[{"resid_post": "block"}.get(name, name)], edit)


def plain_parts(model, architecture):
    """The modules whose input or output is a site."""
    if architecture == "gpt2":
        block = model.transformer.h[LAYER]
        return {
            "block": block,
            "embeddings": model.transformer.wte,
            "final_norm": model.transformer.ln_f,
            "attn": block.attn,
            "attn_out": block.attn,
            "mlp_out": block.mlp,
            "mlp_post": block.mlp.c_proj,
            "attn_z": block.attn.c_proj,
            "qkv": block.attn.c_attn,
        }
    if architecture == "neox":
        block = model.gpt_neox.layers[LAYER]
        return {
            "block": block,
            "embeddings": model.gpt_neox.embed_in,
            "final_norm": model.gpt_neox.final_layer_norm,
            "attn_out": block.attention,
            "mlp_out": block.mlp,
            "mlp_post": block.mlp.dense_4h_to_h,
            "attn_z": block.attention.dense,
            "qkv": block.attention.query_key_value,
        }
    block = model.model.layers[LAYER]
    gemma = architecture.startswith("gemma")  # adds what its norms after attention and MLP give
    return {
        "block": block,
        "embeddings": model.model.embed_tokens,
        "final_norm": model.model.norm,
        "attn_out": block.post_attention_layernorm if gemma else block.self_attn,
        "mlp_out": block.post_feedforward_layernorm if gemma else block.mlp,
        "mlp_post": block.mlp.down_proj,
        "attn_z": block.self_attn.o_proj,
        "q": block.self_attn.q_proj,
        "k": block.self_attn.k_proj,
        "v": block.self_attn.v_proj,
    }


def after(module, edit):
    def hook(_, args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    module.register_forward_hook(hook)


def before(module, edit):
    def hook(_, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def patch_qkv(parts, architecture, letter, edit):
    if letter in parts:
        return after(parts[letter], edit)
    place = "qkv".index(letter)

    def within(joined):  # gpt2: all queries, all keys, all values; neox: query, key, value of each head in turn
        out = joined.clone()
        if architecture == "gpt2":
            out[..., place * D : (place + 1) * D] = edit(joined[..., place * D : (place + 1) * D])
        else:
            view = out.view(*joined.shape[:2], -1, 3, D_HEAD)
            view[..., place, :] = edit(view[..., place, :].reshape(*joined.shape[:2], D)).view(view[..., 0, :].shape)
        return out

    return after(parts["qkv"], within)


def patch_resid_mid(parts, edit):
    """What enters the block plus what attention adds: changed through what attention adds."""
    seen = {}

    def remember(h):
        seen["resid_pre"] = h
        return h

    before(parts["block"], remember)
    after(parts["attn_out"], lambda added: added + edit(seen["resid_pre"] + added) - (seen["resid_pre"] + added))
