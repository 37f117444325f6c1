"""Whether weights of a model are still what they were."""

from collections.abc import Iterator

import torch
from torch import nn

from reftlens.bridge.protocol import Bridge, parameters_of


def version_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes whenever a tensor is written to, replaced or moved (tensors of inference mode: replaced or moved)."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def weights_versions(model: Bridge) -> tuple[int, ...]:
    """Changes whenever torch counts a change of a weight, which it does not of one through `.data`."""
    return _versions(parameters_of(model.original_model))


def _versions(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    return tuple(n for p in parameters for part in kept_as(p) for n in version_of(part))


def kept_as(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a weight: itself; of one that torchao quantised, its codes, scales and zero points."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = getattr(weight, "__tensor_flatten__")()  # noqa: B009
    return [part for name in names for part in kept_as(getattr(weight, name))]


def weights_state(model: Bridge) -> tuple[int, ...]:
    """Changes whenever a weight of the model is written to, replaced or moved.

    torch counts no change that is made through `.data`: some 32 numbers of each weight are compared beside its version,
    which shows an update of a whole weight. A few other numbers written through `.data` are not noticed.
    """
    parameters = parameters_of(model.original_model)
    return *_versions(parameters), *_sampled(parameters)


def _sampled(parameters: list[nn.Parameter]) -> Iterator[int]:
    """For each device a hash of some numbers of every weight there."""
    pieces: dict[torch.device, list[torch.Tensor]] = {}
    for p in (part for weight in parameters for part in kept_as(weight)):
        step = max(1, p.numel() // 32) | 1  # odd, so that it does not stay in one column of a matrix
        piece = p.detach().reshape(-1)[::step]
        pieces.setdefault(p.device, []).append(piece if piece.element_size() > 1 else piece.float())
    for of_device in pieces.values():
        yield hash(torch.cat(of_device).view(torch.uint8).cpu().numpy().tobytes())
