"""Passes that go on from a beginning of the cone that was computed once for all of them."""

import torch
from torch import Tensor

KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of the blocks of a cone."""


class Begun:
    """Keys and values of a beginning; `apart`, from its graph, to which their gradient is sent back at once."""

    def __init__(self, computed: KeysAndValues, *, apart: bool) -> None:
        self.computed, self.handed = computed, computed
        if apart:
            self.handed = [(_leaf(keys), _leaf(values)) for keys, values in computed]

    def send_back(self) -> None:
        """After the backward passes of all that went on from it."""
        pairs = zip(self.computed, self.handed, strict=True)
        both = [(t, leaf) for ts, leaves in pairs for t, leaf in zip(ts, leaves, strict=True) if leaf is not t]
        reached = [(t, leaf.grad) for t, leaf in both if leaf.grad is not None]
        if reached:
            tensors, grads = zip(*reached, strict=True)
            torch.autograd.backward(tensors, grads)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor
