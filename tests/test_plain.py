"""Without the bridge: a plain transformers model edited by `attach` computes what the edited bridge does."""

from functools import cache

import pytest
import torch

import architectures

D = architectures.D
TEXTS = ["the cat sat on the mat and looked at the moon", "a dog ran", "the moon over the green hill"]


@pytest.fixture(params=architectures.ARCHITECTURES)
def pair(request):
    """The bridge, and a plain model with the same weights."""
    return architectures.bridge(request.param), _plain(request.param)


@cache
def _plain(architecture, dtype=torch.float32):
    """A plain model that attends as the bridge does (eager), so that only the place of the edit could differ."""
    return _fresh(architecture, dtype)


def _fresh(architecture, dtype=torch.float32):
    model = architectures.hf_model(architecture).to(dtype)
    model.set_attn_implementation("eager")
    return model


def _reft(positions="f2+l1", **kwargs):
    """Sites before and after blocks, two of them at one hook, one of them tied."""
    import reftlens as rl

    tied = rl.LoReFT(D, 3, **kwargs)
    return rl.ReFT(
        {
            rl.resid_pre(0, positions): tied,
            rl.resid_post(1, positions): rl.DiReFT(D, 2),
            rl.Site("blocks.1.hook_out", "all"): rl.SteeringVector(D, 0.1 * torch.ones(D)),
            rl.resid_pre(2, "last"): rl.Ablation(D, torch.ones(D), torch.randn(D, 2)),
            rl.resid_post(2, positions): tied,
        }
    ).eval()


def _batch(model, texts=TEXTS):
    import reftlens as rl

    return rl.encode_prompts(model, texts)


@torch.no_grad()
def _bridge_logits(reft, model, batch, **kwargs):
    with reft.on(model, batch, **kwargs):
        return model(batch.tokens, attention_mask=batch.attention_mask.long())


@torch.no_grad()
def _plain_logits(reft, model, batch, tokens=None, mask=None, **kwargs):
    import reftlens as rl

    tokens = batch.tokens if tokens is None else tokens
    mask = batch.attention_mask.long() if mask is None else mask
    with rl.attach(reft, model, batch=batch, **kwargs):
        return model(tokens, attention_mask=mask).logits


def _base(model, batch):
    with torch.no_grad():
        return model(batch.tokens, attention_mask=batch.attention_mask.long()).logits


def _hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- equal to the bridge -------------------------------------------------------------------------------------


def test_logits_equal_those_of_the_edited_bridge(pair):
    bridge, plain = pair
    batch, reft = _batch(bridge), _reft()
    real = batch.attention_mask
    edited = _plain_logits(reft, plain, batch)
    # float32: the bridge runs the same blocks, and may sum in another order
    assert (edited - _bridge_logits(reft, bridge, batch))[real].abs().max() < 1e-5
    assert (edited - _base(plain, batch))[real].abs().max() > 1e-2


def test_logits_equal_those_of_the_edited_bridge_in_float64_to_rounding():
    bridge, plain = architectures.bridge("gpt2", torch.float64), _plain("gpt2", torch.float64)
    batch, reft = _batch(bridge), _reft().double()
    assert (_plain_logits(reft, plain, batch) - _bridge_logits(reft, bridge, batch)).abs().max() < 1e-12


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("layer", range(architectures.LAYERS))
def test_every_single_site_is_where_the_bridge_has_it(pair, site, layer):
    import reftlens as rl

    bridge, plain = pair
    batch = _batch(bridge)
    reft = rl.ReFT({getattr(rl, site)(layer, "last"): rl.LoReFT(D, 4)}).eval()
    edited = _plain_logits(reft, plain, batch)
    # float32, as above
    assert (edited - _bridge_logits(reft, bridge, batch))[batch.attention_mask].abs().max() < 1e-5
    assert (edited - _base(plain, batch))[batch.attention_mask].abs().max() > 1e-3


def test_an_exchange_takes_from_its_source_what_it_takes_on_the_bridge(pair):
    import reftlens as rl

    bridge, plain = pair
    batch = _batch(bridge).with_sources(_batch(bridge, ["a dog ran by the mat", "the cat", "the green moon"]))
    das = rl.DAS(D, rank=3)
    das.reset(torch.Generator().manual_seed(0))
    reft = rl.ReFT({rl.resid_post(0, "last"): das, rl.resid_pre(2, "f1"): rl.Interchange(D)}).eval()
    edited, real = _plain_logits(reft, plain, batch), batch.attention_mask
    # float32, as above
    assert (edited - _bridge_logits(reft, bridge, batch))[real].abs().max() < 1e-5
    assert (edited - _base(plain, batch))[real].abs().max() > 1e-3


