"""Read and write folders of interventions as pyreft 0.1.0 saves them; nothing is unpickled but tensors."""

import io
import json
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.editing.preflight import preflight
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.site import Site
from reftlens.errors import check_finite
from reftlens.files import located, write_atomically
from reftlens.interventions import Intervention
from reftlens.interventions.subspace import Frame
from reftlens.storage.pyreft_format import CLASSES, RECORD_FILE, component_of, hook_of, parametrised, with_rotation
from reftlens.text.positions import Positions
from reftlens.text.positions.spelling import positions_from_dict

_OF_KIND = {kind.kind: name for name, (kind, _) in CLASSES.items()}


def load_pyreft(
    folder: str | Path,
    *,
    positions: Positions | str | list[Positions | str] | None = None,
    activation: str = "linear",
    dropout: float | None = None,
) -> ReFT:
    """The interventions in a folder written by pyreft's `ReftModel.save`, or by `save_pyreft`, in eval mode.

    pyreft stores neither positions nor activation function nor dropout, so they are given here: one choice of
    positions for all interventions, or a list with one for each, in the order of the file's `sorted_keys` (an
    untied prefix and suffix are two interventions at one layer). `save_pyreft` notes positions and dropout in a file
    of its own, and what is not given is read there. pyreft's Nodireft is the DiReFT of the paper, its Direft the
    ablation with orthonormal rows (here: OrthoDiReFT).

    Raises:
        ValueError: for a component or a class that has no counterpart here, two interventions at one place, or
            positions that are neither given nor noted.
    """
    folder = located(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = config["sorted_keys"]
    noted = _noted(folder, keys)
    places = _places(folder, keys, positions, noted)
    result: dict[Site, Intervention] = {}
    for key, kind, where in zip(keys, config["intervention_types"], places, strict=True):
        site = Site(hook_of(key), where)
        if site in result:
            raise ValueError(
                f"{folder} holds two interventions at {site.hook}, both at {site.positions}: give a list of positions"
            )
        tensors = torch.load(folder / f"intkey_{key}.bin", map_location="cpu", weights_only=True)
        name = re.sub(r"[<>']|class ", "", kind).rsplit(".", 1)[-1]  # of <class 'pyreft.interventions.NAME'>
        p = noted.get(key, {}).get("dropout", 0.0) if dropout is None else dropout
        with torch.random.fork_rng(devices=[]):  # constructors draw a start that the file then replaces
            result[site] = _converted(name, tensors, activation, p)
    return ReFT(result).eval()


def _noted(folder: Path, keys: list[str]) -> dict[str, Any]:
    """What `save_pyreft` noted of each intervention; nothing where pyreft wrote the folder."""
    path = folder / RECORD_FILE
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if noted and noted.keys() != set(keys):
        raise ValueError(f"{path} is the record of other interventions than those of config.json: remove it")
    return noted


def _places(
    folder: Path, keys: list[str], positions: Positions | str | list[Positions | str] | None, noted: Mapping[str, Any]
) -> list[Positions | str]:
    if positions is None:
        if not noted:
            raise ValueError(f"{folder} is as pyreft writes it, which stores no positions: pass positions=")
        return [positions_from_dict(noted[key]["positions"]) for key in keys]
    places = positions if isinstance(positions, list) else [positions] * len(keys)
    if len(places) != len(keys):
        raise ValueError(f"{len(places)} positions for the {len(keys)} interventions in {folder}: {', '.join(keys)}")
    return places


@torch.no_grad()
def _converted(name: str, tensors: Mapping[str, Tensor], activation: str, dropout: float) -> Intervention:
    """The file's class in our terms: column frames, the dtype of the file (at least float32)."""
    if name not in CLASSES:
        raise ValueError(f"files of {name} are not read, only those of {', '.join(CLASSES)}")
    if tensors.get("proj_layer.bias") is not None:
        raise ValueError(f"{name} was trained with add_bias=True, which has no counterpart here")
    kind, names = CLASSES[name]
    tensors = with_rotation(tensors)
    missing = sorted(set(names) - {"", *tensors})
    if missing:
        raise ValueError(f"the file of {name} has no {', '.join(missing)}; it has {', '.join(sorted(tensors))}")
    columns, weight, bias = (tensors.get(n) for n in names)
    assert columns is not None and bias is not None
    rank = len(bias)
    dtype = reduce(torch.promote_types, [t.dtype for t in (columns, weight, bias) if t is not None], torch.float32)
    module = kind(max(columns.shape), rank, activation=activation, dropout=dropout).to(dtype)
    if module.frame is not None:
        module.frame.set(columns.to(dtype))
    else:
        module.W2.copy_(columns)
    if weight is not None:
        module.W.copy_(weight)
    module.b.copy_(bias)
    return module


def save_pyreft(reft: ReFT, folder: str | Path, model: Bridge) -> Path:
    """Write `reft` as pyreft 0.1.0's `ReftModel.save` does, so that pyreft and what reads its files load it.

    pyreft stores no positions: its user gives them to each call, as `unit_locations` in the order of `sorted_keys`.
    They are noted, with dropout, in a file of ours beside its own, where `load_pyreft` finds them, as the same
    interventions bit for bit. `ReftModel.load` makes `W` and `b` of LoReFT, DiReFT and their kin bfloat16, whatever is
    in the file; and it cannot make NodireftIntervention or NoreftIntervention at all (they want an `add_bias` that it
    does not store): make them with `ReftConfig`, and give each the file by `load_state_dict`.

    Raises:
        ValueError: for what pyreft's files could not say, with the reason: another kind, an activation function (its
            `load` forgets it), heads, another place than a block's or a part's output or a block's input, one
            intervention at several sites, or a width that is not the model's.
    """
    check_types(reft, model)
    preflight(reft, model)
    components = [_component(reft, i, model) for i in range(len(reft))]
    keys: list[str] = []
    for layer, component in components:
        stem = f"layer_{layer}_comp_{component}_unit_pos_nunit_1"
        keys.append(f"{stem}#{sum(key.startswith(f'{stem}#') for key in keys)}")
    states = [_state(module) for _, module in reft.items()]
    folder = located(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for key, state in zip(keys, states, strict=True):
        payload = io.BytesIO()
        torch.save(state, payload)
        write_atomically(folder / f"intkey_{key}.bin", payload.getvalue())
    noted = {
        key: {"positions": site.positions.to_dict(), "dropout": module.dropout.p}
        for key, (site, module) in zip(keys, reft.items(), strict=True)
    }
    config = _config([module for _, module in reft.items()], components) | {"sorted_keys": keys}
    for name, table in ((RECORD_FILE, noted), ("config.json", config)):
        write_atomically(folder / name, json.dumps(table, indent=2, ensure_ascii=False).encode())
    return folder


def _config(modules: list[Intervention], components: list[tuple[int, str]]) -> dict[str, Any]:
    """What config.json says of interventions in their order."""
    return {
        "intervention_constant_sources": [True] * len(modules),
        "intervention_dimensions": [module.d for module in modules],
        "intervention_types": [f"<class 'pyreft.interventions.{_OF_KIND[module.kind]}'>" for module in modules],
        "mode": "parallel",
        "representations": [
            [layer, component, "pos", 1, module.rank, *[None] * 9]
            for (layer, component), module in zip(components, modules, strict=True)
        ],
    }


def _component(reft: ReFT, index: int, model: Bridge) -> tuple[int, str]:
    """Block and component of one site; raises for what pyreft's files could not say of it."""
    site, module, place = reft.sites[index], reft[index], reft.bind(model)[index]
    found = component_of(place.point.name or site.hook)
    if type(module) not in {kind for kind, _ in CLASSES.values()}:
        raise ValueError(f"{module.kind} at {site} is none of pyreft's classes: {', '.join(_OF_KIND)} are")
    if found is None or place.carry is not None or site.heads is not None:
        raise ValueError(
            f"{site.vectors} has no name in pyreft's files: the output or input of a block, and what attention and MLP "
            "give before any norm after them, have"
        )
    if (activation := module.settings()["activation"]) != "linear":
        raise ValueError(
            f"{module.kind} at {site} has activation={activation!r}, which pyreft does not store: its load would "
            "compute another edit without a word"
        )
    if reft.which.count(reft.which[index]) > 1:
        raise ValueError(
            f"{module.kind} at {site} acts at several sites, and pyreft has no such ties: give each site a copy"
        )
    return found


@torch.no_grad()
def _state(module: Any) -> dict[str, Tensor]:
    """The tensors of one file, by pyreft's names."""
    name = _OF_KIND[module.kind]
    columns, weight, bias = CLASSES[name][1]
    state = {bias: module.b, columns: module.W2 if module.frame is None else _basis(module.frame)}
    state |= {weight: module.W} if weight else {}
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    for key, tensor in state.items():
        check_finite(tensor, f"{module.kind}: {key}")
    if name == "LoreftIntervention":
        return state
    if columns == "rotate_layer":
        state |= parametrised(state.pop(columns))
    return state | {"embed_dim": torch.tensor(module.d), "interchange_dim": torch.tensor(module.d)}


def _basis(frame: Frame) -> Tensor:
    """The basis; the parameter itself where it is that up to rounding, so that it comes back bit for bit."""
    basis = frame()
    matrix = frame.matrix.to(basis.dtype)
    return matrix if torch.allclose(matrix, basis, rtol=0.0, atol=1e-6) else basis
