"""A folder with the edit in the weights: what loads it computes what the edited model does."""

import pytest
import torch
import transformers

import architectures

D = architectures.D
TEXTS = ["the cat sat on the mat and looked at the moon", "a dog ran"]


def _reft(model, hook="mlp.hook_out"):
    """A linear edit of every layer, without a constant, which llama's layers could not hold."""
    import reftlens as rl

    edits = {rl.Site(f"blocks.{layer}.{hook}", "all"): rl.LoReFT(D, 4) for layer in range(model.cfg.n_layers)}
    with torch.no_grad():
        for module in edits.values():
            module.b.zero_()
    return rl.ReFT(edits).eval()


@torch.no_grad()
def _logits(model, batch):
    output = model(batch.tokens, attention_mask=batch.attention_mask.long())
    return getattr(output, "logits", output)[batch.attention_mask]


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_transformers_loads_the_folder_and_computes_what_the_edited_model_does(tmp_path, architecture):
    import reftlens as rl

    model = architectures.bridge(architecture)
    batch, reft = rl.encode_prompts(model, TEXTS), _reft(model)
    with reft.on(model, batch, rl.Variant(0.5)):
        edited = _logits(model, batch)
    folder = rl.storage.save_merged(reft, tmp_path / "merged", model, strength=0.5)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(plain) is type(architectures.hf_model(architecture)) and plain.dtype == torch.float32
    # float32: the merged weights are rounded once, and sums run in another order
    assert (_logits(plain, batch) - edited).abs().max() < 2e-5
    assert (_logits(model, batch) - edited).abs().max() > 1e-2
    changed = {n for n, p in plain.state_dict().items() if not torch.equal(p, dict(_named(architecture))[n])}
    assert changed == set(rl.storage.merged_weights(reft, model))
    assert plain.config.tie_word_embeddings == model.original_model.config.tie_word_embeddings


def _named(architecture):
    return architectures.hf_model(architecture).state_dict().items()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_load_model_loads_it_with_its_tokenizer_and_its_dtype(tmp_path, dtype):
    import reftlens as rl

    model = architectures.fresh_bridge("gpt2", dtype=dtype)
    reft = rl.ReFT({rl.mlp_out(1, "all"): rl.interventions.LobiReFT(D, 3)}).eval()
    folder = rl.storage.save_merged(reft, tmp_path / "new" / "merged", model)
    again = rl.load_model(str(folder), dtype=dtype, progress=False)
    batch = rl.encode_prompts(again, TEXTS)
    assert torch.equal(batch.tokens, rl.encode_prompts(model, TEXTS).tokens)
    with reft.on(model, batch):
        edited = _logits(model, batch)
    # bfloat16: a bias is rounded where a sum was before
    assert (_logits(again, batch) - edited).abs().max() < (1e-10 if dtype == torch.float64 else 0.2)
    assert transformers.AutoConfig.from_pretrained(folder).dtype == dtype
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_the_users_model_and_the_folder_beside_it_stay_as_they_are(tmp_path):
    import reftlens as rl

    model = architectures.fresh_bridge("llama")
    before = {n: p.clone() for n, p in model.original_model.named_parameters()}
    (tmp_path / "empty").mkdir()
    rl.storage.save_merged(_reft(model), tmp_path / "empty", model)
    assert all(torch.equal(p, before[n]) for n, p in model.original_model.named_parameters())
    assert {p.name for p in tmp_path.iterdir()} == {"empty"}
    written = {p.name for p in (tmp_path / "empty").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written and not any("bin" in n for n in written)


def test_what_is_there_and_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path, gpt2):
    import reftlens as rl

    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        rl.storage.save_merged(_reft(gpt2), tmp_path, gpt2)
    with pytest.raises(ValueError, match="is there already"):
        rl.storage.save_merged(_reft(gpt2), tmp_path / "kept.txt", gpt2)
    with pytest.raises(ValueError, match="is not the output of a linear layer"):
        rl.storage.save_merged(rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(D, 2)}), tmp_path / "no", gpt2)
    assert {p.name for p in tmp_path.iterdir()} == {"kept.txt"}


def test_adapters_that_are_not_merged_are_refused(tmp_path):
    peft = pytest.importorskip("peft")

    import reftlens as rl

    plain = architectures.hf_model("llama")
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = rl.load_model(adapted, tokenizer=architectures.tokenizer())
    with pytest.raises(ValueError, match=r"not those of a LlamaForCausalLM .*merge adapters first"):
        rl.storage.save_merged(_reft(model), tmp_path / "no", model)
    assert not list(tmp_path.iterdir())
