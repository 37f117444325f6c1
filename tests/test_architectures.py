"""Architectures beyond the six of the table: each is right or refused in one sentence, whichever class it is."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import architecture_checks
import edited_checks
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


@pytest.mark.parametrize(("name", "missing"), [("GPTNeoXForCausalLM", "lm_head.weight"), ("BertForMaskedLM", "cls")])
def test_logits_of_a_head_that_is_not_in_the_folder_are_refused_and_hidden_states_are_not(tmp_path, name, missing):
    import reftlens as rl

    model = zoo.plain(name)
    model.base_model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"has no weights for {missing}.*mean nothing"):
        bridge = rl.load_model(str(tmp_path), device="cpu", progress=False)
    assert type(bridge.original_model).__name__ == name
    data = rl.encode(bridge, [rl.Example("the cat", " sat")], end=False)
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(bridge.cfg.d_model, 1)})
    for refused in (
        lambda: rl.fit(reft, bridge, data, steps=1, progress=False),
        lambda: rl.evaluate(reft, bridge, data, progress=False),
        lambda: rl.generate(reft, bridge, ["the cat"]),
    ):
        with pytest.raises(ValueError, match=f"no weights for {missing}.*mean nothing"):
            refused()
    with torch.no_grad():
        expected = model.base_model(input_ids=data.tokens, output_hidden_states=True).hidden_states[1]
    states = rl.activations(bridge, data, rl.resid_post(0, "all"))
    assert torch.allclose(states, expected[0], atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = rl.load_model(str(tmp_path), device="cpu", progress=False)
    same = zip(bridge.original_model.parameters(), again.original_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same), "a head that is drawn is drawn alike each time"


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_of_a_classifier_the_encoder_is_loaded_and_in_memory_the_class_to_load_is_named(tmp_path, family):
    import reftlens as rl

    masked, classifier = (
        getattr(transformers, f"{family}{end}") for end in ("ForMaskedLM", "ForSequenceClassification")
    )
    model = classifier(zoo.config_of(f"{family}ForMaskedLM")).eval()
    model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="mean nothing"):
        bridge = rl.load_model(str(tmp_path), device="cpu", progress=False)
    assert type(bridge.original_model) is masked
    data = rl.encode_prompts(bridge, ["the cat sat"])
    with torch.no_grad():
        expected = model.base_model(input_ids=data.tokens, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(rl.activations(bridge, data, rl.resid_post(0, "all")), expected[0], atol=1e-5)
    with pytest.raises(ValueError, match=f"no bridge of a {family}ForSequenceClass.*expected a {family}ForMaskedLM"):
        rl.load_model(model, tokenizer=zoo.tokenizer())


def test_a_model_in_memory_whose_configuration_names_no_class_is_taken_for_what_it_is():
    import reftlens as rl

    model = zoo.plain("RobertaForMaskedLM")
    model.config.architectures = None
    assert type(rl.load_model(model, tokenizer=zoo.tokenizer()).original_model) is transformers.RobertaForMaskedLM


def test_weights_that_are_missing_below_the_head_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    import reftlens as rl

    folder = saved(tmp_path, "GPTNeoXForCausalLM")
    file = f"{folder}/model.safetensors"
    tensors = load_file(file)
    dropped = next(name for name in tensors if "layers.0" in name)
    save_file({k: v for k, v in tensors.items() if k != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no weights for {dropped}.*random numbers") as error:
        rl.load_model(folder, device="cpu", progress=False)
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

    model, examples = zoo.boot(name), [rl.Example("the cat", " sat")]
    data = rl.encode(zoo.boot("LlamaForCausalLM"), examples)
    reft = rl.ReFT({rl.Site("blocks.0.hook_out", "last"): rl.LoReFT(32, 2)})
    calls = {
        "hooks": lambda: rl.hooks(model),
        "encode": lambda: rl.encode(model, examples),
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


# -- a model is tried before anything is computed with it ---------------------------------------------------------

NOT_CAUSAL = "sees the tokens that it would predict"
BROKEN = "OPTForCausalLM:post-norm"
TRIED = {
    "BertForMaskedLM": NOT_CAUSAL,
    "BertLMHeadModel": NOT_CAUSAL,
    "Gemma3ForCausalLM:bidirectional": NOT_CAUSAL,
    "FalconForCausalLM:rw": "the transformers model inside it give logits that differ",
    "OpenAIGPTLMHeadModel": "the transformers model inside it give logits that differ",
    "GlmMoeDsaForCausalLM": "keys of the best scores",
}


def calls(model):
    """Whatever computes next-token logits."""
    import reftlens as rl

    data, reft = (
        rl.encode(model, [rl.Example("the cat", " sat")]),
        rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)}),
    )
    return {
        "fit": lambda: rl.fit(reft, model, data, steps=1, progress=False),
        "evaluate": lambda: rl.evaluate(reft, model, data, progress=False),
        "generate": lambda: rl.generate(reft, model, ["the cat"], rl.Decoding(max_new_tokens=2)),
        "generate unedited": lambda: rl.generate(None, model, ["the cat"], rl.Decoding(max_new_tokens=2)),
        "prefill": lambda: rl.generation.prefill(reft, model, ["the cat"]),
    }


def test_a_bridge_that_cannot_compute_what_its_model_can_is_refused_as_such():
    import reftlens as rl

    model = zoo.boot(BROKEN)
    for call in (lambda: rl.hooks(model), *calls(model).values()):
        with pytest.raises(ValueError, match="gives no logits for 23 tokens") as error:
            call()
        sentence(error)


@pytest.mark.parametrize("name", TRIED)
def test_a_model_whose_predictions_mean_nothing_is_refused_by_whatever_comes_first(name):
    for call in calls(zoo.boot(name)).values():
        with pytest.raises(ValueError, match=TRIED[name]) as error:
            call()
        sentence(error)


def test_a_decoder_of_the_same_family_is_accepted():
    """The twin, and a masked model may still be read."""
    import reftlens as rl

    for call in calls(zoo.boot("BertLMHeadModel:decoder")).values():
        call()
    masked = zoo.boot("BertForMaskedLM")
    assert rl.activations(
        masked, rl.encode_prompts(masked, ["the cat"]), rl.resid_post(1, "last"), progress=False
    ).any()


def test_a_model_is_tried_once_for_each_state_of_its_weights_and_calls_no_hook_of_others():
    import reftlens as rl
    from reftlens.bridge import trial

    model, seen = zoo.boot("LlamaForCausalLM"), []
    hook = model.blocks[1].hook_out.add_hook(lambda h, hook: seen.append(1))
    trial.trial(model)
    assert not seen
    hook.hook.remove()
    model.blocks[1].hook_out.fwd_hooks.clear()
    first = trial.trial(model)
    assert first == trial.Trial(takes_positions=True) and trial.trial(model) is first
    with torch.no_grad():
        model.original_model.lm_head.weight.mul_(2)
    assert trial.trial(model) is not first
    with torch.no_grad():
        model.blocks[1].mlp.gate.original_component.weight.mul_(2)  # in both
    rl.generate(None, model, ["the cat"], rl.Decoding(max_new_tokens=1))


def left_padded(data):
    """The same rows, padded on the left."""
    order = data.attention_mask.long().argsort(dim=1, stable=True)
    return replace(data, **{n: getattr(data, n).gather(1, order) for n in ("tokens", "role", "target_mask")})


def test_where_padding_changes_what_follows_rows_are_padded_on_the_right_or_taken_alone():
    import reftlens as rl

    model = zoo.boot("RecurrentGemmaForCausalLM")
    examples = [rl.Example("the cat sat on the mat", " and"), rl.Example("a dog", " ran by")]
    data, reft = rl.encode(model, examples), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)})
    together = rl.evaluate(reft, model, left_padded(data), [1.0], progress=False).loss[0]
    alone = [rl.evaluate(reft, model, rl.encode(model, [e]), [1.0], progress=False).loss[0, 0] for e in examples]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-5)
    with pytest.raises(ValueError, match="padding on the left changes"):
        rl.activations(model, left_padded(data), reft.sites[0], progress=False)
    prompts = [e.prompt for e in examples]
    decoding = rl.Decoding(max_new_tokens=4)
    texts = rl.generate(reft, model, prompts, decoding, keep_logits=True)
    for n, prompt in enumerate(prompts):
        single = rl.generate(reft, model, [prompt], decoding, keep_logits=True)
        assert single.ids == texts.ids[n : n + 1]
        assert torch.allclose(single.logits[0], texts.logits[n], atol=1e-5)


# -- a class of each family, beside plain transformers with one hook, one row at a time ------------------------------

WHOLE = "221 of 221 tokens"  # no cache is gone on from, but the blocks below the edit are skipped
FAMILIES = {
    "GPTNeoForCausalLM": "light cone: blocks 2 to 2, 34 of",
    "BloomForCausalLM": "light cone: blocks 2 to 2, 34 of",
    "GptOssForCausalLM": "light cone: blocks 2 to 2, 34 of",
    "DeepseekV3ForCausalLM": "light cone: blocks 2 to 2, 34 of",
    "NanoChatForCausalLM": "light cone: blocks 2 to 2, 34 of",
    "Idefics3ForConditionalGeneration": "light cone: blocks 2 to 2, 34 of",
    "MambaForCausalLM": f"light cone: blocks 2 to 2, {WHOLE}",
    "NemotronHForCausalLM": "light cone: blocks 2 to 3, 221 of 221",
    "BambaForCausalLM": f"light cone: blocks 2 to 2, {WHOLE}",
    "Qwen3NextForCausalLM": f"light cone: blocks 2 to 2, {WHOLE}",
    "RwkvForCausalLM": "full computation: padding on the left changes",
    "Gemma4ForCausalLM:shared-keys": "full computation: its upper blocks attend",
}


# of those that are computed alike: the others run among the slow tests
FAST = (
    "GPTNeoForCausalLM",
    "Idefics3ForConditionalGeneration",
    "BambaForCausalLM",
    "RwkvForCausalLM",
    "Gemma4ForCausalLM:shared-keys",
)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_training_and_text_equal_plain_transformers_with_one_hook(tmp_path, name):
    checked, bridge = architecture_checks.Checked(name), zoo.boot(name)
    model = zoo.plain(name).requires_grad_(False)
    path = next(part.name for stack, part in bridge.adapter.component_mapping.items() if stack == "blocks")
    hook, where = "blocks.1.hook_resid_post", "block 1, last"
    edit = edited_checks.Edit(checked, bridge, model, hook, f"{path}.1", "last", tmp_path, where)
    edit.check()
    wrong = {part: words for part, (ending, words) in checked.parts.items() if ending != "right"}
    assert not wrong and checked.computation[where].startswith(FAMILIES[name])
    assert not [text for text in checked.warnings if "not reused" in text]
    assert any("one row at a time" in text for text in checked.warnings) == (name == "RwkvForCausalLM")


def test_an_edit_inside_a_block_of_latent_attention_is_written_with(tmp_path):
    """Its keys are stored in one form by the bridge and in another by the original model."""
    checked, name = architecture_checks.Checked("DeepseekV3ForCausalLM"), "DeepseekV3ForCausalLM"
    bridge, model = zoo.boot(name), zoo.plain(name).requires_grad_(False)
    edited_checks.Edit(
        checked, bridge, model, "blocks.1.hook_mlp_out", "model.layers.1.mlp", "last", tmp_path, "MLP 1, last"
    ).check()
    assert {ending for ending, _ in checked.parts.values()} == {"right"}


# -- hooks that are not what their names say ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "JetMoeForCausalLM"])
def test_the_neurons_of_experts_are_not_taken_for_what_the_mlp_adds(name):
    import reftlens as rl

    model = zoo.boot(name)
    reft = rl.ReFT({rl.mlp_post(1, "last"): rl.LoReFT(32, 2)})
    data = rl.encode(model, [rl.Example("the cat", " sat")])
    for call in (lambda: reft.bind(model), lambda: rl.fit(reft, model, data, steps=1, progress=False)):
        with pytest.raises(
            ValueError, match=r"mlp\.hook_post is the hook of blocks\.1\.hook_mlp_out.*use mlp_out"
        ) as error:
            call()
        sentence(error)
    rows = rl.hooks(model)
    assert rows["blocks.1.hook_mlp_out"].width == 32 and not any("hook_post" in n for r in rows.rows for n in r.aliases)
    rl.fit(rl.ReFT({rl.mlp_out(1, "last"): rl.LoReFT(32, 2)}), model, data, steps=1, progress=False)


def test_neurons_of_a_dense_block_beside_experts_are_edited():
    """The twin: the first block of a DeepSeek has no experts."""
    import reftlens as rl

    model = zoo.boot("DeepseekV3ForCausalLM")
    rl.training.preflight(rl.ReFT({rl.mlp_post(0, "last"): rl.LoReFT(48, 2)}), model)
    with pytest.raises(ValueError, match="neurons of its experts"):
        rl.training.preflight(rl.ReFT({rl.mlp_post(1, "last"): rl.LoReFT(48, 2)}), model)


@pytest.mark.parametrize("name", ["OlmoForCausalLM", "NanoChatForCausalLM"])
def test_a_hook_where_an_edit_breaks_the_bridge_is_listed_as_such_and_the_others_as_usable(name):
    import reftlens as rl

    model = zoo.boot(name)
    every = rl.hooks(model, unusable=True)
    broken = {row.hook.rpartition(".")[2] for row in every.rows if "breaks the bridge" in row.problem}
    assert broken == {"hook_normalized", "hook_scale"}
    assert any(row.hook.endswith("hook_out") and not row.problem for row in every.rows)


# -- rotary positions that depend on the length of a row ---------------------------------------------------------


def test_rows_on_both_sides_of_the_length_where_longrope_changes_are_computed_alone():
    import reftlens as rl

    model, words = zoo.boot("Phi3ForCausalLM:longrope"), "the cat sat on the mat and looked at the moon over the hill"
    examples = [rl.Example("a dog", " ran by"), rl.Example(f"{words} {words}", " while a cat ran")]
    data, reft = rl.encode(model, examples), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)})
    assert data.attention_mask.sum(dim=1).tolist()[0] < 24 < data.attention_mask.sum(dim=1).tolist()[1]
    with pytest.warns(UserWarning, match=r"rotary positions \(longrope\) are others in rows of more than 24"):
        evaluation = rl.evaluate(reft, model, data, [1.0], progress=False)
    assert evaluation.computation.startswith("full computation")
    for n, example in enumerate(examples):
        single = rl.encode(model, [example])
        with torch.no_grad(), reft.on(model, single):
            logits = model(single.tokens)[single.predicting]
        loss = torch.nn.functional.cross_entropy(logits, single.target_ids)
        assert torch.allclose(evaluation.loss[0, n].float(), loss, rtol=1e-4)
    with pytest.raises(ValueError, match="one at a time") as error:
        rl.activations(model, data, reft.sites[0], progress=False)
    sentence(error)


def test_short_rows_of_a_longrope_model_stay_on_the_cone():
    """The twin."""
    import reftlens as rl

    model, reft = zoo.boot("Phi3ForCausalLM:longrope"), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)})
    data = rl.encode(model, [rl.Example("a dog", " ran by"), rl.Example("the cat sat", " on")])
    assert rl.evaluate(reft, model, data, [1.0], progress=False).computation.startswith("light cone")


def test_rows_beyond_the_context_of_dynamic_rotary_positions_are_refused():
    import reftlens as rl

    model = zoo.boot("LlamaForCausalLM:dynamic")
    data = rl.encode(model, [rl.Example("the" + " cat sat on the mat" * 40, " and ran")], max_length=400)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)})
    with pytest.warns(UserWarning, match="dynamic"), pytest.raises(ValueError, match=r"shorten rows to 160") as error:
        rl.evaluate(reft, model, data, [1.0], progress=False)
    sentence(error)
