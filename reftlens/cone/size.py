"""How much a model computes and stores for one token: multiply-adds of its matrix products, numbers of its caches."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from reftlens.bridge.parts import originals
from reftlens.bridge.protocol import parameters_of
from reftlens.bridge.weightless import NEEDED, check_fields
from reftlens.cone.body import Body

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Size:
    """What the cost of a decoder-only model depends on; products are counted in multiply-adds for one token."""

    d: int
    """Width of the residual stream."""
    blocks: tuple[int, ...]
    """Products with the weights of each block, attention over keys left out."""
    projections: int
    """Those of them that make queries, keys and values."""
    attention: int
    """Products for each key that a token attends to: `heads · (d_key + d_value)`."""
    stored: int
    """Numbers of the keys and values of a block: `key/value heads · (d_key + d_value)`."""
    unembedding: int
    bytes: int
    """Of all weights."""
    width: int
    """Bytes of one number."""

    @property
    def into_cache(self) -> int:
        """Products that make keys and values."""
        return self.d * self.stored

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def block(self, number: int, tokens: int, keys: int, *, backward: bool = False) -> int:
        """Multiply-adds of a block for so many tokens, each of which attends to `keys`, padding and future included.

        A backward pass through frozen weights takes one product for each with a weight, and two for each in attention.
        """
        return tokens * (self.blocks[number] + self.attention * keys * (2 if backward else 1))


def size_of(body: Body) -> Size:
    """Counted from the shapes of the weights.

    Raises:
        ValueError: naming a field that the configuration lacks; for layers of another kind than attention.
    """
    config: Any = body.config
    check_fields(config, NEEDED[:3])
    if body.stateful:
        raise ValueError(f"{body.stateful}, whose operations are not those of attention and cannot be counted")
    heads, d = config.num_attention_heads, config.hidden_size
    groups = getattr(config, "num_key_value_heads", None) or heads
    key = value = getattr(config, "head_dim", None) or d // heads
    if getattr(config, "kv_lora_rank", None):  # latent attention: a key and a value for every head
        check_fields(config, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        groups, key, value = heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    with originals(body.model.original_model):
        blocks = [_products(slot.original, config) for slot in body.blocks]
        unembedding = next(iter(body.head.original.parameters())).numel()
    parameters = parameters_of(body.model.original_model)
    return Size(
        d=d,
        blocks=tuple(blocks),
        projections=d * (heads * key + groups * (key + value)),
        attention=heads * (key + value),
        stored=groups * (key + value),
        unembedding=unembedding,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        width=parameters[0].element_size(),
    )


def _products(block: nn.Module, config: Any) -> int:
    """One for each number of a matrix; of the experts' matrices, of those that a token passes."""
    matrices = {name: weight.numel() for name, weight in block.named_parameters() if weight.ndim > 1}
    of_experts = sum(n for name, n in matrices.items() if ".experts." in f".{name}")
    if not of_experts:
        return sum(matrices.values())
    experts = next((n for n in _EXPERTS if hasattr(config, n)), _EXPERTS[0])
    check_fields(config, (experts, "num_experts_per_tok"))
    return sum(matrices.values()) - of_experts + of_experts * config.num_experts_per_tok // getattr(config, experts)
