"""The places of a transformers model that components of its bridge hold, and the original ones in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


@dataclass(frozen=True)
class Slot:
    """A place in the transformers model, the bridge's component that holds it, and the original one."""

    parent: nn.Module
    name: str
    component: nn.Module
    original: nn.Module


def slots(module: nn.Module, seen: set[int] | None = None) -> Iterator[Slot]:
    """Every place below `module` that a component of the bridge holds."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, child in list(module._modules.items()):
        if isinstance(child, GeneralizedComponent) and child.original_component is not None:
            yield Slot(module, name, child, child.original_component)
            yield from slots(child.original_component, seen)
        elif child is not None:
            yield from slots(child, seen)


@contextmanager
def originals(root: nn.Module) -> Iterator[None]:
    """Inside the block a transformers model computes without the components of its bridge."""
    every = list(slots(root))
    try:
        for slot in every:
            slot.parent._modules[slot.name] = slot.original
        yield
    finally:
        for slot in every:
            slot.parent._modules[slot.name] = slot.component
