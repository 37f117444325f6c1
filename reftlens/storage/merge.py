"""Fold an intervention into the weights of a linear layer, where that is exact.

An affine edit of every token, `h' = h M + c`, right after a linear layer `h = x W + w` gives another linear
layer: `x (W M) + (w M + c)`. On the residual stream there is no such layer, and after a nonlinearity or a norm
neither; there merging is refused, not approximated.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reftlens.bridge.fingerprint import plain_modules, weights_processed
from reftlens.bridge.offload import fetched
from reftlens.bridge.protocol import Bridge, resolve_hook, underlying
from reftlens.bridge.wheel import partial_folder
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.site import Site
from reftlens.files import located
from reftlens.interventions import Intervention
from reftlens.interventions.base import Strength
from reftlens.text.positions import All

_LINEAR_OUTPUT = re.compile(r"(blocks\.\d+)\.(attn|attn\.o|mlp|mlp\.out)\.hook_out")
_LAYERS = {"attn": "attn.o", "attn.o": "attn.o", "mlp": "mlp.out", "mlp.out": "mlp.out"}


@dataclass(frozen=True)
class _Place:
    """A site at the output of a linear layer, and the layer with its name in the transformers model."""

    hook: str
    layer: nn.Linear | Conv1D
    name: str


@torch.no_grad()
def merged_weights(reft: ReFT, model: Bridge, *, strength: float = 1.0) -> dict[str, Tensor]:
    """New values, by parameter name of the transformers model, that make the edit part of the model.

    The model itself is not changed: give the result to `load_state_dict(…, strict=False)` of a copy.

    Raises:
        ValueError: where merging would not be exact: a site that is not the output of a linear layer, positions
            other than all tokens, an edit that is not affine, or a constant for a layer without bias.
    """
    if weights_processed(model):
        raise ValueError(
            "TransformerLens has processed the weights of this model (compatibility mode), so they are not those of "
            "the transformers model: merge on a bridge without that"
        )
    placed = [(_place(site, module, model), module) for site, module in reft.items()]
    # Whatever their order here, the layer's own hook fires before that of the component which the layer ends.
    placed.sort(key=lambda pair: pair[0].hook.endswith(("attn.hook_out", "mlp.hook_out")))
    exact: dict[str, Tensor] = {}
    with training_mode(reft, training=False):
        for place, module in placed:
            _fold(place, module, strength, exact)
    parameters = {f"{place.name}.{n}": p for place, _ in placed for n, p in place.layer.named_parameters()}
    return {name: value.to(parameters[name].dtype).contiguous() for name, value in exact.items()}


@torch.no_grad()
def save_merged(reft: ReFT, folder: str | Path, model: Bridge, *, strength: float = 1.0) -> Path:
    """Write the model with the edit as part of its weights to a new folder, with its tokenizer; returns the folder.

    `load_model(folder)` and transformers' `from_pretrained(folder)` load it, and no hook is needed any more: logits
    are those of the edited model, up to rounding of the weights to their dtype. The model itself is not changed.

    Raises:
        ValueError: where `merged_weights` does; for a folder that is not empty; and for a model whose weights are not
            those of its class: quantised, or with adapters of `peft` that are not merged.
    """
    folder, root = located(folder), underlying(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: a merged model is written to a folder of its own")
    state = _state(root) | merged_weights(reft, model, strength=strength)
    plain = _filled(root, state)
    with partial_folder(folder) as scratch:
        plain.save_pretrained(scratch)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    return folder


def _state(root: nn.Module) -> dict[str, Tensor]:
    """What the transformers model behind a bridge would store, by the names it has there."""
    return {
        f"{name}.{key}" if name else key: fetched(module, key, tensor).detach()
        for name, module in plain_modules(root)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and key not in module._non_persistent_buffers_set
    }


def _filled(root: Any, state: dict[str, Tensor]) -> Any:
    """A model of the class of `root` that holds the tensors of `state` themselves."""
    if getattr(root, "hf_quantizer", None) is not None:
        raise ValueError(f"the weights of this {type(root).__name__} are quantised: merge on one that is not")
    with torch.device("meta"):
        plain = type(root)(copy.deepcopy(root.config))
    told = plain.load_state_dict(state, strict=False, assign=True)
    added = {name for name in told.unexpected_keys if name.endswith(".bias") and not state[name].any()}  # by a bridge
    if unlike := sorted({*told.missing_keys, *told.unexpected_keys} - added):
        raise ValueError(
            f"the weights of this model are not those of a {type(root).__name__} as transformers makes it "
            f"({', '.join(unlike[:3])}): merge adapters first, load_model(peft_model.merge_and_unload())"
        )
    plain.tie_weights()
    plain.generation_config = getattr(root, "generation_config", None)
    return plain


def _place(site: Site, module: Intervention, model: Bridge) -> _Place:
    hook = resolve_hook(model, site.hook).name or site.hook
    match = _LINEAR_OUTPUT.fullmatch(hook)
    layer = None if match is None else _submodule(model, f"{match[1]}.{_LAYERS[match[2]]}")
    if not isinstance(layer, nn.Linear | Conv1D) or not layer.weight.is_floating_point():
        raise ValueError(f"{hook} is not the output of a linear layer, so no weights can hold an edit there")
    if site.positions != All():
        raise ValueError(f"the edit at {hook} acts at {site.positions}, and weights act at every token: use All()")
    if not module.affine:
        raise ValueError(f"{module.kind} at {hook} is not affine in h, so no weights can hold it")
    return _Place(hook, layer, next(n for n, m in plain_modules(model.original_model) if m is layer))


def _submodule(model: Bridge, path: str) -> nn.Module | None:
    """The module of the transformers model behind a component of the bridge."""
    assert isinstance(model, nn.Module)
    try:
        return next(plain_modules(model.get_submodule(path)))[1]
    except AttributeError:
        return None


def _fold(place: _Place, module: Intervention, strength: float, exact: dict[str, Tensor]) -> None:
    """Put one edit after the layer, as `exact` has it so far, into its weight and bias; in float64."""
    kept = {key: fetched(place.layer, key, p) for key, p in place.layer.named_parameters()}
    matrix, constant = (t.to(kept["weight"].device) for t in affine_map(place.hook, module, strength))
    columns = isinstance(place.layer, nn.Linear)  # its weight is [out, in]; that of Conv1D is [in, out]
    name, bias = f"{place.name}.weight", kept.get("bias")
    weight = exact.get(name, kept["weight"].double())
    exact[name] = matrix.T @ weight if columns else weight @ matrix
    if bias is not None:
        name = f"{place.name}.bias"
        exact[name] = exact.get(name, bias.double()) @ matrix + constant
    elif constant.abs().max() > 0:
        raise ValueError(
            f"{place.name} has no bias to take the constant part of {module.kind} at {place.hook}: not mergeable"
        )


def affine_map(hook: str, module: Intervention, strength: Strength) -> tuple[Tensor, Tensor]:
    """`M` and `c` of `h' = h M + c`, in float64; `ValueError` where the edit is another map."""
    device = next(iter(module.state_dict().values())).device
    eye = torch.eye(module.d, dtype=torch.float64, device=device)
    constant = module(torch.zeros_like(eye[0]), strength=strength)
    matrix = module(eye, strength=strength) - constant
    probe = torch.linspace(-3, 3, module.d, dtype=torch.float64, device=device).cos()[None]
    if not torch.allclose(module(probe, strength=strength), probe @ matrix + constant, rtol=1e-9, atol=1e-9):
        raise ValueError(f"{module.kind} at {hook} says that it is affine in h, and it is not")
    return matrix, constant
