"""Fold an intervention into the weights of a linear layer, where that is exact.

An affine edit of every token, `h' = h M + c`, right after a linear layer `h = x W + w` gives another linear
layer: `x (W M) + (w M + c)`. On the residual stream there is no such layer, and after a nonlinearity or a norm
neither; there merging is refused, not approximated.
"""

import torch
from torch import Tensor, nn

from reftlens.interventions import Intervention
from reftlens.model import Bridge, resolve_hook
from reftlens.positions import All
from reftlens.reft import ReFT

_LINEAR_OUTPUTS = {
    "attn.hook_out": "attn.o", "attn.o.hook_out": "attn.o", "mlp.hook_out": "mlp.out", "mlp.out.hook_out": "mlp.out"
}  # fmt: skip


@torch.no_grad()
def merged_weights(reft: ReFT, model: Bridge, *, strength: float = 1.0) -> dict[str, Tensor]:
    """New values, by parameter name of the transformers model, that make the edit part of the model.

    The model itself is not changed: give the result to `load_state_dict(…, strict=False)` of a copy.

    Raises:
        ValueError: where merging would not be exact: a site that is not the output of a linear layer, positions
            other than all tokens, an edit that is not affine, or a constant for a layer without bias.
    """
    result: dict[str, Tensor] = {}
    for site, module in reft.items():
        name = resolve_hook(model, site.hook).name or site.hook
        _refuse_inexact(name, site.positions, module)
        layer, output = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        component = _component(model, layer, _LINEAR_OUTPUTS[output])
        linear = _unwrapped(component)
        path = _name_of(model, linear)
        weight, bias = (result.get(f"{path}.{n}", getattr(linear, n, None)) for n in ("weight", "bias"))
        assert isinstance(weight, Tensor)
        matrix, constant = _affine(module, strength)
        merged = weight.double().T if isinstance(linear, nn.Linear) else weight.double()
        merged = merged @ matrix
        result[f"{path}.weight"] = (merged.T if isinstance(linear, nn.Linear) else merged).to(weight.dtype).contiguous()
        if bias is not None:
            result[f"{path}.bias"] = (bias.double() @ matrix + constant).to(bias.dtype)
        elif constant.abs().max() > 0:
            raise ValueError(f"{path} has no bias to take the constant part of {module.kind} at {name}: not mergeable")
    return result


def _refuse_inexact(hook: str, positions: object, module: Intervention) -> None:
    if ".".join(hook.split(".")[2:]) not in _LINEAR_OUTPUTS:
        raise ValueError(f"{hook} is not the output of a linear layer, so no weights can hold an edit there")
    if positions != All():
        raise ValueError(f"the edit at {hook} acts at {positions}, and weights act at every token: only All() merges")
    if not module.affine:
        raise ValueError(f"{module.kind} at {hook} is not affine in h, so no weights can hold it")


def _affine(module: Intervention, strength: float) -> tuple[Tensor, Tensor]:
    """`M` and `c` of `h' = h M + c`, in float64."""
    device = next(iter(module.state_dict().values())).device
    eye = torch.eye(module.d, dtype=torch.float64, device=device)
    training = module.training
    module.eval()
    constant = module(torch.zeros_like(eye[:1]), strength=strength)
    matrix = module(eye, strength=strength) - constant
    module.train(training)
    return matrix, constant[0]


def _component(model: Bridge, layer: str, path: str) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model.get_submodule(f"{layer}.{path}")


def _unwrapped(component: nn.Module) -> nn.Module:
    while hasattr(component, "original_component") and isinstance(component.original_component, nn.Module):
        component = component.original_component
    return component


def _name_of(model: Bridge, wanted: nn.Module) -> str:
    for name, module in model.original_model.named_modules():
        if module is wanted:
            return name.replace("._original_component", "").replace("_original_component.", "")
    raise ValueError(f"{type(wanted).__name__} is not a part of the transformers model")
