"""A tiny model in the place of SmolLM2-135M-Instruct where only the code is tried: as deep, and knowing the words."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import architectures

LAYERS, D = 28, 32
DATA = Path(__file__).parents[1] / "data"
VERBS = (("", "is"), ("s", "are"))
WORDS = {
    "nouns": "author doctor farmer pilot singer driver writer student actor soldier king artist guard teacher lawyer "
    "senator painter manager parent friend dancer client officer engineer nurse sailor priest monk",
    "things": "film movie play song book show novel concert meal soup cake bread dinner coffee pizza salad",
    "opinions": "wonderful lovely excellent amazing terrible awful horrible dreadful",
}
"""As notebook 09 and the guide have them."""


@cache
def tokenizer() -> Any:
    """Byte-level BPE in which the names and verbs of the tasks are single tokens, as they are in SmolLM2's."""
    from reftlens.tasks.gendered_pronoun import gendered_pronoun
    from reftlens.tasks.indirect_object import indirect_object

    rows = map(json.loads, (DATA / "emoji.jsonl").read_text("utf-8").splitlines())
    texts = [text for row in rows for text in (row["prompt"], row["completion"])]
    for task, variable in ((gendered_pronoun(), "gender"), (indirect_object(), "name")):
        pairs = [task.pairs(100, variable, split=split) for split in ("train", "test")]
        texts += [e.prompt + e.completion for p in pairs for e in p.base]
    nouns, things, opinions = (words.split() for words in WORDS.values())
    texts += [f"We were told that the {noun}{s} near the guard{s} {verb}" for noun in nouns for s, verb in VERBS]
    texts += [f"I think the {thing} was {opinion}." for thing in things for opinion in opinions]
    return architectures.train_tokenizer(texts, vocabulary=2000)


@cache
def model() -> Any:
    """Random weights; read-only."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.constant_(plain.model.norm.weight, 4.0)  # probabilities that an edit can change
    folder = tempfile.mkdtemp()
    plain.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)  # from where a notebook reads the plain model
    return TransformerBridge.boot_transformers(
        architectures.NAMES["llama"], hf_model=plain.eval(), tokenizer=tokenizer(), device="cpu"
    ).eval()
