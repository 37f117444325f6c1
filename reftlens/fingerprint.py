"""What a model is, in a few numbers: enough to refuse loading an intervention into another one.

Sampled weights are kept as numbers and compared to one part in a hundred, so that dtype (bfloat16 keeps three
digits) and device do not matter; a different checkpoint differs in most of them.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from reftlens.model import underlying

_TENSORS, _NUMBERS = 16, 4
_KEPT_CONFIG = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "intermediate_size", "vocab_size", "hidden_act", "activation_function", "rope_theta",
    "rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "sliding_window",
    "tie_word_embeddings", "head_dim", "max_position_embeddings", "n_positions",
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """A model as the store remembers it."""

    name: str
    config: dict[str, Any]
    weights: dict[str, list[float]]
    """A few entries of a few weight matrices, by their Hugging Face names, three digits each."""
    tokenizer: str | None
    """SHA-256 of the vocabulary."""
    chat_template: str | None
    """SHA-256 of the template."""
    compatibility_mode: bool
    """TransformerLens' compatibility mode folds norms and centres weights, which moves the residual stream."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: "Fingerprint") -> list[str]:
        """What about `other` is not as it was here, in words; empty if an intervention can move."""
        found = []
        if self.compatibility_mode != other.compatibility_mode:
            on, off = ("on", "off") if self.compatibility_mode else ("off", "on")
            found.append(f"it was trained with TransformerLens' compatibility mode {on}, and this model has it {off}")
        for key in sorted(self.config.keys() | other.config.keys()):
            if self.config.get(key) != other.config.get(key):
                found.append(f"{key} was {self.config.get(key)!r} and is {other.config.get(key)!r}")
        if not found and not _close(self.weights, other.weights):
            found.append("the configuration is the same, and the weights are others")
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            found.append("the tokenizer's vocabulary is another one")
        return found


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a `TransformerBridge` or of a plain transformers model."""
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
        compatibility_mode=bool(getattr(model, "compatibility_mode", False)),
    )


def _sampled(root: nn.Module) -> dict[str, list[float]]:
    named: dict[str, Tensor] = {}
    for name, parameter in root.named_parameters():
        name = name.replace("_original_component.", "")
        if parameter.ndim == 2 and parameter.is_floating_point():
            named[name] = parameter
    names = sorted(named)
    step = max(1, len(names) // _TENSORS)
    result = {}
    for name in names[::step][:_TENSORS]:
        flat = named[name].detach().flatten()
        index = [int(flat.numel() * (i + 0.5) / _NUMBERS) for i in range(_NUMBERS)]
        result[name] = [float(f"{flat[i].float().item():.3g}") for i in index]
    return result


def _close(first: dict[str, list[float]], second: dict[str, list[float]]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-6)
        for name in first
        for a, b in zip(first[name], second[name], strict=True)
    )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
