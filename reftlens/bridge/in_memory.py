"""A bridge of a transformers model that is in memory already, with the adapters that `peft` has put into it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from reftlens.bridge.classes import class_of, name_class
from reftlens.bridge.offload import spread
from reftlens.bridge.protocol import device_of
from reftlens.bridge.trial import LIMITS, check_agrees

_TOKENS = 23


def base_of(inside: nn.Module) -> nn.Module:
    """The transformers model with its adapters in it, where `inside` is a `PeftModel` around one; else itself.

    Raises:
        ValueError: for adapters that are no part of the model's weights (prefix and prompt tuning), which `PeftModel`
            adds in a forward pass of its own; and for a model that a bridge has taken apart already.
    """
    root: Any = inside
    if hasattr(root, "get_base_model"):
        for name, config in root.peft_config.items():
            if config.is_prompt_learning:
                raise ValueError(
                    f"adapter {name!r} is {config.peft_type.value}: PeftModel puts it before the tokens in a forward "
                    "pass of its own, which no bridge calls, and what is frozen could not be reused beside it; train "
                    "and score it on the plain model, or take LoRA, DoRA or IA3"
                )
        root = root.get_base_model()
    if any(isinstance(module, GeneralizedComponent) for module in root.modules()):
        raise ValueError(
            "this model is part of a bridge already: peft comes first and the bridge second, so load the model anew, "
            "put the adapter on it (PeftModel.from_pretrained or get_peft_model), and give that to load_model"
        )
    return root


def boot_in_memory(inside: nn.Module, tokenizer: Any, device: torch.device | None) -> Any:
    """A bridge of `inside`, which becomes part of it, in eval mode and in its own dtype; see `load_model`."""
    from transformer_lens.model_bridge import TransformerBridge

    root: Any = base_of(inside)
    _check_class(root)
    root = _placed(root, device).eval()
    expected = _logits(root)
    name = str(getattr(root.config, "_name_or_path", "") or type(root).__name__)
    made: Any = TransformerBridge.boot_transformers(
        name, hf_model=root, tokenizer=tokenizer, device=str(device_of(root)), dtype=root.dtype
    ).eval()
    if expected is not None and (differs := _difference(_logits(made), expected)) > LIMITS.get(root.dtype, 0.1):
        raise ValueError(
            f"the bridge of this {type(root).__name__} computes other logits than the model did before (by "
            f"{differs:.1g}): it takes apart weights that an adapter is on. The model in memory is spoilt: load it "
            "anew and merge the adapter, load_model(peft_model.merge_and_unload())"
        )
    check_agrees(made)
    return made


def _placed(root: Any, device: torch.device | None) -> Any:
    """The model on the device asked for; one that a `device_map` has spread stays as it is."""
    if not spread(root):
        return root.to(device or device_of(root))
    if device is not None:
        raise ValueError(
            f"device={str(device)!r} is asked for a model that its device_map has spread over {_places(root)}: leave "
            "device out, and it stays there, or load the model without a device_map"
        )
    return root


def _places(root: Any) -> str:
    return ", ".join(sorted({str(place) for place in getattr(root, "hf_device_map", {}).values()})) or "several places"


def _check_class(root: Any) -> None:
    """Raise where there is no bridge for a model."""
    has_adapter = name_class(root)
    chosen = class_of(root.config).__name__
    if not has_adapter:
        raise ValueError(
            f"TransformerLens makes no bridge of a {type(root).__name__}, expected a {chosen}: load the model as that, "
            f"transformers.{chosen}.from_pretrained(…); a head of your own is a rl.interventions.Head"
        )


@torch.no_grad()
def _logits(runs: Any) -> Tensor | None:
    """Of a few tokens; None where a model gives none."""
    high = min(int(runs.config.get_text_config().vocab_size if hasattr(runs, "config") else runs.cfg.d_vocab), 1000)
    tokens = torch.randint(min(5, high - 1), high, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    output = runs(tokens.to(device_of(runs)))
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None


def _difference(measured: Tensor | None, expected: Tensor) -> float:
    """Size of the difference over the size of what was expected."""
    if measured is None or measured.shape != expected.shape:
        return float("inf")
    return ((measured.double() - expected.double()).norm() / expected.double().norm()).item()
