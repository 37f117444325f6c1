"""A network whose causal subspace is known, because it was written by hand."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from architectures import NAMES, D, hf_model, tokenizer

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
VALUES, ANSWERS = range(49, 309), (40, 41, 42, 43)
"""Tokens that carry one of four values, and the four answers."""


@dataclass(frozen=True)
class Planted:
    model: Any
    subspace: torch.Tensor
    """`[D, 2]`: the last token's value is one of four corners in this plane, and its answer is read from it."""
    value: torch.Tensor
    """Of every token of the vocabulary."""


@torch.no_grad()
def planted(seed: int = 0) -> Planted:
    """A neox whose blocks add nothing: the embedding writes the value into a plane, the unembedding reads it there."""
    generator = torch.Generator().manual_seed(seed)
    model = hf_model("neox", seed)
    frame = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    plane = frame[:, :2]
    noise = torch.randn(len(tokenizer()), D - 2, generator=generator) @ frame[:, 2:].T
    value = torch.randint(0, 4, (len(tokenizer()),), generator=generator)
    value[list(VALUES)] = torch.arange(len(VALUES)) % 4
    model.gpt_neox.embed_in.weight.copy_(noise + 3 * CORNERS[value] @ plane.T)
    for block in model.gpt_neox.layers:
        for linear in (block.attention.dense, block.mlp.dense_4h_to_h):
            linear.weight.zero_()
            linear.bias.zero_()
    model.gpt_neox.final_layer_norm.weight.fill_(1.0)
    model.gpt_neox.final_layer_norm.bias.zero_()
    model.lm_head.weight.zero_()
    for answer, corner in zip(ANSWERS, CORNERS, strict=True):
        model.lm_head.weight[answer] = corner @ plane.T
    bridge = TransformerBridge.boot_transformers(NAMES["neox"], hf_model=model, tokenizer=tokenizer(), device="cpu")
    return Planted(bridge.eval(), plane, value)


def pairs(value: torch.Tensor, count: int, seed: int, tokens: Any = VALUES) -> tuple[Any, Any]:
    """`(counterfactual, base's own)`: rows of filler and a value; the source's value is to be answered."""
    from reftlens.data import batch_from_rows

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(list(tokens))[torch.randint(0, len(tokens), (2, count), generator=generator)]
    filler = torch.randint(200, 300, (2, count, 3), generator=generator)
    answer = torch.tensor(ANSWERS)[value[chosen]]
    rows = [[*filler[0, i].tolist(), int(chosen[0, i]), int(answer[1, i])] for i in range(count)]
    theirs = [[*filler[1, i].tolist(), int(chosen[1, i])] for i in range(count)]
    data = batch_from_rows(rows, [[1] * 4 + [2]] * count)
    data = data.with_sources(batch_from_rows(theirs, [[1] * 4] * count))
    own = data.tokens.clone()
    own[data.target_mask] = answer[0]
    return data, replace(data, tokens=own, sources={})
