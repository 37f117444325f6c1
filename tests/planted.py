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


def pairs(
    value: torch.Tensor, count: int, seed: int, tokens: Any = VALUES, answers: Any = ANSWERS, fill: Any = (200, 300)
) -> tuple[Any, Any]:
    """`(counterfactual, base's own)`: rows of filler and a value; the source's value is to be answered."""
    from reftlens.text.batch import batch_from_rows

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(list(tokens))[torch.randint(0, len(tokens), (2, count), generator=generator)]
    filler = torch.randint(*fill, (2, count, 3), generator=generator)
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


FILLER = (4, 24)
"""Tokens without a value, for rows of `planted_heads`."""


@dataclass(frozen=True)
class PlantedHeads:
    """Two heads write what the answer is read from; all others write beside it."""

    model: Any
    heads: tuple[tuple[int, int], tuple[int, int]]
    """`(layer, head)` of each bit of the value."""
    value: torch.Tensor
    """Of every token of the vocabulary: 0 to 3 for `VALUES`; fillers write none."""


@cache
@torch.no_grad()
def planted_heads(seed: int = 0) -> PlantedHeads:
    """A neox whose MLPs add nothing and whose heads look at all tokens alike; two of its heads copy one bit each.

    The embedding writes a bit along each of two directions; one head copies the first to where the unembedding reads
    it, another, in any layer, the second. The other heads copy noise to where nothing is read.
    """
    generator = torch.Generator().manual_seed(seed)
    model = hf_model("neox", seed)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    first, second = torch.randperm(layers * heads, generator=generator)[:2].tolist()
    ones = torch.cat([torch.ones(D, 1), torch.randn(D, D - 1, generator=generator)], dim=1)
    stream = torch.linalg.qr(ones).Q[:, 1:]  # orthogonal to what the norms centre away
    holds, reads, noise = stream[:, :2], stream[:, 2:4], stream[:, 4:]
    corners = torch.tensor(list(product((1.0, -1.0), repeat=2)))
    value = torch.zeros(len(tokenizer()), dtype=torch.long)
    value[list(VALUES)] = torch.arange(len(VALUES)) % 4
    written = torch.zeros(len(value), 2)
    written[list(VALUES)] = corners[value[list(VALUES)]]
    drawn = torch.randn(len(value), noise.shape[1], generator=generator)
    model.gpt_neox.embed_in.weight.copy_(drawn @ noise.T + 3 * written @ holds.T)
    for n, block in enumerate(model.gpt_neox.layers):
        for linear in (block.attention.query_key_value, block.attention.dense, block.mlp.dense_4h_to_h):
            linear.weight.zero_()
            linear.bias.zero_()
        block.input_layernorm.weight.fill_(1.0)
        block.input_layernorm.bias.zero_()
        width = D // heads
        qkv = block.attention.query_key_value.weight.view(heads, 3, width, D)
        out = block.attention.dense.weight.view(D, heads, width)
        for head in range(heads):
            place = n * heads + head
            bit = {first: 0, second: 1}.get(place)
            columns = torch.randperm(noise.shape[1], generator=generator)[: 2 * width]
            if bit is None:
                qkv[head, 2] = noise[:, columns[:width]].T
                out[:, head] = noise[:, columns[width:]]
            else:
                into = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
                qkv[head, 2] = into[:, :1] @ holds[:, bit : bit + 1].T
                out[:, head] = 8 * reads[:, bit : bit + 1] @ into[:, :1].T
    model.gpt_neox.final_layer_norm.weight.fill_(1.0)
    model.gpt_neox.final_layer_norm.bias.zero_()
    model.lm_head.weight.zero_()
    model.lm_head.weight[list(ANSWERS)] = corners @ reads.T
    bridge = TransformerBridge.boot_transformers(NAMES["neox"], hf_model=model, tokenizer=tokenizer(), device="cpu")
    return PlantedHeads(bridge.eval(), (divmod(first, heads), divmod(second, heads)), value)
