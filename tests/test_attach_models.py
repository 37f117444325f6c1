"""Attaching and detaching: the model is as it was afterwards, and no copy of it is edited in part."""

import copy
import pickle

import pytest
import torch
import transformers
from attaching import D, assert_same, attached, bridge, edit, fresh, leave, left, ours, plain, prompts, quiet, theirs


@pytest.fixture(autouse=True)
def _left():
    yield
    leave()


def state(model):
    """All that an attachment may change of a model."""
    hooks = [
        (name, list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for name, m in model.named_modules()
    ]
    return hooks, {k: id(v) for k, v in model.__dict__.items()}, {k: v.clone() for k, v in model.state_dict().items()}


def assert_state(model, before):
    hooks, attributes, weights = state(model)
    assert hooks == before[0] and attributes == before[1]
    assert all(torch.equal(weights[k], v) for k, v in before[2].items())


def logits(model, batch):
    with torch.no_grad():
        return model(batch.tokens, attention_mask=batch.attention_mask.long()).logits


# -- the model afterwards ------------------------------------------------------------------------------------


def test_detached_a_model_is_as_it_was_bit_for_bit_also_after_errors_in_calls():
    model, batch, fired = fresh(), prompts(), []
    model.model.layers[1].register_forward_hook(lambda *_: fired.append(1))
    model.register_forward_pre_hook(lambda *_: fired.append(2))
    before, base, (tokens, mask) = state(model), logits(model, batch), left(batch)
    written = theirs(model, tokens, mask)
    attachment = attached(edit(), model)
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10_000))
    with pytest.raises(ValueError, match="pad on the left"):
        theirs(model, batch.tokens, batch.attention_mask.long())
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        theirs(model, tokens, mask)
    handle.remove()
    assert_same(theirs(model, tokens, mask), ours(edit(), "llama", batch))
    assert not torch.equal(logits(model, batch), base)
    quiet(attachment)
    attachment.detach()
    assert_state(model, before)
    assert torch.equal(logits(model, batch), base) and theirs(model, tokens, mask) == written
    assert {1, 2} == set(fired)


def test_an_interrupt_in_a_call_leaves_nothing_behind():
    model, batch = fresh(), prompts()
    (tokens, mask), expected = left(batch), ours(edit(), "llama", batch)

    def interrupt(*_):
        raise KeyboardInterrupt

    attachment = attached(edit(), model)
    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        theirs(model, tokens, mask)
    handle.remove()
    assert_same(theirs(model, tokens, mask), expected)
    quiet(attachment)


def test_a_generate_that_was_there_before_is_used_and_put_back():
    model, batch, called = fresh(), prompts(), []
    own = model.generate

    def mine(*args, **kwargs):
        called.append(1)
        return own(*args, **kwargs)

    model.generate = mine
    attachment = attached(edit(), model)
    kept = model.generate
    assert_same(theirs(model, *left(batch)), ours(edit(), "llama", batch))
    quiet(attachment)
    assert model.generate is mine and called
    tokens, mask = left(batch)
    after = kept(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(after, own(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_attachments_act_in_the_order_they_were_made_and_leave_in_any(order):
    import reftlens as rl

    model, batch, other = fresh(), prompts(), bridge("llama")
    one = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(D, 3)}).double().eval()
    two = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 3)}).double().eval()
    before, tokens = state(model), left(batch)
    both = [attached(one, model), attached(two, model)]
    with torch.no_grad(), (one | two).on(other, batch):
        expected = other(batch.tokens, attention_mask=batch.attention_mask.long())
    real = batch.attention_mask
    assert (logits(model, batch) - expected)[real].abs().max() < 1e-5
    assert_same(theirs(model, *tokens), ours(one | two, "llama", batch))
    both[order[0]].detach()
    left_over = (one, two)[order[1]]
    assert_same(theirs(model, *tokens), ours(left_over, "llama", batch))
    both[order[1]].detach()
    assert_state(model, before)


# -- copies --------------------------------------------------------------------------------------------------


