"""The model under study: one bridge for what acts on its hooks, and fresh plain copies for what acts on its weights."""

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn

from reftlens.bridge.fingerprint import Fingerprint, fingerprint
from reftlens.bridge.offload import spread
from reftlens.bridge.pretrained import (
    DEFAULT_MODEL,
    DTYPES,
    DType,
    find_model,
    load_model,
    no_bars,
    plain_model,
    usual_device,
)
from reftlens.bridge.protocol import parameter_total
from reftlens.errors import check_one_of


class Subject:
    """The model that methods are compared on.

    Args:
        name: a folder, a hub id, or None for the default model, as `load_model` takes it; or a plain transformers model
            in memory, with its `tokenizer`, which stays as it is.
        dtype: of a model that is loaded; one in memory has its own.
        device: likewise.
    """

    def __init__(
        self,
        name: str | nn.Module | None = None,
        *,
        dtype: DType = torch.float32,
        device: str | torch.device = "auto",
        tokenizer: Any = None,
    ) -> None:
        if isinstance(dtype, str):
            check_one_of("dtype", dtype, DTYPES)
            dtype = DTYPES[dtype]
        if isinstance(name, nn.Module) and tokenizer is None:
            raise ValueError("a model in memory comes with its tokenizer: Subject(model, tokenizer=…)")
        if isinstance(name, nn.Module) and spread(name):
            raise ValueError(
                "methods train copies of a model in memory, and a device_map has spread this one over several places: "
                "load it without"
            )
        self._inside, self._tokenizer = (name if isinstance(name, nn.Module) else None), tokenizer
        if isinstance(name, nn.Module):
            first = next(name.parameters())
            self.name, self.dtype, self.device = type(name).__name__, first.dtype, first.device
        else:
            self.name, self.dtype, self.device = name or DEFAULT_MODEL, dtype, usual_device(device)

    @cached_property
    def bridge(self) -> Any:
        """A `TransformerBridge` of the model, made once; its tokenizer is the one to encode with."""
        if self._inside is not None:
            return load_model(copy.deepcopy(self._inside), tokenizer=self._tokenizer)
        return load_model(self.name, dtype=self.dtype, device=self.device, progress=False)

    def plain(self) -> Any:
        """A fresh transformers model with the same weights, in eval mode, for whoever asks to do with as they like.

        Data are encoded by the bridge, `rl.encode(subject.bridge, …)`; the ids mean the same here.
        """
        if self._inside is not None:
            return copy.deepcopy(self._inside).eval()
        with no_bars():
            return plain_model(find_model(self.name), self.dtype).to(self.device).eval()

    def boot(self, inside: nn.Module) -> Any:
        """A bridge of a changed copy of the model, with the same tokenizer; the copy becomes part of it."""
        return load_model(inside, tokenizer=self.bridge.tokenizer)

    @property
    def tokenizer(self) -> Any:
        return self.bridge.tokenizer

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What the model is, by which what was trained on another one is refused."""
        return fingerprint(self.bridge)

    @cached_property
    def parameters(self) -> int:
        return parameter_total(self.bridge)

    def __repr__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')} on {self.device}"