def test_an_exchange_at_strength_zero_wants_no_source_and_else_its_source_is_asked_for():
    import reftlens as rl

    bridge, plain = architectures.bridge("llama"), _plain("llama")
    batch, reft = _batch(bridge), rl.ReFT({rl.resid_post(0, "last"): rl.DAS(D, rank=3)}).eval()
    assert torch.equal(_plain_logits(reft, plain, batch, variant=rl.Variant(0)), _base(plain, batch))
    with pytest.raises(ValueError, match="the data has no such source"):
        _plain_logits(reft, plain, batch)
    nested = batch.with_sources(batch.with_sources(batch))
    with pytest.raises(ValueError, match="a source has sources itself"):
        _plain_logits(reft, plain, nested)
    assert _hook_count(plain) == 0


VARIANTS = [{"strength": 0.5}, {"strength": -1.0}, {"sites": [1, 3]}, {"among": "first"}, {"strength": 2, "sites": [4]}]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_variants_mean_what_they_mean_on_the_bridge(settings):
    import reftlens as rl

    bridge, plain = architectures.bridge("llama"), _plain("llama")
    batch, variant = _batch(bridge), rl.Variant(**settings)
    reft = _reft("f2") if "among" in settings else _reft()
    if "among" in settings:
        reft = rl.ReFT({site: module for site, module in reft.items() if site.positions != rl.positions.Last()})
    edited = _plain_logits(reft, plain, batch, variant=variant)
    difference = edited - _bridge_logits(reft, bridge, batch, variant=variant)
    assert difference[batch.attention_mask].abs().max() < 1e-5  # float32, as above
    assert (edited - _plain_logits(reft, plain, batch))[batch.attention_mask].abs().max() > 1e-3


def test_one_strength_per_direction_means_what_it_means_on_the_bridge():
    import reftlens as rl

    bridge, plain = architectures.bridge("gpt2"), _plain("gpt2")
    batch, variant = _batch(bridge), rl.Variant(strength=[0.5, 0.0, -1.0])
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 3)}).eval()
    edited = _plain_logits(reft, plain, batch, variant=variant)
    assert (edited - _bridge_logits(reft, bridge, batch, variant=variant)).abs().max() < 1e-5  # float32, as above
    with pytest.raises(ValueError, match="strength has 2 values"):
        _plain_logits(reft, plain, batch, variant=rl.Variant(strength=[1.0, 1.0]))


def test_strength_zero_is_the_model_itself_bit_for_bit(pair):
    import reftlens as rl

    batch = _batch(pair[0])
    assert torch.equal(_plain_logits(_reft(), pair[1], batch, variant=rl.Variant(strength=0)), _base(pair[1], batch))


def test_a_bf16_model_gets_the_edit_in_float32_arithmetic_as_on_the_bridge():
    import reftlens as rl

    bridge, plain = architectures.bridge("llama", torch.bfloat16), _plain("llama", torch.bfloat16)
    batch = _batch(bridge, TEXTS[:1])
    reft = rl.ReFT({rl.resid_post(2, "last"): rl.LoReFT(D, 4)}).eval()
    assert _plain_logits(reft, plain, batch).dtype == torch.bfloat16
    difference = _plain_logits(reft, plain, batch) - _bridge_logits(reft, bridge, batch)
    # bfloat16 keeps 8 bits: one unit in the last place of logits below 8 is 2**-5
    assert difference.abs().max() <= 2**-5


# -- padding -------------------------------------------------------------------------------------------------


def _left_padded(batch):
    """The rows of the batch with their padding on the left."""
    width, lengths = batch.tokens.shape[1], batch.attention_mask.sum(dim=1).tolist()
    tokens, mask = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens)
    for i, n in enumerate(lengths):
        tokens[i, width - n :], mask[i, width - n :] = batch.tokens[i, :n], 1
    return tokens, mask


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_padding_on_the_left_edits_the_same_tokens(architecture):
    bridge, plain = architectures.bridge(architecture), _plain(architecture)
    batch, reft = _batch(bridge), _reft()
    tokens, mask = _left_padded(batch)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    import reftlens as rl

    with torch.no_grad(), rl.attach(reft, plain, batch=batch):
        left = plain(tokens, attention_mask=mask, position_ids=position).logits
    # float32: other columns of padding change the order of summation
    assert (left[mask.bool()] - _plain_logits(reft, plain, batch)[batch.attention_mask]).abs().max() < 1e-5