def test_copies_of_an_edited_model_are_refused_and_its_own_weights_are_saved(tmp_path):
    model, batch = fresh(), prompts()
    base = logits(model, batch)
    attachment = attached(edit("last"), model)
    for make in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
        with pytest.raises(ValueError, match=r"edited by rl\.attach, and a copy .*detach\(\)"):
            make(model)
    with pytest.raises(ValueError, match="a copy of the model"):
        copy.copy(model)(batch.tokens)
    model.save_pretrained(tmp_path / "folder")
    attachment.detach()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float64)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert torch.equal(logits(copy.deepcopy(model), batch), base)


def test_compiled_models_and_passes_that_leave_a_block_out_are_refused():
    model, batch = fresh(), prompts()
    for compiled in (torch.compile(model), fresh()):
        compiled.compile() if not hasattr(compiled, "_orig_mod") else None
        with pytest.raises(ValueError, match=r"torch\.compile .* attach to the original"):
            attached(edit("last"), compiled)
    attachment = attached(edit("last"), model)
    block = model.model.layers[1]
    model.model.layers[1] = copy.deepcopy(plain("llama").model.layers[1])
    with pytest.raises(RuntimeError, match=r"no hidden state passed through blocks\.1\.hook_resid_post"):
        model(batch.tokens)
    model.model.layers[1] = block
    attachment.detach()


def test_blocks_that_run_without_the_model_are_refused():
    model, batch = fresh(), prompts()
    attachment = attached(edit("all"), model)
    with pytest.raises(ValueError, match=r"the block of blocks\.0\.hook_resid_post runs, and the model"):
        model.model(batch.tokens)
    attachment.detach()


# -- other hands on the model --------------------------------------------------------------------------------


def test_weights_that_accelerate_keeps_elsewhere_are_edited_the_same():
    accelerate = pytest.importorskip("accelerate")
    model, batch, reft = fresh(), prompts(), edit()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    attachment = attached(reft, model)
    assert_same(theirs(model, *left(batch)), ours(reft, "llama", batch))
    quiet(attachment)
    assert not any(p.is_meta for p in reft.parameters())


def adapted(model):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, settings).eval()


def test_a_peft_model_is_edited_with_its_adapters_on():
    reft, batch = edit(), prompts()
    tokens, model = left(batch), adapted(fresh())
    merged = adapted(fresh()).merge_and_unload()
    with attached(reft, merged) as attachment:
        expected, full = theirs(merged, *tokens), logits(merged, batch)
        quiet(attachment)
    for given in (model, model.get_base_model()):
        attachment = attached(reft, given)
        assert theirs(given, *tokens) == theirs(model, *tokens) == expected
        assert (logits(given, batch) - full)[batch.attention_mask].abs().max() < 1e-6
        quiet(attachment)
    labels = batch.tokens.masked_fill(~batch.attention_mask, -100)
    with pytest.raises(ValueError, match="chooses no token"), attached(edit("last"), model):
        model(batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels)
    assert theirs(model, *tokens) != expected


def test_a_model_in_two_bytes_and_one_in_train_mode():
    import reftlens as rl

    batch, reft = prompts(), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 3, dropout=0.5)})
    model = fresh().to(torch.bfloat16)
    with attached(reft, model):
        assert torch.equal(
            logits(model, batch), logits(model, batch)
        )  # the edit has no dropout where the model is in eval
        assert logits(model, batch).dtype == torch.bfloat16
        model.train()
        assert not torch.equal(logits(model, batch), logits(model, batch))
    assert reft[0].training


def test_gradients_reach_the_edit_through_checkpointed_blocks():
    import reftlens as rl

    batch, grads = prompts(), []
    for checkpointed in (False, True):
        model, reft = fresh().train(), edit("last").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        with rl.attach(reft, model):
            model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False).logits.logsumexp(
                -1
            ).sum().backward()
        grads.append([p.grad for p in reft.parameters()])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*grads, strict=True))


# -- other architectures -------------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=309, hidden_size=D, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
    intermediate_size=48, max_position_embeddings=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
