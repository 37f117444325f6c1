"""A network whose causal subspace is known, because it was written by hand."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from architectures import D_MLP, NAMES, D, hf_model, tokenizer

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
VALUES, ANSWERS = range(49, 309), (40, 41, 42, 43)
"""Tokens that carry a value, and the answers where there are four values."""


def answers_of(rank: int) -> range:
    """The answers to `2 ** rank` values."""
    return range(44 - 2**rank, 44)


@dataclass(frozen=True)
class Planted:
    model: Any
    subspace: torch.Tensor
    """`[D, rank]`: the last token's value is a corner `±1 … ±1` in it, and its answer is read from there."""
    value: torch.Tensor
    """Of every token of the vocabulary."""


@cache
@torch.no_grad()
def planted(seed: int = 0, rank: int = 2) -> Planted:
    """A neox whose blocks add nothing: the embedding writes the value into a subspace, the unembedding reads it there.

    All `rank` directions are needed to name the `2 ** rank` answers. One for each seed and process; read-only.
    """
    generator = torch.Generator().manual_seed(seed)
    model = hf_model("neox", seed)
    frame = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    plane, corners = frame[:, :rank], torch.tensor(list(product((1.0, -1.0), repeat=rank)))
    noise = torch.randn(len(tokenizer()), D - rank, generator=generator) @ frame[:, rank:].T
    value = torch.randint(0, 2**rank, (len(tokenizer()),), generator=generator)
    value[list(VALUES)] = torch.arange(len(VALUES)) % 2**rank
    model.gpt_neox.embed_in.weight.copy_(noise + 3 * corners[value] @ plane.T)
    for block in model.gpt_neox.layers:
        for linear in (block.attention.dense, block.mlp.dense_4h_to_h):
            linear.weight.zero_()
            linear.bias.zero_()
    model.gpt_neox.final_layer_norm.weight.fill_(1.0)
    model.gpt_neox.final_layer_norm.bias.zero_()
    model.lm_head.weight.zero_()
    for answer, corner in zip(answers_of(rank), corners, strict=True):
        model.lm_head.weight[answer] = corner @ plane.T
    bridge = TransformerBridge.boot_transformers(NAMES["neox"], hf_model=model, tokenizer=tokenizer(), device="cpu")
    return Planted(bridge.eval(), plane, value)


def pairs(value: torch.Tensor, count: int, seed: int, tokens: Any = VALUES, answers: Any = ANSWERS) -> tuple[Any, Any]:
    """`(counterfactual, base's own)`: rows of filler and a value; the source's value is to be answered."""
    from reftlens.text.batch import batch_from_rows

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(list(tokens))[torch.randint(0, len(tokens), (2, count), generator=generator)]
    filler = torch.randint(200, 300, (2, count, 3), generator=generator)
    answer = torch.tensor(list(answers))[value[chosen]]
    rows = [[*filler[0, i].tolist(), int(chosen[0, i]), int(answer[1, i])] for i in range(count)]
    theirs = [[*filler[1, i].tolist(), int(chosen[1, i])] for i in range(count)]
    data = batch_from_rows(rows, [[1] * 4 + [2]] * count)
    data = data.with_sources(batch_from_rows(theirs, [[1] * 4] * count))
    own = data.tokens.clone()
    own[data.target_mask] = answer[0]
    return data, replace(data, tokens=own, sources={})


@dataclass(frozen=True)
class PlantedNeurons:
    """Directions among the neurons of block 1, orthonormal columns of one frame of the `D_MLP` neurons."""

    model: Any
    real: torch.Tensor
    """Holds the value, and W_out reads it."""
    dormant: torch.Tensor
    """W_out reads it three times as strongly; it hardly varies, and not with the value."""
    disconnected: torch.Tensor
    """Holds the value as well, and W_out does not read it."""
    unread: torch.Tensor
    """`[D_MLP, n]`: the rest of what W_out does not read; varies with everything but the value."""
    value: torch.Tensor
    """Of every token of the vocabulary: 0 or 1, or for one that carries none 0."""


@cache
@torch.no_grad()
def planted_neurons(seed: int = 0) -> PlantedNeurons:
    """A neox whose only active part is the MLP of block 1, in its linear range; answers are read from what it writes.

    The embedding writes the value `±3` along one residual direction; the MLP copies it to two neuron directions, of
    which W_out reads one and writes it where the unembedding reads.
    """
    generator = torch.Generator().manual_seed(seed)

    def frame(d: int, first: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(torch.cat([first, torch.randn(d, d - 1, generator=generator)], dim=1)).Q

    model = hf_model("neox", seed)
    stream = frame(D, torch.ones(D, 1))[:, 1:]  # orthogonal to what the norms centre away
    neurons = frame(D_MLP, torch.randn(D_MLP, 1, generator=generator))
    real, dormant, disconnected, read, unread = neurons.split([1, 1, 1, 14, D_MLP - 17], dim=1)
    holds, answers, noise = stream.split([1, 1, D - 3], dim=1)
    value = torch.zeros(len(tokenizer()), dtype=torch.long)
    value[list(VALUES)] = torch.arange(len(VALUES)) % 2
    drawn = torch.randn(len(tokenizer()), D - 3, generator=generator)
    model.gpt_neox.embed_in.weight.copy_(drawn @ noise.T + 3 * (2.0 * value[:, None] - 1) @ holds.T)
    for block in model.gpt_neox.layers:
        for linear in (block.attention.dense, block.mlp.dense_4h_to_h):
            linear.weight.zero_()
            linear.bias.zero_()
    block = model.gpt_neox.layers[1]
    for norm in (block.post_attention_layernorm, model.gpt_neox.final_layer_norm):
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    mixing = torch.randn(D - 3, D_MLP - 3, generator=generator) / D**0.5
    into = 2 * (real + disconnected) @ holds.T + 0.2 * dormant @ noise[:, :1].T
    block.mlp.dense_h_to_4h.weight.copy_(into + torch.cat([read, unread], dim=1) @ mixing.T @ noise.T)
    block.mlp.dense_h_to_4h.bias.fill_(20.0)  # gelu(20 + x) = 20 + x
    out = answers @ (real + 3 * dormant).T + noise[:, :1] @ (real - dormant).T + noise[:, 1:15] @ read.T
    block.mlp.dense_4h_to_h.weight.copy_(out)
    block.mlp.dense_4h_to_h.bias.copy_(-20 * out.sum(dim=1))
    model.lm_head.weight.zero_()
    model.lm_head.weight[list(ANSWERS[:2])] = torch.cat([-answers, answers], dim=1).T
    bridge = TransformerBridge.boot_transformers(NAMES["neox"], hf_model=model, tokenizer=tokenizer(), device="cpu")
    return PlantedNeurons(bridge.eval(), real, dormant, disconnected, unread, value)
