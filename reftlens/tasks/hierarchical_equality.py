"""Are two pairs alike in being pairs of equals? The task, and a small network trained on it (arXiv 2303.02536)."""

import tempfile
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, gradients_on
from reftlens.editing.engine import forward
from reftlens.numbers import seeded
from reftlens.tasks.causal import CausalModel, Derived
from reftlens.tasks.task import Task

SYMBOLS = tuple(f"s{i:02}" for i in range(64))
"""What is compared. The first half is for training an alignment, the second half for testing it."""
_WORDS = (*SYMBOLS, "=", "yes", "no", "<bos>", "<pad>")
_EQUALS, _YES, _NO, _BOS, _PAD = range(len(SYMBOLS), len(_WORDS))
_D, _HEADS, _BLOCKS, _CONTEXT = 32, 4, 2, 16
_PAIR_STEPS, _ROWS, _LR, _SPREAD = 150, 256, 5e-3, 0.18


def hierarchical_equality() -> Task:
    """Variables: `left` (a = b), `right` (c = d); the answer to "a b c d =" is " yes" where both or neither hold.

    Geiger et al. 2023 (arXiv 2303.02536), with symbols for vectors. Each side is a pair of equals half of the time.
    Train and test have no symbol in common.
    """
    causal = CausalModel(
        inputs=dict.fromkeys("abcd", SYMBOLS),
        derived={
            "left": Derived(("a", "b"), lambda a, b: a == b),
            "right": Derived(("c", "d"), lambda c, d: c == d),
            "same": Derived(("left", "right"), lambda left, right: left == right),
        },
        output="same",
    )
    half = len(SYMBOLS) // 2
    template = ("{a} {b} {c} {d} =",)
    return Task(
        "hierarchical equality",
        causal,
        pools={"train": dict.fromkeys("abcd", SYMBOLS[:half]), "test": dict.fromkeys("abcd", SYMBOLS[half:])},
        templates={"train": template, "test": template},
        answer=lambda same: " yes" if same else " no",
        rebalance=_equal_by_half,
    )


def _equal_by_half(setting: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    left, right = (torch.rand(2, generator=generator, dtype=torch.float32) < 0.5).tolist()
    return setting | ({"b": setting["a"]} if left else {}) | ({"d": setting["c"]} if right else {})


def equality_network(seed: SupportsIndex = 0, *, steps: int = 1600, progress: bool = False) -> Bridge:
    """A two-block GPT-2 of width 32 that solves `hierarchical_equality`, trained on a CPU in under a minute.

    The vectors of the symbols are drawn anew at every step and once more at the end, and are not trained: the network
    has to compare, and has never seen the symbols it is tested on. The first 150 steps ask after `b` alone whether it
    is `a`; without them the comparison takes far longer to appear, or the last token makes it by itself. One seed
    gives one network; `steps=0` gives an untrained one.

    `left` is one direction of the residual stream after block 0 at `b`, which is token 2 behind BOS: of
    `resid_post(0, Nth(2))`, rank-1 DAS reaches 0.99 on held-out symbols. Before block 0, at `a`, or at the last token
    after block 0 it is nowhere (0.5, as without an edit).
    """
    with gradients_on():
        return _trained(_untrained(generator := seeded(seed)), generator, steps, progress)


def _trained(bridge: Bridge, generator: torch.Generator, steps: int, progress: bool) -> Bridge:
    root: Any = bridge.original_model
    symbols = root.get_input_embeddings().weight
    trained = [p for p in root.parameters() if p is not symbols]
    optimizer = torch.optim.AdamW(trained, lr=_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(steps), desc="equality network", unit="step", disable=not progress):
        symbols.data[: len(SYMBOLS)].normal_(generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / 100, 2.5 * (1 - step / steps))
        tokens, answers = _rows(generator, pair=step < _PAIR_STEPS)
        logits = forward(bridge, tokens, torch.ones_like(tokens).bool())[:, -1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, answers).backward()
        optimizer.step()
    symbols.data[: len(SYMBOLS)].normal_(generator=generator)
    root.zero_grad()
    _joined_again(root)
    return bridge


def _rows(generator: torch.Generator, *, pair: bool) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, " rows"]]:
    """Prompts and the token that answers each, equals half of the time; of the left pair alone with `pair`."""
    tokens = torch.randint(len(SYMBOLS), (_ROWS, 4), generator=generator)
    alike = torch.rand(_ROWS, 2, generator=generator, dtype=torch.float32) < 0.5
    tokens[:, 1::2] = torch.where(alike, tokens[:, ::2], tokens[:, 1::2])
    left, right = (tokens[:, 1::2] == tokens[:, ::2]).unbind(dim=1)
    first, last = torch.tensor([_BOS, _EQUALS]).expand(_ROWS, 2).split(1, dim=1)
    tokens = torch.cat([first, tokens[:, :2]] if pair else [first, tokens, last], dim=1)
    return tokens, torch.where(left if pair else left == right, _YES, _NO)


@torch.no_grad()
def _untrained(generator: torch.Generator) -> Bridge:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    config = GPT2Config(vocab_size=len(_WORDS), n_positions=_CONTEXT, n_embd=_D, n_layer=_BLOCKS, n_head=_HEADS)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.bos_token_id, config.eos_token_id, config.pad_token_id = _BOS, _PAD, _PAD
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):  # weights are drawn from `generator`; the user's random numbers stay theirs
        network: Any = AutoModelForCausalLM.from_config(config)
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2:
                spread = 1.0 if name.endswith("wte.weight") else _SPREAD
                spread = spread / (2 * _BLOCKS) ** 0.5 if name.endswith("c_proj.weight") else spread
                parameter.normal_(std=spread, generator=generator)
        network.config.architectures = [type(network).__name__]
        with tempfile.TemporaryDirectory() as folder:  # the bridge loads the tokenizer from where it was saved
            _save_tokenizer(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            settings = {"tokenizer": tokenizer, "device": "cpu"}
            return TransformerBridge.boot_transformers("gpt2", hf_model=network.eval(), **settings).eval()


@torch.no_grad()
def _joined_again(root: Any) -> None:
    """The bridge computes with q, k and v apart, and they were trained; GPT-2's one matrix for the three follows."""
    for block in root.transformer.h:
        apart = [getattr(block.attn, name) for name in "qkv"]
        block.attn.qkv.weight.copy_(torch.cat([part.weight for part in apart]).T)
        block.attn.qkv.bias.copy_(torch.cat([part.bias for part in apart]))


def _save_tokenizer(folder: str) -> None:
    """One token per word, words apart by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<pad>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(folder)
