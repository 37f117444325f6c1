"""`reftlens doctor` says what is here, and its checks can fail."""

import pytest
import torch

import architectures


def doctor(capsys, *arguments):
    from reftlens.__main__ import main

    status = main(["doctor", *map(str, arguments)])
    return status, capsys.readouterr().out


@pytest.fixture
def no_models(monkeypatch, tmp_path):
    """No model is stored, and none is fetched."""
    from reftlens.bridge import pretrained

    def refuse(*_):
        raise AssertionError("doctor fetches nothing by itself")

    monkeypatch.setenv("REFTLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_from_hub_cache", refuse)
    monkeypatch.setattr(pretrained, "_from_hub", refuse)
    monkeypatch.setattr(pretrained.wheel, "from_wheel", refuse)
    return tmp_path / "cache"


def test_it_says_versions_devices_caches_and_that_training_works(capsys, no_models):
    (no_models / "a-model").mkdir(parents=True)
    (no_models / "a-model" / "weights").write_bytes(b"0" * 3_000_000)
    status, said = doctor(capsys)
    assert status == 0
    assert f"torch {torch.__version__}" in said and "transformer-lens 4" in said and "CPU: " in said
    assert "a-model, 3 MB" in said and "Hugging Face cache, " in said
    assert "tiny random model: trained 2 steps, loss " in said
    assert "default model: HuggingFaceTB/SmolLM2-135M-Instruct, not on this machine" in said


def test_a_named_model_is_loaded_and_a_missing_one_is_told_with_what_was_asked(capsys, no_models, tmp_path):
    architectures.hf_model("llama").save_pretrained(tmp_path / "llama")
    architectures.tokenizer().save_pretrained(tmp_path / "llama")
    status, said = doctor(capsys, "--model", tmp_path / "llama")
    assert status == 0 and "llama: LlamaForCausalLM on cpu, 3 blocks of width 32" in said
    status, said = doctor(capsys, "--model", tmp_path / "nothing")
    assert status == 1 and "nothing: failed: ModelNotAvailable: cannot find" in said
    assert "tiny random model: trained" in said, "the other checks are made all the same"


def test_a_training_that_does_not_work_fails_the_check(capsys, no_models, monkeypatch):
    from reftlens.reports import doctor as module

    real = module.evaluate
    monkeypatch.setattr(module, "fit", lambda *_, **__: None)
    status, said = doctor(capsys)
    assert status == 1 and "tiny random model: failed: RuntimeError: mean losses" in said
    assert real is module.evaluate
