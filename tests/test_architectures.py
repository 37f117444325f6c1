"""Architectures beyond the six of the table: each is right or refused in one sentence, whichever class it is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import zoo


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for one another
    yield
    torch.set_num_threads(before)


def saved(folder, name):
    """The tiny model of a row of the zoo, as files."""
    zoo.plain(name).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return str(folder)


def sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) <= 300, text
    return text


# -- loading a folder ------------------------------------------------------------------------------------------------

REFUSED = {
    "T5ForConditionalGeneration": "is an encoder-decoder",
    "BartForConditionalGeneration": "is an encoder-decoder",
    "ViTModel": "reads pixel_values and no tokens",
    "Wav2Vec2ForPreTraining": "reads input_values and no tokens",
    "DistilBertForMaskedLM": "no adapter for DistilBertForMaskedLM",
    "FalconForCausalLM:new-decoder": "cannot make a bridge of this FalconForCausalLM",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, name):
    import reftlens as rl

    folder = saved(tmp_path, name)
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        rl.load_model(folder, device="cpu", progress=False)
    assert "choose" in sentence(error)


def test_a_folder_of_a_masked_language_model_is_loaded_as_one(tmp_path):
    import reftlens as rl

    bridge = rl.load_model(saved(tmp_path, "BertForMaskedLM"), device="cpu", progress=False)
    assert type(bridge.original_model) is transformers.BertForMaskedLM
    ids = torch.tensor([zoo.tokenizer()("the cat sat").input_ids])
    with torch.no_grad():
        expected = zoo.plain("BertForMaskedLM")(input_ids=ids).logits
        assert torch.allclose(bridge(ids), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "missing"), [("GPTNeoXForCausalLM", "lm_head.weight"), ("BertLMHeadModel", "cls")])
def test_a_folder_without_a_head_does_not_get_a_random_one(tmp_path, name, missing):
    import reftlens as rl

    model = zoo.plain(name)
    model.base_model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has no weights for {missing}.*random") as error:
        rl.load_model(str(tmp_path), device="cpu", progress=False)
    sentence(error)


@pytest.fixture
def programs(monkeypatch):
    """Programs that something tried to start."""
    started = []

    def refuse(command, *args, **kwargs):
        started.append(command)
        raise PermissionError

    for name in ("run", "call", "check_call", "check_output", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)
    return started


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_loading_a_multimodal_model_starts_no_program_and_names_the_command(tmp_path, programs, monkeypatch, name):
    import reftlens as rl

    folder = saved(tmp_path, name)
    monkeypatch.setattr(transformers.utils.import_utils, "is_torchvision_available", lambda: False)
    version = torch.__version__.partition("+")[0]
    with pytest.raises(ValueError, match=rf"`pip install torchvision torch=={version}`") as error:
        rl.load_model(folder, device="cpu", progress=False)
    sentence(error)
    assert not programs


def test_loading_a_language_model_starts_no_program_either(tmp_path, programs):
    import reftlens as rl

    rl.load_model(saved(tmp_path, "Qwen3_5ForConditionalGeneration"), device="cpu", progress=False)
    assert not programs


# -- models that read something else -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "ViTModel"])
def test_a_model_that_does_not_read_one_text_is_refused_by_whatever_comes_first(name):
    import reftlens as rl

    model = zoo.boot(name)
    data = rl.encode(model, [rl.Example("the cat", " sat")])
    reft = rl.ReFT({rl.Site("blocks.0.hook_out", "last"): rl.LoReFT(32, 2)})
    calls = {
        "hooks": lambda: rl.hooks(model),
        "fit": lambda: rl.fit(reft, model, data, steps=1, progress=False),
        "evaluate": lambda: rl.evaluate(reft, model, data, progress=False),
        "generate": lambda: rl.generate(None, model, ["the cat"]),
        "prefill": lambda: rl.generation.prefill(reft, model, ["the cat"]),
        "activations": lambda: rl.activations(model, data, reft.sites[0]),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"{name} (is an encoder-decoder|reads pixel_values)") as error:
            call()
        sentence(error)