DECODERS = {
    "mpt": lambda t: t.MptConfig(vocab_size=309, d_model=D, n_layers=3, n_heads=4, max_seq_len=64),
    "bloom": lambda t: t.BloomConfig(vocab_size=309, hidden_size=D, n_layer=3, n_head=4),
    "opt": lambda t: t.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=D),
    "falcon": lambda t: t.FalconConfig(**SIZES),
    "phi3": lambda t: t.Phi3Config(**SIZES),
    "qwen3": lambda t: t.Qwen3Config(**SIZES, head_dim=8),
    "gptj": lambda t: t.GPTJConfig(vocab_size=309, n_embd=D, n_layer=3, n_head=4, rotary_dim=4, n_positions=64),
}
ENCODERS = {
    "bert": lambda t: t.BertModel(t.BertConfig(**SIZES)),
    "bert with a head": lambda t: t.BertForMaskedLM(t.BertConfig(**SIZES)),
    "roberta": lambda t: t.RobertaForSequenceClassification(t.RobertaConfig(**SIZES)),
    "distilbert": lambda t: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=309, dim=D, n_layers=3, n_heads=4, hidden_dim=48)
    ),
}


def pushed(model, ids):
    """By how much a vector that is added after block 1, and before block 2, moves the hidden states there."""
    import reftlens as rl

    states, vector = [], 3 * torch.randn(D)
    for site in (None, rl.resid_post(1, "all"), rl.resid_pre(2, "all")):
        attachment = None if site is None else rl.attach(rl.ReFT({site: rl.SteeringVector(D, vector)}).eval(), model)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        states.append((out.hidden_states[2], out.hidden_states[3]))
        if attachment is not None:
            attachment.detach()
    assert torch.equal(states[1][1], states[2][1])
    return (states[1][0] - states[0][0] - vector).abs().max()


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders_are_edited_where_they_record_hidden_states_with_and_without_a_cache(name):
    import reftlens as rl

    model = transformers.AutoModelForCausalLM.from_config(DECODERS[name](transformers)).eval()
    ids = torch.randint(5, 300, (2, 6))
    assert pushed(model, ids) < 1e-5
    with rl.attach(rl.ReFT({rl.resid_post(1, "last"): rl.SteeringVector(D, 3 * torch.randn(D))}).eval(), model):
        written = [theirs(model, ids, torch.ones_like(ids), use_cache=cached) for cached in (True, False)]
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_edited_where_they_record_hidden_states(name):
    assert pushed(ENCODERS[name](transformers).eval(), torch.randint(5, 300, (2, 6))) < 1e-5


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig"])
def test_models_with_a_state_in_place_of_a_cache_write_without_it(name):
    import reftlens as rl

    config = getattr(transformers, name)(vocab_size=309, hidden_size=D, num_hidden_layers=3)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.randint(5, 300, (1, 6))
    with rl.attach(rl.ReFT({rl.resid_post(1, "last"): rl.SteeringVector(D, 3 * torch.randn(D))}).eval(), model):
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(ids, max_new_tokens=3)
        assert model.generate(ids, max_new_tokens=3, use_cache=False).shape[1] > 6


def test_a_stack_of_two_kinds_and_one_that_lies_otherwise_are_refused():
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D, 2)})
    t5 = transformers.T5Config(vocab_size=309, d_model=D, num_layers=2, num_heads=4, d_ff=48)
    for model, message in (
        (transformers.T5ForConditionalGeneration(t5), "an encoder and a decoder"),
        (
            transformers.XLNetModel(transformers.XLNetConfig(vocab_size=309, d_model=D, n_layer=1, n_head=4)),
            "seq, batch, d",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rl.attach(reft, model)


# -- arguments -----------------------------------------------------------------------------------------------


def test_what_cannot_be_attached_says_what_to_do():
    import reftlens as rl

    model, text = plain("llama"), rl.positions.Written("x")
    das = rl.ReFT({rl.resid_post(0, "last"): rl.DAS(D, rank=2)})
    for arguments, error, message in (
        ((rl.LoReFT(D, 2), model), TypeError, "put it at a site"),
        ((das, model), ValueError, r"copies from a source: .*batch=data.with_sources"),
        ((rl.ReFT({rl.resid_post(0, text): rl.LoReFT(D, 2)}), model), ValueError, "tokenizer=tokenizer"),
        ((das, "model"), TypeError, "expected a transformers model, got str"),
        ((das, model, 2.0), TypeError, "expected a Variant"),
    ):
        with pytest.raises(error, match=f"{message}|Type-check error"):
            rl.attach(*arguments)
    with (
        pytest.raises(ValueError, match="prompts are none"),
        rl.attach(rl.ReFT({rl.resid_post(0, rl.positions.Role("user")): rl.LoReFT(D, 2)}), model),
    ):
        model(prompts().tokens)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
