"""A bridge without weights, of a configuration alone: its hooks and shapes are there, and nothing is allocated."""

from copy import deepcopy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from reftlens.bridge.classes import class_of
from reftlens.bridge.protocol import Bridge, parameters_of
from reftlens.errors import reason_of

NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""Without these fields of a configuration nobody can say what the model computes."""


def weightless(config: Any) -> Bridge:
    """The bridge of the language model that a transformers configuration describes; it cannot be run.

    Raises:
        TypeError: for what is no configuration.
        ValueError: naming the field that is missing; where there is no language model of this configuration, or
            TransformerLens has no adapter for it.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"model is a {type(config).__name__}, expected a TransformerBridge or a configuration, such as "
            "LlamaConfig(…) or AutoConfig.from_pretrained(…)"
        )
    chosen: Any = class_of(config)
    check_fields(config.get_text_config(), NEEDED)
    dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        try:
            model = chosen._from_config(deepcopy(config), dtype=dtype)
        except Exception as error:  # whatever a class says to a field that it cannot use
            raise ValueError(
                f"transformers makes no {chosen.__name__} of this {_name(config)}: {reason_of(error)}"
            ) from error
        name = type(model).__name__
        return build_bridge_from_module(model, name, hf_config=model.config, dtype=dtype, model_name=name).eval()


def is_weightless(model: Bridge) -> bool:
    return isinstance(next(iter(parameters_of(model.original_model)), None), FakeTensor)


def check_fields(config: Any, names: tuple[str, ...]) -> None:
    """Raise `ValueError` where a configuration lacks a field that holds a positive number."""
    for name in names:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{_name(config)} has no {name} ({value!r}), without which its operations cannot be counted: give it "
                f"the field, {_name(config)}({name}=…)"
            )


def _name(config: Any) -> str:
    return type(config).__name__
