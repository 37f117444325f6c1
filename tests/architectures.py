"""Tiny models with random weights, one per architecture: the table that laws are checked over."""

import tempfile
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens.model_bridge import TransformerBridge

D, LAYERS, HEADS, KV_HEADS, D_HEAD, D_MLP, CONTEXT = 32, 3, 4, 2, 8, 48, 160
TEXT = "the cat sat on the mat and looked at the moon over the green hill while a dog ran by "
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 330 tokens, with a chat template."""
    return train_tokenizer([TEXT] * 5, vocabulary=330)


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer, loaded from a folder, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", "<turn>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<turn>", "<end>"],
        chat_template=TEMPLATE,
    )
    folder = tempfile.mkdtemp()
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def _config(architecture: str) -> Any:
    vocab = len(tokenizer())
    llama_like = dict(
        vocab_size=vocab,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=D_MLP,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.12 if architecture in ("llama", "qwen2") else 0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=D,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=D_MLP,
            n_positions=CONTEXT,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        )
    if architecture == "neox":
        neox = {k: v for k, v in llama_like.items() if k != "num_key_value_heads"}
        return transformers.GPTNeoXConfig(**neox)
    gemma = dict(head_dim=D_HEAD, sliding_window=16)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]  # both kinds, and both of gemma3's rotations
    return {
        "llama": lambda: transformers.LlamaConfig(**llama_like),
        "qwen2": lambda: transformers.Qwen2Config(**llama_like),
        "gemma2": lambda: transformers.Gemma2Config(**llama_like, **gemma),
        "gemma3": lambda: transformers.Gemma3TextConfig(**llama_like, **gemma, layer_types=layers),
    }[architecture]()


ARCHITECTURES = ("gpt2", "neox", "qwen2", "gemma2", "gemma3", "llama")
NAMES = {
    "gpt2": "gpt2",
    "neox": "EleutherAI/pythia-14m",
    "qwen2": "Qwen/Qwen2-0.5B",
    "gemma2": "google/gemma-2-2b",
    "gemma3": "google/gemma-3-1b-pt",
    "llama": "meta-llama/Llama-3.2-1B",
}


def hf_model(architecture: str, seed: int = 0) -> Any:
    """A plain transformers model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_config(architecture))
        _shake(model, architecture)
    model.config.architectures = [type(model).__name__]
    return model.eval()


@torch.no_grad()
def _shake(model: Any, architecture: str) -> None:
    """No bias is 0 and no norm's gain is 1, and a model with tied embeddings does not repeat its last token for ever.

    Tied embeddings make the logit of the current token the largest where the embedding dominates the residual
    stream; smaller embeddings and a larger gain of the final norm leave the blocks the last word.
    """
    offset = 1.0 if architecture.startswith("gemma") else 0.0  # gemma's norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(0.1 * torch.randn_like(parameter) + (1.0 - offset if name.endswith("weight") else 0.0))
    if model.config.tie_word_embeddings:
        model.get_input_embeddings().weight.mul_(0.3)
        final = [p for n, p in model.named_parameters() if n.endswith(("model.norm.weight", "ln_f.weight"))]
        final[0].copy_(2 * (final[0] + offset) - offset)


def fresh_bridge(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A bridge of its own, for tests that change it."""
    model = hf_model(architecture, seed).to(dtype)
    return TransformerBridge.boot_transformers(
        NAMES[architecture], hf_model=model, tokenizer=tokenizer(), device="cpu", dtype=dtype
    ).eval()


@cache
def bridge(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """A shared bridge: read-only for the tests."""
    return fresh_bridge(architecture, dtype=dtype)
