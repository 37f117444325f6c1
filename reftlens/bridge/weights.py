"""Whether weights of a model are still what they were."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from reftlens.bridge.offload import place_of
from reftlens.bridge.protocol import Bridge, modules_of


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever a tensor is written to, replaced or moved (tensors of inference mode: replaced or moved)."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def weights_versions(model: Bridge) -> tuple[int, ...]:
    """Changes whenever torch counts a change of a weight, which it does not of one through `.data`."""
    return _versions(*kept_by(model.original_model))


def kept_by(root: nn.Module, *, buffers: bool = False) -> tuple[list[Tensor], list[Path]]:
    """The tensors that hold the weights of a model, and the files of those that accelerate keeps on disk."""
    tables = [(m, table) for m in modules_of(root) for table in (m._parameters, m._buffers if buffers else {}) if table]
    named = [(m, name, tensor) for m, table in tables for name, tensor in table.items() if tensor is not None]
    every = [place_of(m, name, tensor) if tensor.is_meta else tensor for m, name, tensor in named]
    distinct = list({id(each) if isinstance(each, Tensor) else each: each for each in every}.values())
    tensors = [part for each in distinct if isinstance(each, Tensor) for part in kept_as(each)]
    return tensors, [each for each in distinct if isinstance(each, Path)]


def _versions(tensors: list[Tensor], files: list[Path]) -> tuple[int, ...]:
    return *(n for tensor in tensors for n in version_of(tensor)), *versions_of_files(files)


def versions_of_files(files: list[Path]) -> tuple[int, ...]:
    """Changes when one of the files is written to, as far as its size and its time tell."""
    return tuple(n for told in map(Path.stat, files) for n in (told.st_mtime_ns, told.st_size))


def kept_as(weight: Tensor) -> list[Tensor]:
    """The tensors that hold a weight: itself; of one that torchao or bitsandbytes quantised, codes and scales."""
    if not hasattr(weight, "__tensor_flatten__"):
        scales = [getattr(getattr(weight, "quant_state", None), "absmax", None), getattr(weight, "SCB", None)]
        return [weight, *(scale for scale in scales if isinstance(scale, Tensor))]
    names, _ = getattr(weight, "__tensor_flatten__")()  # noqa: B009
    return [part for name in names for part in kept_as(getattr(weight, name))]


def weights_state(model: Bridge) -> tuple[int, ...]:
    """Changes whenever a weight of the model is written to, replaced or moved.

    torch counts no change that is made through `.data`: some 32 numbers of each weight are compared beside its version,
    which shows an update of a whole weight. A few other numbers written through `.data` are not noticed.
    """
    tensors, files = kept_by(model.original_model)
    return *_versions(tensors, files), *_sampled(tensors)


def _sampled(tensors: list[Tensor]) -> Iterator[int]:
    """For each device a hash of some numbers of every weight there."""
    pieces: dict[torch.device, list[Tensor]] = {}
    for p in tensors:
        step = max(1, p.numel() // 32) | 1  # odd, so that it does not stay in one column of a matrix
        piece = p.detach().reshape(-1)[::step]
        pieces.setdefault(p.device, []).append(piece if piece.element_size() > 1 else piece.float())
    for of_device in pieces.values():
        yield hash(torch.cat(of_device).view(torch.uint8).cpu().numpy().tobytes())
