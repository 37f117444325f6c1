"""Fingerprints: the same model is recognised in every form it can take, and no other model is taken for it."""

import pytest
import torch

import architectures


def _differences(model, other):
    from reftlens.bridge.fingerprint import fingerprint

    return fingerprint(model).differences(fingerprint(other))


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_a_bridge_and_the_plain_model_have_one_fingerprint(architecture):
    from reftlens.bridge.fingerprint import fingerprint

    # Inside a bridge modules have other names, and gpt2 and neox have q, k and v beside the joint layer.
    inside, plain = fingerprint(architectures.bridge(architecture)), fingerprint(architectures.hf_model(architecture))
    assert inside.weights == plain.weights and inside.config == plain.config
    assert inside.differences(plain) == [] == plain.differences(inside)


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_inside_a_bridge_the_modules_are_those_of_the_plain_model(architecture):
    from reftlens.bridge.fingerprint import plain_modules

    plain = architectures.hf_model(architecture)
    modules = dict(plain_modules(architectures.bridge(architecture).original_model))
    assert modules.keys() == dict(plain.named_modules()).keys()
    for name, module in plain.named_modules():
        for key, parameter in module._parameters.items():
            assert parameter is None or torch.equal(parameter, modules[name]._parameters[key]), (name, key)


@pytest.mark.parametrize(
    "architecture, dtype",
    [(a, torch.bfloat16) for a in architectures.ARCHITECTURES] + [("gpt2", torch.float16), ("llama", torch.float64)],
    ids=str,
)
def test_dtype_does_not_matter(architecture, dtype):
    model, other = architectures.hf_model(architecture), architectures.hf_model(architecture).to(dtype)
    assert _differences(model, other) == [] == _differences(other, model)
    assert _differences(other, architectures.hf_model(architecture).to(torch.bfloat16)) == []


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_another_checkpoint_of_the_same_configuration_differs(architecture):
    differences = _differences(architectures.hf_model(architecture), architectures.hf_model(architecture, seed=1))
    assert len(differences) == 1 and "weights are others" in differences[0]


def test_weights_that_all_moved_by_one_percent_differ_even_in_bfloat16():
    model, tuned = architectures.hf_model("llama"), architectures.hf_model("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    assert _differences(model, tuned) and _differences(model, tuned.to(torch.bfloat16))


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_a_change_of_any_single_weight_is_noticed(architecture):
    from reftlens.bridge.fingerprint import fingerprint

    model = architectures.hf_model(architecture)
    before = fingerprint(model)
    for name, parameter in model.named_parameters():
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(
                0.1 * max(original.norm().item(), 1e-3) / original.numel() ** 0.5 * torch.randn_like(original).sign()
            )
        (difference,) = before.differences(fingerprint(model))
        assert name in difference, name
        with torch.no_grad():
            parameter.copy_(original)
    assert before.differences(fingerprint(model)) == []


def test_another_architecture_differs_by_its_type():
    differences = _differences(architectures.hf_model("llama"), architectures.hf_model("qwen2"))
    assert "model_type was 'llama' and is 'qwen2'" in differences


def test_processed_weights_differ_and_the_mode_without_processing_does_not():
    model, renamed, processed, by_hand = (architectures.fresh_bridge("gpt2") for _ in range(4))
    renamed.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    processed.enable_compatibility_mode(disable_warnings=True)
    by_hand.process_weights()  # the same without the mode's name
    assert _differences(model, renamed) == [] == _differences(renamed, model)
    for other in (processed, by_hand):
        assert "compatibility mode off, and this model has it on" in _differences(model, other)[0]
        assert "compatibility mode on, and this model has it off" in _differences(other, model)[0]


def test_a_context_length_of_the_users_choice_does_not_matter():
    from transformer_lens.model_bridge import TransformerBridge

    shorter = TransformerBridge.boot_transformers(
        architectures.NAMES["llama"],
        hf_model=architectures.hf_model("llama"),
        tokenizer=architectures.tokenizer(),
        device="cpu",
        n_ctx=architectures.CONTEXT // 2,
    )
    assert _differences(architectures.bridge("llama"), shorter) == []


def test_a_fingerprint_survives_json(any_model):
    import json

    from reftlens.bridge.fingerprint import Fingerprint, fingerprint

    stored = fingerprint(any_model)
    assert Fingerprint(**json.loads(json.dumps(stored.to_dict()))) == stored
