"""Beyond the table of architectures: what is reused where it is valid, and why nothing is where it is not."""

import pytest
import torch
import transformers
from test_scorer import ROUNDING, off, scored, worst

from architectures import tokenizer

SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
MODELS = {
    "mistral": (
        "mistralai/Mistral-7B-v0.1",
        "MistralForCausalLM",
        "MistralConfig",
        dict(**SIZE, num_key_value_heads=2, intermediate_size=48, sliding_window=8),
    ),
    "qwen3": (
        "Qwen/Qwen3-0.6B",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        dict(**SIZE, num_key_value_heads=2, head_dim=8, intermediate_size=48),
    ),
    "phi": ("microsoft/phi-1", "PhiForCausalLM", "PhiConfig", dict(**SIZE, intermediate_size=48)),
    "bloom": (
        "bigscience/bloom-560m",
        "BloomForCausalLM",
        "BloomConfig",
        dict(hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
    ),
    "opt": (
        "facebook/opt-125m",
        "OPTForCausalLM",
        "OPTConfig",
        dict(**SIZE, ffn_dim=48, dropout=0.0, word_embed_proj_dim=32, max_position_embeddings=160),
    ),
    "mamba": (
        "state-spaces/mamba-130m-hf",
        "MambaForCausalLM",
        "MambaConfig",
        dict(hidden_size=32, num_hidden_layers=3, state_size=4),
    ),
}
WHY_NOT = {"mamba": "linear_attention"}


def booted(name):
    from transformer_lens.model_bridge import TransformerBridge

    hub_id, model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(vocab_size=len(tokenizer()), initializer_range=0.2, **settings)
    )
    model.config.architectures = [model_class]
    return TransformerBridge.boot_transformers(
        hub_id, hf_model=model.eval(), tokenizer=tokenizer(), device="cpu"
    ).eval()


@pytest.mark.parametrize("name", MODELS)
def test_reuse_is_exact_or_declined_with_a_reason(name):
    import reftlens as rl

    model = booted(name)
    rows = [("the cat sat on the mat and looked at the moon over the hill", " while"), ("a dog ran", " by the green")]
    data = rl.encode(model, [rl.Example(p, c) for p, c in rows])
    reft = rl.ReFT({rl.resid_post(0, "l2"): rl.LoReFT(32, 2)})
    expected, _ = scored(model, reft, data, None, rows=(0, 1))
    found, said = scored(model, reft, data, off(), rows=(0, 1))
    prefilled = rl.generation.prefill(reft, model, [p for p, _ in rows])
    assert said.startswith("light cone") and worst(found, expected) < ROUNDING
    if name in WHY_NOT:  # only blocks below the edit are skipped
        assert "25 of 25 tokens" in said and WHY_NOT[name] in prefilled.computation
    else:
        decoding = rl.Decoding(max_new_tokens=4)
        again = rl.generate(reft, model, prefilled, decoding, variant=2.0)
        assert again == rl.generate(reft, model, [p for p, _ in rows], decoding, variant=2.0)
