"""The places of a transformers model that components of its bridge hold, and the original ones in them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
def swapped(swaps: Sequence[tuple[Slot, nn.Module]]) -> Iterator[None]:
    """Inside the block these modules stand in their slots."""
    try:
        for slot, module in swaps:
            slot.parent._modules[slot.name] = module
        yield
    finally:
        for slot, _ in swaps:
            slot.parent._modules[slot.name] = slot.component


def originals(root: nn.Module) -> AbstractContextManager[None]:
    """Inside the block a transformers model computes without the components of its bridge."""
    return swapped([(slot, slot.original) for slot in slots(root)])
