"""Read interventions that pyreft 0.1.0 saved; nothing is unpickled but tensors."""

import json
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.files import located
from reftlens.interventions import DiReFT, Intervention, LoReFT, NoReFT
from reftlens.text.positions import Positions

_COMPONENTS = {
    "block_output": "hook_resid_post",
    "block_input": "hook_resid_pre",
    "attention_output": "hook_attn_out",
    "mlp_output": "hook_mlp_out",
}
_FREE = ("proj_layer.weight", "learned_source.weight", "learned_source.bias")
_CLASSES = {  # each class that is read: what it is here; its tensors, the frame or free basis, W and b
    "LoreftIntervention": (LoReFT, ("rotate_layer", "weight", "bias")),
    "NoreftIntervention": (NoReFT, _FREE),
    "NodireftIntervention": (DiReFT, _FREE),
}


def load_pyreft(
    folder: str | Path,
    *,
    positions: Positions | str | list[Positions | str],
    activation: str = "linear",
    dropout: float = 0.0,
) -> ReFT:
    """The interventions in a folder written by pyreft's `ReftModel.save`, in eval mode.

    pyreft stores neither positions nor activation function nor dropout, so they are given here: one choice of
    positions for all interventions, or a list with one for each, in the order of the file's `sorted_keys` (an
    untied prefix and suffix are two interventions at one layer). Files of LoReFT, NoReFT and NodiReFT (here:
    DiReFT) are read.

    Raises:
        ValueError: for a component or a class that has no counterpart here, or two interventions at one place.
    """
    folder = located(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = config["sorted_keys"]
    places = positions if isinstance(positions, list) else [positions] * len(keys)
    if len(places) != len(keys):
        raise ValueError(f"{len(places)} positions for the {len(keys)} interventions in {folder}: {', '.join(keys)}")
    result: dict[Site, Intervention] = {}
    for key, kind, where in zip(keys, config["intervention_types"], places, strict=True):
        site = Site(_hook(key), where)
        if site in result:
            raise ValueError(
                f"{folder} holds two interventions at {site.hook}, both at {site.positions}: give a list of positions"
            )
        tensors = torch.load(folder / f"intkey_{key}.bin", map_location="cpu", weights_only=True)
        name = re.sub(r"[<>']|class ", "", kind).rsplit(".", 1)[-1]  # of <class 'pyreft.interventions.NAME'>
        with torch.random.fork_rng(devices=[]):  # constructors draw a start that the file then replaces
            result[site] = _converted(name, tensors, activation, dropout)
    return ReFT(result).eval()


def _hook(key: str) -> str:
    match = re.fullmatch(r"layer[._](\d+)[._]comp[._](.+?)[._]unit[._]pos[._]nunit[._]\d+#\d+", key)  # older: dots
    if match is None or match[2] not in _COMPONENTS:
        raise ValueError(f"cannot place {key!r}: expected a layer and one of {', '.join(_COMPONENTS)}, by position")
    return f"blocks.{match[1]}.{_COMPONENTS[match[2]]}"


@torch.no_grad()
def _converted(name: str, tensors: Mapping[str, Tensor], activation: str, dropout: float) -> Intervention:
    """The file's class in our terms: column frames, the dtype of the file (at least float32)."""
    if name not in _CLASSES:
        raise ValueError(f"files of {name} are not read, only those of {', '.join(_CLASSES)}")
    if tensors.get("proj_layer.bias") is not None:
        raise ValueError(f"{name} was trained with add_bias=True, which has no counterpart here")
    kind, names = _CLASSES[name]
    missing = sorted(set(names) - tensors.keys())
    if missing:
        raise ValueError(f"the file of {name} has no {', '.join(missing)}; it has {', '.join(sorted(tensors))}")
    columns, weight, bias = (tensors[n] for n in names)
    rank, d = weight.shape
    dtype = reduce(torch.promote_types, [t.dtype for t in (columns, weight, bias)], torch.float32)
    module = kind(d, rank, activation=activation, dropout=dropout).to(dtype)
    if module.frame is not None:
        module.frame.set(columns.to(dtype))
    else:
        module.W2.copy_(columns)
    module.W.copy_(weight)
    module.b.copy_(bias)
    return module
