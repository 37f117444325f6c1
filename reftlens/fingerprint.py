"""What a model is, in a few numbers: enough to refuse loading an intervention into another one.

Sampled weights are kept as numbers and compared to half a part in a hundred, so that dtype (bfloat16 keeps two to
three digits) and device do not matter; another checkpoint differs in most of them.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from reftlens.model import underlying

_TENSORS, _NUMBERS = 16, 8
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly, and fall on no grid of rows or columns
_KEPT_CONFIG = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "intermediate_size", "vocab_size", "hidden_act", "activation_function", "rope_theta",
    "rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "sliding_window",
    "tie_word_embeddings", "head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """A model as the store remembers it."""

    name: str
    config: dict[str, Any]
    weights: dict[str, list[float]]
    """A few entries of a few weight matrices, by their Hugging Face names, four digits each."""
    tokenizer: str | None
    """SHA-256 of the vocabulary; None for a model without tokenizer."""
    chat_template: str | None
    """SHA-256 of the template."""
    compatibility_mode: bool
    """Whether TransformerLens has processed the weights (its compatibility mode folds norms and centres weights,
    which moves the residual stream)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: "Fingerprint") -> list[str]:
        """What about `other` is not as it was here, in words; empty if an intervention can move."""
        found = []
        if self.compatibility_mode != other.compatibility_mode:
            on, off = ("on", "off") if self.compatibility_mode else ("off", "on")
            found.append(
                f"it was trained with the weight processing of TransformerLens' compatibility mode {on}, and this "
                f"model has it {off}"
            )
        for key in sorted(self.config.keys() | other.config.keys()):
            if self.config.get(key) != other.config.get(key):
                found.append(f"{key} was {self.config.get(key)!r} and is {other.config.get(key)!r}")
        if not found and not _close(self.weights, other.weights):
            found.append("the configuration is the same, and the weights are others")
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            found.append("the tokenizer's vocabulary is another one")
        return found

    def template_changed(self, other: "Fingerprint") -> bool:
        """Whether chats would be written in another way than they were here."""
        return bool(self.tokenizer and other.tokenizer) and self.chat_template != other.chat_template


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a `TransformerBridge` or of a plain transformers model: the same for both."""
    root: Any = underlying(model)
    tokenizer = getattr(model, "tokenizer", None)
    config = root.config.to_dict() if hasattr(root, "config") else {}
    name = model.cfg.model_name if hasattr(model, "cfg") else config.get("_name_or_path") or type(root).__name__
    template = getattr(tokenizer, "chat_template", None)
    return Fingerprint(
        name=name,
        config=json.loads(json.dumps({k: config[k] for k in _KEPT_CONFIG if k in config}, default=str)),
        weights=_sampled(root),
        tokenizer=None if tokenizer is None else _sha(json.dumps(tokenizer.get_vocab(), sort_keys=True)),
        chat_template=None if not template else _sha(str(template)),
        compatibility_mode=weights_processed(model),
    )


def weights_processed(model: Any) -> bool:
    """Whether TransformerLens has folded and centred the weights of this model."""
    return bool(getattr(model, "_weights_processed", getattr(model, "compatibility_mode", False)))


def plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the transformers model with their names there: inside a bridge, its wrappers are looked through.

    A bridge puts components of its own into the transformers model, and beside a joint q/k/v layer its three parts.
    """
    while isinstance(inner := module._modules.get("_original_component"), nn.Module):
        module = inner
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{name}.{child_name}" if name else child_name)


def _sampled(root: nn.Module) -> dict[str, list[float]]:
    """Entries spread over weight matrices that are spread over the model."""
    named = {
        f"{name}.{key}": parameter.detach()
        for name, module in plain_modules(root)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 2 and parameter.is_floating_point()
    }
    names = sorted(named)
    chosen = [names[i * len(names) // _TENSORS] for i in range(_TENSORS)] if len(names) > _TENSORS else names
    result = {}
    for name in chosen:
        flat = named[name].flatten()
        index = torch.tensor([int(flat.numel() * (i * _GOLDEN % 1)) for i in range(1, _NUMBERS + 1)])
        result[name] = [float(f"{x:.4g}") for x in flat[index.to(flat.device)].double().tolist()]
    return result


def _close(first: dict[str, list[float]], second: dict[str, list[float]]) -> bool:
    """Equal but for rounding to bfloat16 (at most 0.2 %) and to four digits (at most 0.05 %), on either side."""
    if first.keys() != second.keys():
        return False
    return all(
        math.isclose(a, b, rel_tol=5e-3, abs_tol=1e-6)
        for name in first
        for a, b in zip(first[name], second[name], strict=True)
    )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
