"""The parts of a bridged model inside its transformers model, and how they are rearranged for one forward pass.

A bridge puts a component of its own into each place of the transformers model. Inside `arranged`, components whose
hooks nobody uses give their place back to the original ones; blocks below the first edit pass their input on; a
stored residual stream enters where it was captured; and the unembedding sees only the tokens that are scored. All
of it is undone when the block ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.mla_attention import MLAAttentionBridge
from transformer_lens.model_bridge.generalized_components.unembedding import UnembeddingBridge

from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.foreign import foreign_hook, hook_points, modules
from reftlens.bridge.lengths import text_config
from reftlens.bridge.parts import Slot, slots, swapped
from reftlens.bridge.protocol import Bridge, device_of, devices_of, modules_of
from reftlens.bridge.trial import trial
from reftlens.text.beginnings import PASS

_LAUNCHED = 3.3e11
"""Multiply-adds in 16 bits for which a GPU takes as long as a processor takes to launch a block, forward and back."""


class Body:
    """Where the blocks and the unembedding of a bridged model are.

    Raises:
        ValueError: saying what is missing, for a model without one stack of blocks and an unembedding.
    """

    def __init__(self, model: Bridge) -> None:
        self.model = model
        self.config = text_config(model)
        self.kind = device_of(model).type  # of the device that passes run on
        every = list(slots(model.original_model))
        by_component = {id(slot.component): slot for slot in every}

        def slot_of(name: str, component: Any) -> Slot:
            if id(component) not in by_component:
                raise ValueError(f"{model.cfg.model_name} has no {name} of its own")
            return by_component[id(component)]

        stack = list(getattr(model, "blocks", []))
        if not stack:
            raise ValueError(f"{model.cfg.model_name} has no single stack of blocks")
        self.blocks = [slot_of(f"block {i}", block) for i, block in enumerate(stack)]
        self.head = slot_of("unembedding", getattr(model, "unembed", None))
        self.inside = [list(slots(slot.original)) for slot in self.blocks]
        within = {id(s.component) for inner in self.inside for s in inner} | {id(s.component) for s in self.blocks}
        self.outside = [slot for slot in every if id(slot.component) not in within]
        self._free_slots: dict[frozenset[int], list[Slot]] = {}
        self._inner_points: dict[int, frozenset[int]] = {}
        self._points, self._modules = hook_points(model), modules(model)
        self._latent = any(isinstance(slot.component, MLAAttentionBridge) for slot in every)
        self._unsuited = self._why_unsuited()

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def may_be_plain(self) -> bool:
        """Whether original components may stand beside the bridge's: not once weights were processed, nor where the
        two store different keys, as they do of latent attention."""
        return not self._latent and not getattr(self.model, "compatibility_mode", False)

    @property
    def may_trim(self) -> bool:
        """Whether the last block may be computed at some tokens only; GPT-Neo's takes its queries for the last ones."""
        return not any(type(m).__name__.startswith("GPTNeoAttention") for m in self.blocks[-1].original.modules())

    @property
    def stateful(self) -> str:
        """Why nothing goes on from stored keys and values of earlier tokens, or ""; blocks may still be skipped."""
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        return f"it has layers of the kind {', '.join(sorted(kinds))}" if kinds else ""

    @property
    def pass_cost(self) -> float:
        """What one more pass through the blocks costs at a step, in tokens.

        On a GPU that is the time in which a block is launched, whatever its size: 3 ms on an H200, in which one of
        Llama-3-8B takes 1500 tokens forward and back (docs/performance.md).
        """
        if self.kind == "cpu":
            return PASS["cpu"]
        return max(PASS[self.kind], self._launched)

    @cached_property
    def _launched(self) -> float:
        """The tokens that a GPU computes while a block is launched; a sixth of them in float32, which is assumed."""
        weights = list(self.blocks[0].original.parameters())
        tokens = _LAUNCHED / max(1, sum(w.numel() for w in weights))
        largest = max(weights, key=torch.numel, default=None)
        return tokens if largest is not None and largest.element_size() <= 2 else tokens / 6

    def obstacle(self) -> str:
        """Why nothing of this model, as it is now, can be reused, or ""."""
        hf = self.model.original_model
        if self._unsuited:
            return self._unsuited
        if hf.training and any(getattr(m, "gradient_checkpointing", False) for m in modules_of(hf)):
            return "gradient checkpointing is on, which computes blocks again without the stored keys"
        hook = foreign_hook(self._points, self._modules)
        return f"another hook is active at {hook}" if hook else ""

    def _why_unsuited(self) -> str:
        """The part of `obstacle` that does not change."""
        hf, tried = self.model.original_model, trial(self.model)
        if tried.looks_ahead or not tried.predicts:
            return "it does not predict tokens from those before them"
        if getattr(self.config, "num_kv_shared_layers", None):
            return "its upper blocks attend to keys and values of lower ones"
        if tried.minds_padding:
            return "padding on the left changes what is computed of the tokens after it"
        return "the model is spread over several devices" if len(devices_of(hf)) > 1 else ""

    @contextmanager
    def arranged(
        self, places: Sequence[tuple[Slot, nn.Module]] = (), *, plain: bool, used: frozenset[int]
    ) -> Iterator[None]:
        """Put modules into slots; with `plain`, original ones go where no hook point of `used` (ids) is needed."""
        taken = {id(slot) for slot, _ in places}
        free = self._free(used) if plain else []
        swaps = [*((slot, slot.original) for slot in free if id(slot) not in taken), *places]
        attention = self._attention("sdpa" if plain and self._may_use_sdpa(used) else None)
        with exclusive(self.model), attention, swapped(swaps):
            yield

    def piece(self, slot: Slot, *, plain: bool, used: frozenset[int]) -> nn.Module:
        """What fills `slot` when nothing else is put there."""
        return slot.original if plain and any(slot is free for free in self._free(used)) else slot.component

    @property
    def cut(self) -> nn.Linear | None:
        """The unembedding, where a few of its rows give the logits of their tokens: a plain product, not quantised."""
        inner = self.head.original
        if type(inner) is not nn.Linear or type(self.head.component) is not UnembeddingBridge:
            return None
        return None if inner._forward_hooks or inner._forward_pre_hooks or "forward" in vars(inner) else inner

    @contextmanager
    def _attention(self, implementation: str | None) -> Iterator[None]:
        """The attention function that original components use; the bridge's own always compute eagerly."""
        before = getattr(self.config, "_attn_implementation", None)
        if implementation is None or before != "eager" or self.config is None:
            yield
            return
        try:
            self.config._attn_implementation = implementation
            yield
        finally:
            self.config._attn_implementation = before

    def _may_use_sdpa(self, used: frozenset[int]) -> bool:
        """Where every block's inside is original, and the attention is one that the fast function knows."""
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        able = bool(getattr(self.model.original_model, "_supports_sdpa", False))
        return able and not capped and not any(self._needs_inside(i, used) for i in range(self.depth))

    def _free(self, used: frozenset[int]) -> list[Slot]:
        """Slots whose components may step aside."""
        # In float64 the mask of transformers' eager attention overflows its float32 softmax: NaN in padded rows.
        double = next(iter(self.model.original_model.parameters())).dtype == torch.float64
        if used not in self._free_slots and double and not self._may_use_sdpa(used):
            self._free_slots[used] = []
        if used not in self._free_slots:
            free = [slot for slot in self.outside if not used & self._points_in(slot)]
            for i, slot in enumerate(self.blocks):
                if not self._needs_inside(i, used):
                    free += self.inside[i] if used & self._points_in(slot) else [*self.inside[i], slot]
            self._free_slots[used] = free
        return self._free_slots[used]

    def _needs_inside(self, i: int, used: frozenset[int]) -> bool:
        """Whether a hook within block `i` is used, its own input and output apart."""
        block: Any = self.blocks[i].component
        return bool(used & self._points_in(self.blocks[i]) - {id(block.hook_in), id(block.hook_out)})

    def uses_more_than_output(self, used: frozenset[int]) -> bool:
        """Whether a hook of the last block is used, its output apart."""
        last: Any = self.blocks[-1]
        return bool(used & self._points_in(last) - {id(last.component.hook_out)})

    def _points_in(self, slot: Slot) -> frozenset[int]:
        key = id(slot.component)
        if key not in self._inner_points:
            points = (id(m) for m in slot.component.modules() if isinstance(m, HookPoint))
            self._inner_points[key] = frozenset(points)
        return self._inner_points[key]