def test_a_row_alone_is_edited_as_in_the_batch():
    bridge, plain = architectures.bridge("gpt2"), _plain("gpt2")
    reft, batch = _reft(), _batch(bridge)
    together = _plain_logits(reft, plain, batch)
    for i, text in enumerate(TEXTS):
        alone = _plain_logits(reft, plain, _batch(bridge, [text]))[0]
        assert (together[i, : len(alone)] - alone).abs().max() < 1e-5  # float32: rows of other lengths beside it


def test_without_an_attention_mask_the_tokens_lie_as_in_the_batch():
    import reftlens as rl

    plain, batch, reft = _plain("llama"), _batch(architectures.bridge("llama")), _reft()
    with torch.no_grad(), rl.attach(reft, plain, batch=batch):
        logits = plain(batch.tokens).logits
    # float32: unmasked padding on the right is not attended to by what is left of it
    assert (logits - _plain_logits(reft, plain, batch))[batch.attention_mask].abs().max() < 1e-5


def test_other_tokens_than_those_of_the_batch_are_refused():
    plain, bridge = _plain("gpt2"), architectures.bridge("gpt2")
    batch, reft = _batch(bridge), _reft()
    with pytest.raises(ValueError, match=r"called on \[.*\] tokens per row, and the batch has"):
        _plain_logits(reft, plain, batch, tokens=batch.tokens[:, :-1], mask=batch.attention_mask[:, :-1].long())
    with pytest.raises(ValueError, match="tokens per row"):
        _plain_logits(reft, plain, batch, mask=torch.ones_like(batch.tokens))
    with pytest.raises(ValueError, match=r"pass \[batch, seq\]"):
        length = batch.tokens.shape[1]
        _plain_logits(reft, plain, batch, mask=torch.zeros(len(TEXTS), 1, length, length))


# -- generation ----------------------------------------------------------------------------------------------


def _generate(model, tokens, mask, new):
    return model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=2)


def test_generate_with_edits_on_the_prompt_is_the_greedy_generation_of_reftlens(pair):
    import reftlens as rl

    bridge, plain = pair
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D, 4), rl.resid_pre(2, "f2"): rl.DiReFT(D, 4)}).eval()
    for text in TEXTS:
        batch = _batch(bridge, [text])
        ours = rl.generate(reft, bridge, batch, rl.Decoding(max_new_tokens=8))
        with rl.attach(reft, plain, batch=batch):
            theirs = _generate(plain, batch.tokens, batch.attention_mask.long(), 8)
        assert theirs[0, batch.tokens.shape[1] :].tolist()[: len(ours.ids[0])] == list(ours.ids[0])


def test_generate_with_a_left_padded_batch_equals_each_prompt_alone(pair):
    import reftlens as rl

    bridge, plain = pair
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D, 4)}).eval()
    batch = _batch(bridge)
    ours = rl.generate(reft, bridge, batch, rl.Decoding(max_new_tokens=6))
    base = rl.generate(None, bridge, batch, rl.Decoding(max_new_tokens=6))
    tokens, mask = _left_padded(batch)
    with rl.attach(reft, plain, batch=batch):
        theirs = _generate(plain, tokens, mask, 6)[:, tokens.shape[1] :].tolist()
    for i, ids in enumerate(ours.ids):
        assert theirs[i][: len(ids)] == list(ids)
    assert ours.ids != base.ids


def test_a_prompt_of_one_token_is_edited_once_and_not_at_every_step():
    """Later steps have the shape of such a prompt; what tells them apart is the cache."""
    import reftlens as rl

    bridge, plain = architectures.bridge("llama"), _plain("llama")
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.SteeringVector(D, 3 * torch.randn(D))}).eval()
    batch = _batch(bridge, ["<bos>"])
    assert batch.tokens.shape[1] == 1
    ours = rl.generate(reft, bridge, batch, rl.Decoding(max_new_tokens=6)).ids[0]
    with rl.attach(reft, plain, batch=batch):
        theirs = _generate(plain, batch.tokens, batch.attention_mask.long(), 6)[0, 1:].tolist()
    always = rl.ReFT({rl.resid_post(1, "last+generated"): reft[0]})
    assert (
        theirs[: len(ours)]
        == list(ours)
        != list(rl.generate(always, bridge, batch, rl.Decoding(max_new_tokens=6)).ids[0])
    )


