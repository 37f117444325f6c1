"""What a model is, in a few numbers: enough to refuse loading an intervention into another one.

Of every weight `W` the norm is kept, and `uᵀ W v` for three fixed pairs of random vectors. They are compared to 0.7 %
of the norm, so that dtype (rounding to bfloat16 moves them by 0.1 %) and device do not matter. A change of `W` by 2 %
of its norm is noticed with odds of 50 to one whatever its shape, a larger one nearly always: a fine-tuned model, an
edit of one layer. Less than 0.7 % in every single weight is not.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from reftlens.bridge.offload import fetched
from reftlens.bridge.protocol import bos_of, underlying
from reftlens.bridge.source import Source, source_of

_PAIRS = 3
_ELEMENTS = 2**20  # of a weight, in float64 at once
_CONFIG_KEYS = (
    *("model_type", "vocab_size", "tie_word_embeddings", "sliding_window"),
    *("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "intermediate_size"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("hidden_act", "activation_function", "rope_theta", "rope_parameters"),
    *("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
)


@dataclass(frozen=True)
class Fingerprint:
    """A model as the store remembers it."""

    name: str
    config: dict[str, Any]
    weights: dict[str, list[float]]
    """By the Hugging Face name of every weight: its norm, and three projections of it."""
    tokenizer: str | None
    """SHA-256 of the vocabulary; None for a model without tokenizer."""
    chat_template: str | None
    """SHA-256 of the template."""
    compatibility_mode: bool
    """Whether TransformerLens has processed the weights (its compatibility mode folds norms and centres weights,
    which moves the residual stream)."""
    source: Source
    """Where the weights were read from."""
    bos: str | None
    """The BOS token that the tokenizer puts in front of text; None where it puts none, or there is no tokenizer."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: "Fingerprint") -> list[str]:
        """What about `other` is not as it was here, in words; empty if an intervention can move."""
        changes = []
        if self.compatibility_mode != other.compatibility_mode:
            on, off = ("on", "off") if self.compatibility_mode else ("off", "on")
            changes.append(
                f"it was trained with the weight processing of TransformerLens' compatibility mode {on}, and this "
                f"model has it {off}"
            )
        for key in sorted(self.config.keys() | other.config.keys()):
            if self.config.get(key) != other.config.get(key):
                changes.append(f"{key} was {self.config.get(key)!r} and is {other.config.get(key)!r}")
        others = [] if changes else _other(self.weights, other.weights)
        if others:
            changes.append(
                f"the configuration is the same, and {len(others)} of {len(self.weights)} weights are others "
                f"({', '.join(others[:3])}{', …' if len(others) > 3 else ''})"
            )
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            changes.append("the tokenizer's vocabulary is another one")
        return changes

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
        config=json.loads(json.dumps({k: config[k] for k in _CONFIG_KEYS if k in config}, default=str)),
        weights=_probed(root),
        tokenizer=None if tokenizer is None else _sha(json.dumps(tokenizer.get_vocab(), sort_keys=True)),
        chat_template=None if not template else _sha(str(template)),
        compatibility_mode=weights_processed(model),
        source=source_of(root),
        bos=None if tokenizer is None or bos_of(tokenizer) is None else tokenizer.bos_token,
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


@torch.no_grad()
def _probed(root: nn.Module) -> dict[str, list[float]]:
    """Norm and probes of every weight, four digits each."""
    named = {
        f"{name}.{key}": (module, key, parameter)
        for name, module in plain_modules(root)
        for key, parameter in module._parameters.items()
        if parameter is not None and (parameter.is_floating_point() or _packed(parameter)) and parameter.numel()
    }
    return {name: [float(f"{x:.4g}") for x in _probes(_unpacked(*named[name]))] for name in sorted(named)}


def _packed(weight: nn.Parameter) -> bool:
    """Whether bitsandbytes holds a weight in 4 or 8 bits, as whole numbers."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def _unpacked(module: nn.Module, key: str, weight: nn.Parameter) -> torch.Tensor:
    """The numbers that a weight stands for, wherever it is and however it is quantised."""
    if _packed(weight):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, getattr(module, "state", None)).detach()
    numbers = fetched(module, key, weight).detach()
    return numbers.dequantize() if hasattr(numbers, "__tensor_flatten__") else numbers


def _probes(weight: torch.Tensor) -> list[float]:
    """`‖W‖` and `uᵀ W v` for each pair of vectors, some rows at a time.

    In float64, so that four digits are the same on every device: what is stored with a checkpoint or a run is compared
    exactly, and sums of millions in float32 differ in the fourth digit between a CPU and a GPU.
    """
    matrix = weight.reshape(-1, weight.shape[-1])
    rows, columns = matrix.shape
    place = "cpu" if matrix.device.type == "mps" else matrix.device  # which has no float64
    left, right = _directions(rows, 0).to(place), _directions(columns, 1).to(place)
    norms, sums = [], torch.zeros(_PAIRS, dtype=torch.float64, device=place)
    at_once = max(1, _ELEMENTS // columns)
    for piece, towards in zip(matrix.split(at_once), left.split(at_once), strict=True):
        piece = piece.to(place).double()
        norms.append(torch.linalg.vector_norm(piece))
        sums += ((piece @ right) * towards).sum(dim=0)
    return [torch.stack(norms).norm().item(), *sums.tolist()]


@cache
def _directions(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, _PAIRS, generator=generator, dtype=torch.float32)
    return (drawn * (count**0.5 / drawn.norm(dim=0))).double()


def _other(first: dict[str, list[float]], second: dict[str, list[float]]) -> list[str]:
    """The weights that differ by more than rounding to 16 bits and to four digits explains."""
    if first.keys() != second.keys():
        return sorted(first.keys() ^ second.keys())
    return [
        name
        for name, values in first.items()
        if any(abs(a - b) > 7e-3 * values[0] + 1e-6 for a, b in zip(values, second[name], strict=True))
    ]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
