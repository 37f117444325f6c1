"""Weights that `accelerate` keeps on disk or in memory between passes, for a model loaded with a `device_map`.

While a module does not compute, such a weight of it is a `meta` tensor, without numbers; a hook on the module fetches
the numbers before its forward pass and drops them after it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def spread(root: nn.Module) -> bool:
    """Whether accelerate has put the parts of a model where its `device_map` says; it cannot be moved then."""
    every = getattr(root, "hf_device_map", None) or {}
    return len(set(every.values())) > 1 or any(_store(module) is not None for module in root.modules())


def runs_on(module: nn.Module, weight: Tensor) -> torch.device:
    """The device that a module computes on, by one of its weights."""
    for hook in _hooks(module) if weight.is_meta else ():
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    return weight.device


def fetched(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight with its numbers: itself, or a copy of it read from where accelerate keeps it."""
    kept = _store(module) if weight.is_meta else None
    return weight if kept is None else kept[name]


def numbers_of(weight: Tensor) -> Tensor:
    """A weight of a model in float64 on the CPU.

    Raises:
        ValueError: where accelerate keeps it elsewhere between passes.
    """
    if weight.is_meta:
        raise ValueError(
            "weights are looked at here, and accelerate keeps some of this model's on disk or apart between passes: "
            "load the model without a device_map that offloads"
        )
    return weight.detach().cpu().double()


def place_of(module: nn.Module, name: str, weight: Tensor) -> Tensor | Path:
    """Where the numbers of a weight are: a tensor in memory, or a file, which is not read."""
    kept = _store(module) if weight.is_meta else None
    return weight if kept is None else _place_in(kept, name)


def _place_in(kept: Any, name: str) -> Tensor | Path:
    """Where a store of accelerate has a weight: TransformerLens chains one with a bias of its own."""
    if hasattr(kept, "maps"):
        kept = next(part for part in kept.maps if name in part)
    if hasattr(kept, "prefix"):
        return _place_in(kept.dataset, kept.prefix + name)
    in_memory = getattr(kept, "state_dict", kept)
    if name in in_memory:
        return in_memory[name]
    return Path(kept.index[name].get("safetensors_file") or os.path.join(kept.save_folder, f"{name}.dat"))


def _store(module: nn.Module) -> Any:
    """Where accelerate keeps what it has taken away from a module, by the names it has there; else None."""
    return next((hook.weights_map for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on a module; torch's own are not among them."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