def test_narrowed_to_the_prompt_by_a_variant_such_positions_generate():
    import reftlens as rl

    plain, bridge = _plain("gpt2"), architectures.bridge("gpt2")
    batch = _batch(bridge, TEXTS[:1])
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(D, 2)}).eval()
    variant = rl.Variant(among="prompt")
    ours = rl.generate(reft, bridge, batch, rl.Decoding(max_new_tokens=5), variant=variant).ids[0]
    with rl.attach(reft, plain, variant, batch=batch):
        theirs = _generate(plain, batch.tokens, batch.attention_mask.long(), 5)[0, batch.tokens.shape[1] :].tolist()
    assert theirs[: len(ours)] == list(ours)


# -- whose hooks, whose model --------------------------------------------------------------------------------


def test_hooks_are_gone_afterwards_and_those_of_the_user_stay():
    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    fired = []
    handle = plain.transformer.h[1].register_forward_hook(lambda *a: fired.append(1))
    before = _base(plain, batch)
    _plain_logits(_reft(), plain, batch)
    assert torch.equal(_base(plain, batch), before) and len(fired) == 3
    assert _hook_count(plain) == 1
    handle.remove()
    assert _hook_count(plain) == 0


def test_hooks_are_gone_after_an_exception_inside_the_block():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    before = _base(plain, batch)
    with pytest.raises(ZeroDivisionError), rl.attach(_reft(), plain, batch=batch):
        plain(batch.tokens)
        _ = 1 / 0
    assert _hook_count(plain) == 0 and torch.equal(_base(plain, batch), before)


def test_hooks_are_gone_after_a_refusal_of_a_later_site():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D, 2), rl.mlp_out(1, "last"): rl.LoReFT(D, 2)})
    with pytest.raises(ValueError, match="not the residual stream"), rl.attach(reft, plain, batch=batch):
        pass
    assert _hook_count(plain) == 0
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D, 2), rl.resid_post(9, "last"): rl.LoReFT(D, 2)})
    with pytest.raises(ValueError, match="blocks 0 to 2"), rl.attach(reft, plain, batch=batch):
        pass
    assert _hook_count(plain) == 0


def test_heads_are_denied_where_there_are_none_and_where_there_are_it_is_the_site_that_is_refused():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    for site, width, answer in (
        (
            rl.attn_z(1, "last", heads=[0, 2]),
            16,
            r"hook_z heads \[0, 2\] at .* is not the residual stream .*reft\.on\(",
        ),
        (rl.attn_z(1, "last"), D, r"hook_z at .* is not the residual stream .*resid_pre, resid_post"),
        (rl.attn_k(1, "last", heads=1), 8, r"hook_k heads \[1\] at .* is not the residual stream"),
        (rl.Site("blocks.1.hook_resid_post", "last", heads=[0]), D, r"hook_resid_post has no heads: drop heads=\[0\]"),
    ):
        reft = rl.ReFT({site: rl.LoReFT(width, 2)})
        with pytest.raises(ValueError, match=answer) as error, rl.attach(reft, plain, batch=batch):
            pass
        assert ("no heads" in str(error.value)) == site.hook.endswith("resid_post")


def test_the_model_and_its_flags_stay_as_they_are():
    plain, batch = _fresh("gpt2"), _batch(architectures.bridge("gpt2"))
    plain.train()
    next(plain.parameters()).requires_grad_(False)
    weights = {n: p.clone() for n, p in plain.named_parameters()}
    flags = [p.requires_grad for p in plain.parameters()]
    _plain_logits(_reft(), plain, batch)
    assert plain.training and [p.requires_grad for p in plain.parameters()] == flags
    assert all(torch.equal(p, weights[n]) for n, p in plain.named_parameters())


def test_gradients_reach_the_intervention():
    import reftlens as rl

    plain, batch = _plain("llama"), _batch(architectures.bridge("llama"))
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 2)})
    with rl.attach(reft, plain, batch=batch):
        plain(batch.tokens, attention_mask=batch.attention_mask.long()).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in reft.parameters())


# -- what is refused -----------------------------------------------------------------------------------------


def test_a_site_off_the_residual_stream_is_refused_by_name():
    import reftlens as rl

    plain, batch = _plain("llama"), _batch(architectures.bridge("llama"))
    for site in (rl.mlp_out(1, "last"), rl.attn_out(1, "last"), rl.resid_mid(1, "last"), rl.embeddings("last")):
        reft = rl.ReFT({site: rl.LoReFT(D, 2)})
        with pytest.raises(ValueError, match=f"{site.hook} at .* is not the residual stream"):
            _plain_logits(reft, plain, batch)


def test_a_layer_that_does_not_exist_is_refused():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    reft = rl.ReFT({rl.resid_post(3, "last"): rl.LoReFT(D, 2)})
    with pytest.raises(ValueError, match=r"blocks.3.hook_resid_post: this model has blocks 0 to 2"):
        _plain_logits(reft, plain, batch)


def test_another_width_is_refused():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    with pytest.raises(ValueError, match=r"width 32.*d=16"):
        _plain_logits(rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(16, 2)}), plain, batch)


def test_a_site_of_the_prompt_that_chooses_no_token_is_refused_and_another_is_named_at_the_end():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    nowhere = rl.positions.Tokens("zebra", missing="skip")
    with pytest.raises(ValueError, match="chooses no token"):
        _plain_logits(rl.ReFT({rl.resid_post(1, nowhere): rl.LoReFT(D, 2)}), plain, batch)
    with pytest.warns(UserWarning, match=r"chose no token in 1 call\(s\)"):
        logits = _plain_logits(rl.ReFT({rl.resid_post(1, "response"): rl.LoReFT(D, 2)}), plain, batch)
    assert torch.equal(logits, _base(plain, batch))


@pytest.mark.parametrize("sites", [[], [5], [-1], [0, 0]], ids=str)
def test_a_variant_of_sites_that_do_not_exist_is_refused(sites):
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    with pytest.raises(ValueError, match="sites="):
        _plain_logits(_reft(), plain, batch, variant=rl.Variant(sites=sites))


def test_a_block_in_which_nothing_ran_is_an_error():
    import reftlens as rl

    plain, batch = _plain("gpt2"), _batch(architectures.bridge("gpt2"))
    with (
        pytest.raises(RuntimeError, match=r"no hidden state passed through blocks.0.hook_resid_pre"),
        rl.attach(_reft(), plain, batch=batch),
    ):
        pass


def test_a_bridge_is_refused_with_the_way_out(gpt2):
    import reftlens as rl

    with pytest.raises(ValueError, match=r"use reft.on"), rl.attach(_reft(), gpt2, batch=_batch(gpt2)):
        pass


def test_a_model_without_blocks_is_refused():
    import reftlens as rl

    batch = _batch(architectures.bridge("gpt2"))
    with (
        pytest.raises(ValueError, match="cannot find the blocks of Linear"),
        rl.attach(_reft(), torch.nn.Linear(2, 2), batch=batch),
    ):
        pass


# -- the store -----------------------------------------------------------------------------------------------


def test_what_was_saved_with_a_bridge_is_loaded_with_the_plain_model(pair, tmp_path):
    import reftlens as rl

    bridge, plain = pair
    batch, reft = _batch(bridge), _reft()
    again = rl.load(rl.save(reft, tmp_path, bridge), plain)
    assert torch.equal(_plain_logits(again, plain, batch), _plain_logits(reft, plain, batch))


def test_what_was_saved_with_the_plain_model_is_loaded_with_a_bridge(pair, tmp_path):
    import reftlens as rl

    bridge, plain = pair
    batch, reft = _batch(bridge), _reft()
    again = rl.load(rl.save(reft, tmp_path, plain), bridge)
    assert torch.equal(_bridge_logits(again, bridge, batch), _bridge_logits(reft, bridge, batch))


def test_another_plain_checkpoint_is_refused(tmp_path):
    import reftlens as rl

    rl.save(_reft(), tmp_path, architectures.bridge("gpt2"))
    with pytest.raises(rl.errors.StoreMismatch, match="weights are others"):
        rl.load(tmp_path, architectures.hf_model("gpt2", seed=1))
    with pytest.raises(rl.errors.StoreMismatch, match="model_type was 'gpt2' and is 'llama'"):
        rl.load(tmp_path, architectures.hf_model("llama"))


def test_a_processed_bridge_and_the_plain_model_are_two_models(tmp_path):
    import reftlens as rl

    processed = architectures.fresh_bridge("gpt2")
    processed.enable_compatibility_mode(disable_warnings=True)
    rl.save(rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 2)}), tmp_path, processed)
    with pytest.raises(rl.errors.StoreMismatch, match="compatibility mode on"):
        rl.load(tmp_path, architectures.hf_model("gpt2"))
