"""What a folder of pyreft 0.1.0 holds: names of classes, components and tensors, the same for reading and writing."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from reftlens.interventions import ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT, OrthoDiReFT

RECORD_FILE = "reftlens.json"
"""What pyreft's own files cannot say: positions and dropout."""
COMPONENTS = {
    "block_output": "hook_resid_post",
    "block_input": "hook_resid_pre",
    "attention_output": "hook_attn_out",
    "mlp_output": "hook_mlp_out",
}
_SOURCE = ("learned_source.weight", "learned_source.bias")
_FREE = ("proj_layer.weight", *_SOURCE)
CLASSES = {  # each class: what it is here; its tensors, the frame or free basis, W (or "") and b
    "LoreftIntervention": (LoReFT, ("rotate_layer", "weight", "bias")),
    "NoreftIntervention": (NoReFT, _FREE),
    "DireftIntervention": (OrthoDiReFT, ("rotate_layer", *_SOURCE)),
    "NodireftIntervention": (DiReFT, _FREE),  # the paper's DiReFT: pyreft's Direft is an ablation of it
    "ConsreftIntervention": (ConsReFT, ("rotate_layer", "", "learned_source")),
    "LobireftIntervention": (LobiReFT, ("rotate_layer", "", "learned_source")),
}
_PARTS = ("rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base")
"""How all classes but LoReFT store their rotation: as torch parametrises it, with a `[d, d]` matrix."""


_PLACES = {"hook_out": "block_output", "hook_in": "block_input"} | {
    f"{part}.hook_out": f"{name}_output" for part, name in (("attn", "attention"), ("mlp", "mlp"))
}


def component_of(hook: str) -> tuple[int, str] | None:
    """Block and component of a hook, given by its canonical name; None where pyreft has none.

    In a block with a norm after attention, `hook_attn_out` is what that norm gives, and so no `attention_output`.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return None if match is None or match[2] not in _PLACES else (int(match[1]), _PLACES[match[2]])


def hook_of(key: str) -> str:
    """The hook of one intervention, from its key.

    Raises:
        ValueError: for a component or a unit that has no counterpart here.
    """
    match = re.fullmatch(r"layer[._](\d+)[._]comp[._](.+?)[._]unit[._]pos[._]nunit[._]\d+#\d+", key)  # older: dots
    if match is None or match[2] not in COMPONENTS:
        raise ValueError(f"cannot place {key!r}: expected a layer and one of {', '.join(COMPONENTS)}, by position")
    return f"blocks.{match[1]}.{COMPONENTS[match[2]]}"


def with_rotation(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one file with the rotation `[d, rank]` itself as `rotate_layer`."""
    if not tensors.keys() >= set(_PARTS):
        return dict(tensors)
    original, base = (tensors[name] for name in _PARTS)
    layer = _orthogonal(torch.eye(*original.shape, dtype=base.dtype))
    layer.load_state_dict({name.removeprefix("rotate_layer."): tensors[name] for name in _PARTS})
    return {n: t for n, t in tensors.items() if n not in _PARTS} | {"rotate_layer": layer.weight.detach()}


def parametrised(rotation: Tensor) -> dict[str, Tensor]:
    """`rotation` as torch parametrises it, from which the same comes back bit for bit."""
    layer = _orthogonal(rotation)
    state = {f"rotate_layer.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    state[_PARTS[1]][:, : rotation.shape[1]] = rotation
    return state


def _orthogonal(rotation: Tensor) -> nn.Linear:
    """A layer whose weight is this, parametrised by torch as pyreft does it; the columns beside it are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer = nn.Linear(rotation.shape[1], rotation.shape[0], bias=False, dtype=rotation.dtype)
        layer.weight = nn.Parameter(rotation.detach().cpu().clone())
        orthogonal(layer)
    return layer
