"""Networks in which an edit works at one place: there a value is made, and only there it stands alone."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from architectures import NAMES, tokenizer

D, LAYERS, TOKENS = 32, 6, 8
VALUES, DISTRACTORS, FILLERS = range(60, 160), range(160, 240), range(240, 309)
ANSWERS = range(40, 56)
HOOKS = ("attn_out", "mlp_out")
VALUE = 0.6
"""How far each coordinate is from 0 where the value is made; where it is read, 2."""
NOISE = 0.05
"""Share of the rows whose answer is drawn at random."""


@dataclass(frozen=True)
class Place:
    """Where the value is made, and how many directions it has there."""

    model: Any
    hook: str
    layer: int
    token: int
    rank: int
    sign: int
    """1: the rows to choose by want what is trained; -1: its opposite."""
    source: int
    """The token that carries the value at the beginning: `token` itself, or one before it."""
    value: Tensor
    """`[vocabulary]`: which corner of the cube each token stands for."""


def corners(rank: int) -> Tensor:
    """All `2^rank` of them, `±1` in each coordinate."""
    bits = torch.arange(2**rank)[:, None] >> torch.arange(rank)
    return 2.0 * (bits & 1) - 1


@cache
@torch.no_grad()
def place(seed: int) -> Place:
    """A GPT-2 of six blocks, written by hand.

    A value, a corner of a cube, is made by attention that takes it from an earlier token, or by an MLP of what its own
    token carries. A later block takes it to the last token, whose own embedding holds a distractor, and the unembedding
    reads the sum, as unsure as it should be. Whoever edits the value before it is added can turn it, or make it larger
    than the distractor; each of its coordinates needs a direction for that. No other block or token knows the value.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    hook, rank, sign = HOOKS[draw(0, 2)], (1, 2, 4)[draw(0, 3)], (1, -1)[draw(0, 2)]
    layer = draw(0, LAYERS - 1)
    reads = draw(layer + 1, LAYERS)
    source, token = torch.randperm(TOKENS - 1, generator=g)[:2].sort().values.tolist()
    source = source if hook == "attn_out" else token
    model = _random_model(seed)
    frame = torch.linalg.qr(torch.cat([torch.ones(D, 1), torch.randn(D, D - 1, generator=g)], dim=1)).Q[:, 1:]
    where, raw, made, summed, rest = frame.split([TOKENS, 4, 4, 4, D - 1 - TOKENS - 12], dim=1)
    raw, made, summed = raw[:, :rank], made[:, :rank], summed[:, :rank]
    vocabulary = model.config.vocab_size
    value = torch.randint(0, 2**rank, (vocabulary,), generator=g)
    value[list(VALUES)] = torch.arange(len(VALUES)) % 2**rank
    noise = torch.randn(vocabulary, rest.shape[1], generator=g) @ rest.T * 0.6
    body = model.transformer
    body.wte.weight.copy_(noise)
    body.wte.weight[list(VALUES)] += VALUE * corners(rank)[value[list(VALUES)]] @ raw.T
    body.wte.weight[list(DISTRACTORS)] += 4 * torch.randn(len(DISTRACTORS), rank, generator=g) @ summed.T
    body.wpe.weight.zero_()
    body.wpe.weight[:TOKENS] = 10 * where.T
    for number, block in enumerate(body.h):
        _quiet(block, rest, g)
        if number == layer and hook == "attn_out":
            _move(block, where, token, source, raw, made, 1.0)
        if number == layer and hook == "mlp_out":
            _copy(block, raw, made)
        if number == reads:
            _move(block, where, TOKENS - 1, token, made, summed, 2 / VALUE)
            block.attn.c_attn.weight[:, 2 * D :] += 4 * rest @ _mixing(rest, g) @ rest.T  # and much that means nothing
    model.lm_head.weight.copy_(-2 * where[:, -1].expand_as(model.lm_head.weight))
    model.lm_head.weight[list(ANSWERS[: 2**rank])] = 0.22 * corners(rank) @ summed.T
    bridge = TransformerBridge.boot_transformers(NAMES["gpt2"], hf_model=model, tokenizer=tokenizer(), device="cpu")
    return Place(bridge.eval(), hook, layer, token, rank, sign, source, value)


def _random_model(seed: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer()),
        n_embd=D,
        n_layer=LAYERS,
        n_head=1,
        n_inner=D,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
    model.config.architectures = ["GPT2LMHeadModel"]
    return model.eval()


SCALE = 0.53
"""What a norm multiplies by, about: `√D` over the norm of a hidden state."""


def _mixing(rest: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(rest.shape[1], rest.shape[1], generator=g) / rest.shape[1] ** 0.5


def _quiet(block: Any, rest: Tensor, g: torch.Generator) -> None:
    """Attention and MLP that read and write a little of what means nothing."""
    for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        linear.weight.zero_()
        linear.bias.zero_()
    inner = _mixing(rest, g)
    block.attn.c_attn.weight[:, 2 * D :] = rest @ inner @ rest.T
    block.attn.c_proj.weight.copy_(0.3 * torch.eye(D))
    block.mlp.c_fc.weight.copy_(rest @ inner.T @ torch.randn(rest.shape[1], D, generator=g) / D**0.5)
    block.mlp.c_proj.weight.copy_(0.3 * torch.randn(D, rest.shape[1], generator=g) / D**0.5 @ rest.T)


def _move(block: Any, where: Tensor, at: int, other: int, read: Tensor, write: Tensor, gain: float) -> None:
    """Attention that at one token looks at another, and takes what stands in `read` there to `write`."""
    block.attn.c_attn.weight[:, :D] += 1.4 * torch.outer(where[:, at], where[:, other])
    block.attn.c_attn.weight[:, D : 2 * D] += where @ where.T
    block.attn.c_attn.weight[:, 2 * D :] += gain * read @ write.T / 0.3 / SCALE


def _copy(block: Any, read: Tensor, write: Tensor) -> None:
    """An MLP whose first neurons are in their linear range, and copy `read` to `write`."""
    rank = read.shape[1]
    block.mlp.c_fc.weight[:, :rank] = read / SCALE
    block.mlp.c_fc.bias[:rank] = 20.0
    block.mlp.c_proj.weight[:rank] = write.T
    block.mlp.c_proj.bias -= 20 * write.sum(dim=1)


def rows(truth: Place, count: int, seed: int, sign: int = 1) -> Any:
    """Rows to learn or choose by: the answer is the opposite corner of the value (`sign` 1), or the value itself."""
    from reftlens.text.batch import batch_from_rows

    g = torch.Generator().manual_seed(seed)

    def some(tokens: range) -> Tensor:
        return torch.tensor(list(tokens))[torch.randint(0, len(tokens), (count,), generator=g)]

    ids = torch.stack([some(FILLERS) for _ in range(TOKENS)], dim=1)
    ids[:, truth.source], ids[:, -1] = some(VALUES), some(DISTRACTORS)
    value = truth.value[ids[:, truth.source]]
    answer = value if sign < 0 else 2**truth.rank - 1 - value
    wrong = torch.rand(count, generator=g) < NOISE
    answer = torch.where(wrong, torch.randint(0, 2**truth.rank, (count,), generator=g), answer)
    full = torch.cat([ids, torch.tensor(list(ANSWERS))[answer][:, None]], dim=1)
    return batch_from_rows(full.tolist(), [[1] * TOKENS + [2]] * count)
