"""A base that bitsandbytes or torchao quantised: the bridge is the model, edits train over it in float32 as in full."""

import pytest
import torch
import transformers

import architectures

D = 64  # as many as bitsandbytes takes to a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = architectures.tokenizer()
    sizes = {"hidden_size": D, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def quantized(folder, kind):
    """A model of `folder`, its linear maps in 4 or 8 bits."""
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        bits = (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if "4" in kind else {"load_in_8bit": True}
        )
        config = transformers.BitsAndBytesConfig(**bits)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, quantization_config=config, device_map="cpu").eval()


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "torchao int8"])
def test_a_quantized_base_is_edited_and_trained_on_as_it_is(folder, kind):
    import reftlens as rl

    model, ids = quantized(folder, kind), torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
    bridge = rl.load_model(model, tokenizer=architectures.tokenizer())
    with torch.no_grad():
        torch.testing.assert_close(bridge(ids, prepend_bos=False), expected, atol=1e-5, rtol=1e-5)
    data = rl.encode(bridge, [rl.Example("the cat sat", " on the mat"), rl.Example("a dog ran", " by the moon")])
    losses = {}
    for reuse in (True, False):
        reft = rl.ReFT({rl.resid_post(0, "f1+l1"): rl.LoReFT(D, rank=2)})
        reft.reset(0)
        run = rl.fit(reft, bridge, data, steps=8, lr=2e-2, reuse=reuse, progress=False)
        losses[reuse] = torch.tensor(run.losses)
        assert {p.dtype for p in reft.parameters()} == {torch.float32}
        assert ("light cone" in run.computation) == reuse
    torch.testing.assert_close(losses[True], losses[False], atol=1e-4, rtol=1e-5)  # rows in other places of a product
    assert losses[True][-1] < losses[True][0] - 0.01


KINDS = ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_weights_are_part_of_what_a_base_is_known_by(folder, kind, tmp_path):
    """A base that was fine-tuned before it was quantised is another one, and the same one is the same."""
    from reftlens.bridge.fingerprint import fingerprint

    tuned = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weight = tuned.model.layers[1].mlp.up_proj.weight
        weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    tuned.save_pretrained(tmp_path)
    known, same, other = (fingerprint(quantized(path, kind)) for path in (folder, folder, tmp_path))
    assert len(known.weights) == len(fingerprint(tuned).weights)
    assert not known.differences(same)
    (told,) = known.differences(other)
    assert "1 of " in told and "layers.1.mlp.up_proj.weight" in told


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "torchao int8"])
def test_a_changed_weight_of_a_quantized_base_is_noticed(folder, kind):
    import reftlens as rl
    from reftlens.bridge.fingerprint import fingerprint
    from reftlens.bridge.weights import kept_as, weights_state

    bridge = rl.load_model(quantized(folder, kind), tokenizer=architectures.tokenizer())
    before, known = weights_state(bridge), fingerprint(bridge)
    weight = bridge.original_model.model.layers[1].mlp.up_proj.weight
    for part in kept_as(weight):
        if part.is_floating_point():
            part.mul_(2)
    assert weights_state(bridge) != before
    assert known.differences(fingerprint(bridge))
