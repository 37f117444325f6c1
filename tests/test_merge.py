"""Merging: a copy of the model with the merged weights computes what the edited bridge does; else it is refused."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import architectures

D = architectures.D
TEXTS = ["the cat sat on the mat and looked at the moon", "a dog ran", "the moon over the green hill"]
SITES = ("attn_out", "mlp_out")


def _kinds():
    """Every affine kind."""
    import reftlens as rl

    def steering(d):
        return rl.SteeringVector(d, torch.randn(d))

    return {
        "LoReFT": lambda d: rl.LoReFT(d, 3),
        "LoReFT dropout": lambda d: rl.LoReFT(d, 3, dropout=0.9),
        "DiReFT": lambda d: _scaled(rl.DiReFT(d, 3)),
        "OrthoDiReFT": lambda d: rl.interventions.OrthoDiReFT(d, 3),
        "NoReFT": lambda d: _scaled(rl.interventions.NoReFT(d, 3)),
        "ConsReFT": lambda d: rl.interventions.ConsReFT(d, 3),
        "LobiReFT": lambda d: rl.interventions.LobiReFT(d, 3),
        "RED": lambda d: _spread(rl.interventions.RED(d)),
        "SteeringVector": steering,
        "Ablation zero": lambda d: rl.Ablation(d),
        "Ablation mean": lambda d: rl.Ablation(d, torch.randn(d)),
        "Ablation subspace": lambda d: rl.Ablation(d, torch.randn(d), torch.randn(d, 2)),
        "Noise": lambda d: rl.interventions.Noise(d, 0.5),
        "Gated": lambda d: rl.interventions.Gated(steering(d), rl.interventions.HardConcrete(start=0.3)),
    }


KINDS = (
    "LoReFT",
    "LoReFT dropout",
    "DiReFT",
    "OrthoDiReFT",
    "NoReFT",
    "ConsReFT",
    "LobiReFT",
    "RED",
    "SteeringVector",
    "Ablation zero",
    "Ablation mean",
    "Ablation subspace",
    "Noise",
    "Gated",
)
WITHOUT_CONSTANT = ("LoReFT", "DiReFT", "OrthoDiReFT", "NoReFT", "Ablation zero")


@torch.no_grad()
def _spread(module):
    """Away from a start that does nothing."""
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


@torch.no_grad()
def _scaled(module):
    """Free bases start small: make the edit large enough to be seen."""
    for parameter in module.parameters():
        parameter.mul_(4)
    return module


@torch.no_grad()
def _without_constant(module):
    if hasattr(module, "b"):
        module.b.zero_()
    return module


def test_the_table_of_this_file_has_every_kind_that_can_be_affine():
    from reftlens.interventions import KINDS as ALL

    made = [make(D) for make in _kinds().values()]
    assert (
        tuple(_kinds()) == KINDS
        and all(m.affine for m in made)
        and {m.kind for m in made} == {k for k, c in ALL.items() if not c.variables and not c.pools} - {"Head"}
    )  # a head changes no hidden state, and what it scores no weights can hold


def _batch(model):
    import reftlens as rl

    return rl.encode_prompts(model, TEXTS)


@torch.no_grad()
def _edited(reft, model, batch, strength=1.0):
    import reftlens as rl

    reft = reft.clone().eval()
    with reft.on(model, batch, rl.Variant(strength=strength)):
        return model(batch.tokens, attention_mask=batch.attention_mask.long())[batch.attention_mask]


@torch.no_grad()
def _merged(reft, model, architecture, batch, dtype=torch.float32, **kwargs):
    """Logits of a plain copy, built anew, that took the merged weights."""
    import reftlens as rl

    copy = architectures.hf_model(architecture).to(dtype)
    copy.set_attn_implementation("eager")
    weights = rl.storage.merged_weights(reft, model, **kwargs)
    told = copy.load_state_dict(weights, strict=False)
    assert not told.unexpected_keys and weights
    return copy(batch.tokens, attention_mask=batch.attention_mask.long()).logits[batch.attention_mask]


@torch.no_grad()
def _base(model, batch):
    return model(batch.tokens, attention_mask=batch.attention_mask.long())[batch.attention_mask]


# -- exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_gpt2_every_affine_kind_merges_exactly_in_float64(gpt2_double, kind, site, strength):
    import reftlens as rl

    batch = _batch(gpt2_double)
    reft = rl.ReFT({getattr(rl, site)(1, "all"): _kinds()[kind](D)})
    edited = _edited(reft, gpt2_double, batch, strength)
    merged = _merged(reft, gpt2_double, "gpt2", batch, torch.float64, strength=strength)
    # float64: x (W M) and (x W) M round differently
    assert (merged - edited).abs().max() < 1e-10
    assert (edited - _base(gpt2_double, batch)).abs().max() > 1e-2


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", WITHOUT_CONSTANT)
def test_on_llama_which_has_no_biases_every_linear_kind_merges(llama, kind, site, strength):
    import reftlens as rl

    batch = _batch(llama)
    reft = rl.ReFT({getattr(rl, site)(1, "all"): _without_constant(_kinds()[kind](D))})
    edited = _edited(reft, llama, batch, strength)
    # float32: the merged weights are rounded once, and sums run in another order
    assert (_merged(reft, llama, "llama", batch, strength=strength) - edited).abs().max() < 1e-5
    assert (edited - _base(llama, batch)).abs().max() > 1e-2


PLACES = [(a, s) for a in ("gpt2", "neox", "qwen2", "llama") for s in ("hook_attn_out", "hook_mlp_out")]
PLACES += [(a, s) for a in ("gemma2", "gemma3") for s in ("attn.hook_out", "mlp.hook_out")]  # before their post-norms


@pytest.mark.parametrize("architecture, hook", PLACES)
def test_on_every_architecture_a_linear_edit_merges_at_every_layer(architecture, hook):
    """neox computes attention and MLP in parallel: each still has a linear layer of its own at the end."""
    import reftlens as rl

    model = architectures.bridge(architecture, torch.float64)
    batch = _batch(model)
    reft = rl.ReFT(
        {
            rl.Site(f"blocks.{layer}.{hook}", "all"): _without_constant(rl.LoReFT(D, 4))
            for layer in range(architectures.LAYERS)
        }
    )
    edited = _edited(reft, model, batch)
    copy = architectures.hf_model(architecture).double()
    copy.load_state_dict(rl.storage.merged_weights(reft, model), strict=False)
    bridge = TransformerBridge.boot_transformers(
        architectures.NAMES[architecture],
        hf_model=copy,
        tokenizer=architectures.tokenizer(),
        device="cpu",
        dtype=torch.float64,
    )
    assert (_base(bridge, batch) - edited).abs().max() < 1e-10  # as above
    assert (edited - _base(model, batch)).abs().max() > 1e-2
    # Even unedited, the bridge of neox in float64 is 3e-7 off the plain model: it attends in float32.
    tolerance = 1e-6 if architecture == "neox" else 1e-10
    assert (_merged(reft, model, architecture, batch, torch.float64) - edited).abs().max() < tolerance


def test_two_edits_of_one_layer_merge_in_their_order(gpt2_double):
    import reftlens as rl

    batch = _batch(gpt2_double)
    site = rl.mlp_out(1, "all")
    first, second = rl.Ablation(D, torch.randn(D), torch.randn(D, 5)), rl.LoReFT(D, 5)
    logits = []
    # Two edits at one and the same place are refused, so the second one has the layer's own name for it.
    for modules in ((first, second), (second, first)):
        reft = rl.ReFT({rl.Site("blocks.1.mlp.out.hook_out", "all"): modules[0], site: modules[1]})
        edited = _edited(reft, gpt2_double, batch)
        assert (_merged(reft, gpt2_double, "gpt2", batch, torch.float64) - edited).abs().max() < 1e-10  # as above
        logits.append(edited)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("block, layer", [("attn", "attn.o"), ("mlp", "mlp.out")])
def test_the_order_is_that_of_the_model_and_not_that_of_the_list(gpt2_double, block, layer):
    import reftlens as rl

    batch = _batch(gpt2_double)
    inner, outer = rl.Ablation(D, torch.randn(D), torch.randn(D, 5)), rl.LoReFT(D, 5)
    places = {rl.Site(f"blocks.1.{block}.hook_out", "all"): outer, rl.Site(f"blocks.1.{layer}.hook_out", "all"): inner}
    turned = dict(reversed(list(places.items())))
    edited = _edited(rl.ReFT(places), gpt2_double, batch)
    assert torch.equal(edited, _edited(rl.ReFT(turned), gpt2_double, batch))
    for order in (places, turned):
        merged = _merged(rl.ReFT(order), gpt2_double, "gpt2", batch, torch.float64)
        assert (merged - edited).abs().max() < 1e-10  # as above


def test_several_layers_and_a_tied_intervention_merge_together(gpt2_double):
    import reftlens as rl

    batch, tied = _batch(gpt2_double), rl.LoReFT(D, 2)
    reft = rl.ReFT(
        {
            rl.mlp_out(0, "all"): tied,
            rl.attn_out(2, "all"): tied,
            rl.attn_out(0, "all"): rl.interventions.LobiReFT(D, 1),
        }
    )
    weights = rl.storage.merged_weights(reft, gpt2_double)
    layers = ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.2.attn.c_proj")
    assert sorted(weights) == [f"{layer}.{name}" for layer in layers for name in ("bias", "weight")]
    merged = _merged(reft, gpt2_double, "gpt2", batch, torch.float64)
    assert (merged - _edited(reft, gpt2_double, batch)).abs().max() < 1e-10  # as above


def test_strength_zero_gives_the_weights_back():
    import reftlens as rl

    model, plain = architectures.bridge("llama"), architectures.hf_model("llama")
    weights = rl.storage.merged_weights(rl.ReFT({rl.mlp_out(1, "all"): rl.LoReFT(D, 3)}), model, strength=0.0)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in weights.items())


def test_the_identity_start_gives_the_weights_back():
    import reftlens as rl

    model, plain = architectures.bridge("llama"), architectures.hf_model("llama")
    weights = rl.storage.merged_weights(rl.ReFT({rl.mlp_out(1, "all"): rl.LoReFT(D, 3, init="identity")}), model)
    # float32 weights times a matrix that is the identity to rounding in float64
    assert all((value - plain.state_dict()[name]).abs().max() < 1e-6 for name, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_merged_weights_have_the_dtype_of_the_model_and_are_rounded_once(dtype):
    import reftlens as rl

    model, exact = architectures.bridge("gpt2", dtype), architectures.bridge("gpt2", torch.float64)
    reft = rl.ReFT({rl.mlp_out(1, "all"): rl.LoReFT(D, 3)})
    weights = rl.storage.merged_weights(reft, model)
    assert {w.dtype for w in weights.values()} == {dtype}
    if dtype == torch.float32:
        wanted = rl.storage.merged_weights(reft, exact)
        assert all(torch.equal(w, wanted[name].float()) for name, w in weights.items())


def test_the_merged_model_generates_what_the_edited_one_does(gpt2):
    import reftlens as rl

    reft = rl.ReFT({rl.mlp_out(1, "all"): rl.LoReFT(D, 8)}).eval()
    batch = rl.encode_prompts(gpt2, TEXTS[:1])
    ours, base = (rl.generate(r, gpt2, batch, rl.Decoding(max_new_tokens=8)).ids[0] for r in (reft, None))
    copy = architectures.hf_model("gpt2")
    copy.load_state_dict(rl.storage.merged_weights(reft, gpt2), strict=False)
    theirs = copy.generate(batch.tokens, max_new_tokens=8, do_sample=False, pad_token_id=2)[0, batch.tokens.shape[1] :]
    assert theirs.tolist()[: len(ours)] == list(ours) != list(base)


# -- nothing else changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_users_model_and_intervention_stay_as_they_are(architecture):
    import reftlens as rl

    model = architectures.fresh_bridge(architecture)
    reft = rl.ReFT({rl.mlp_out(1, "all"): _without_constant(rl.LoReFT(D, 3, dropout=0.5))}).train()
    before = {n: p.clone() for n, p in model.original_model.named_parameters()}
    hooks = sum(len(p.fwd_hooks) for p in model.hook_dict.values())
    kept = {n: t.clone() for n, t in reft.state_dict().items()}
    weights = rl.storage.merged_weights(reft, model)
    assert all(torch.equal(p, before[n]) for n, p in model.original_model.named_parameters())
    assert all(torch.equal(t, kept[n]) for n, t in reft.state_dict().items())
    assert reft.training and reft[0].training and reft[0].dropout.training
    assert sum(len(p.fwd_hooks) for p in model.hook_dict.values()) == hooks
    assert not {w.data_ptr() for w in weights.values()} & {p.data_ptr() for p in model.original_model.parameters()}


# -- what is refused -----------------------------------------------------------------------------------------


def _refused(site, module, model, match):
    import reftlens as rl

    with pytest.raises(ValueError, match=match):
        rl.storage.merged_weights(rl.ReFT({site: module}), model)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_the_residual_stream_is_refused(architecture, site):
    import reftlens as rl

    model = architectures.bridge(architecture)
    _refused(getattr(rl, site)(1, "all"), rl.LoReFT(D, 2), model, "is not the output of a linear layer")


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_outputs_after_a_norm_are_refused(architecture, site):
    """There hook_attn_out and hook_mlp_out are what a norm after the linear layer gives."""
    import reftlens as rl

    model = architectures.bridge(architecture)
    hook = model.hook_dict[f"blocks.1.hook_{site}"].name
    assert "post" in hook
    _refused(getattr(rl, site)(1, "all"), rl.LoReFT(D, 2), model, f"{hook} is not the output of a linear layer")


@pytest.mark.parametrize(
    "site, width",
    [
        ("mlp_post", architectures.D_MLP),
        ("attn_z", D),
        ("attn_q", D),
        ("attn_v", D),
        ("embeddings", D),
        ("final_norm", D),
    ],
)
def test_neurons_heads_embeddings_and_norms_are_refused(gpt2, site, width):
    import reftlens as rl

    make = getattr(rl, site)
    place = make("all") if site in ("embeddings", "final_norm") else make(1, "all")
    _refused(place, rl.LoReFT(width, 2), gpt2, "is not the output of a linear layer")


@pytest.mark.parametrize("positions", ["last", "first", "prompt", "response", "f1+all"])
def test_positions_other_than_all_are_refused(gpt2, positions):
    import reftlens as rl

    _refused(rl.mlp_out(1, positions), rl.LoReFT(D, 2), gpt2, r"weights act at every token: use All\(\)")


@pytest.mark.parametrize("kind", ["LoReFT", "DiReFT", "OrthoDiReFT", "NoReFT"])
def test_an_activation_function_is_refused(gpt2, kind):
    import reftlens as rl

    module = getattr(rl.interventions, kind)(D, 2, activation="relu")
    _refused(rl.mlp_out(1, "all"), module, gpt2, f"{kind} at blocks.1.mlp.hook_out is not affine")


def test_a_class_that_wrongly_says_it_is_affine_is_refused(gpt2):
    import reftlens as rl

    class Wrong(rl.DiReFT):
        kind = "Wrong"

        def code(self, h, basis):
            return super().code(h, basis).tanh()

    module = Wrong(D, 2)
    assert module.affine
    _refused(rl.mlp_out(1, "all"), module, gpt2, "says that it is affine in h, and it is not")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "Ablation zero"])
def test_a_constant_for_a_layer_without_bias_is_refused(llama, kind):
    import reftlens as rl

    _refused(rl.mlp_out(1, "all"), _kinds()[kind](D), llama, "model.layers.1.mlp.down_proj has no bias")


def test_processed_weights_are_refused():
    import reftlens as rl

    model = architectures.fresh_bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    _refused(rl.mlp_out(1, "all"), rl.LoReFT(D, 2), model, "compatibility mode")


def test_one_site_that_cannot_be_merged_refuses_all(gpt2):
    import reftlens as rl

    sites = {rl.mlp_out(1, "all"): rl.LoReFT(D, 2), rl.resid_post(1, "all"): rl.LoReFT(D, 2)}
    with pytest.raises(ValueError, match=r"blocks.1.hook_out is not the output"):
        rl.storage.merged_weights(rl.ReFT(sites), gpt2)
