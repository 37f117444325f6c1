"""Read interventions that pyreft 0.1.0 saved; nothing is unpickled but tensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reftlens.interventions import DiReFT, Intervention, LoReFT, NoReFT
from reftlens.interventions.family import _Family
from reftlens.positions import Positions
from reftlens.reft import ReFT
from reftlens.site import Site

_COMPONENTS = {
    "block_output": "hook_resid_post",
    "block_input": "hook_resid_pre",
    "attention_output": "hook_attn_out",
    "mlp_output": "hook_mlp_out",
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
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = config["sorted_keys"]
    places = positions if isinstance(positions, list) else [positions] * len(keys)
    if len(places) != len(keys):
        raise ValueError(f"{len(places)} positions for the {len(keys)} interventions in {folder}: {', '.join(keys)}")
    result: dict[Site, Intervention] = {}
    for key, kind, where in zip(keys, config["intervention_types"], places, strict=True):
        tensors = torch.load(folder / f"intkey_{key}.bin", map_location="cpu", weights_only=True)
        site = Site(_hook(key), where)
        if site in result:
            raise ValueError(
                f"{folder} holds two interventions at {site.hook}, both at {site.positions}: give a list of positions"
            )
        result[site] = _converted(kind, tensors, activation, dropout)
    return ReFT(result).eval()


def _hook(key: str) -> str:
    found = re.match(r"layer_(\d+)_comp_(.+)_unit_", key)
    if found is None or found[2] not in _COMPONENTS:
        raise ValueError(f"cannot place {key!r}: expected a layer and one of {', '.join(_COMPONENTS)}")
    return f"blocks.{found[1]}.{_COMPONENTS[found[2]]}"


@torch.no_grad()
def _converted(kind: str, tensors: Mapping[str, Tensor], activation: str, dropout: float) -> Intervention:
    """The file's class in our terms: column frames, the dtype of the file (at least float32)."""
    settings: dict[str, Any] = {"activation": activation, "dropout": dropout}
    if "rotate_layer" in tensors and "weight" in tensors:
        d, rank = tensors["rotate_layer"].shape
        lo = LoReFT(d, rank, **settings)
        assert lo.frame is not None
        lo.frame.set(tensors["rotate_layer"].float())
        return _read_filled(lo, tensors["weight"], tensors["bias"])
    if "proj_layer.weight" in tensors and "learned_source.weight" in tensors:
        rank, d = tensors["proj_layer.weight"].shape
        free = (NoReFT if "Noreft" in kind else DiReFT)(d, rank, **settings)
        free.W2.copy_(tensors["proj_layer.weight"])
        if tensors.get("proj_layer.bias") is not None:
            raise ValueError(f"{kind} was trained with add_bias=True, which has no counterpart here")
        return _read_filled(free, tensors["learned_source.weight"], tensors["learned_source.bias"])
    raise ValueError(f"files of {kind} are not read: expected LoReFT, NoReFT or NodiReFT, got {sorted(tensors)}")


def _read_filled(module: _Family, weight: Tensor, bias: Tensor) -> Intervention:
    module.W.copy_(weight)
    module.b.copy_(bias)
    return module
