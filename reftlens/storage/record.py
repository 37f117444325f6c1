"""The record of a `ReFT` in plain values: what `reft.json` says of its sites, interventions and model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reftlens.bridge.fingerprint import fingerprint
from reftlens.bridge.pretrained import DTYPES
from reftlens.bridge.protocol import is_bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.errors import StoreMismatch
from reftlens.interventions import GATES, KINDS, Gate, Intervention
from reftlens.interventions.base import stored_settings
from reftlens.training.result import library_versions

FORMAT = 3

Kinds = Mapping[str, type[Intervention] | type[Gate]]


def describe(reft: ReFT, model: Any) -> dict[str, Any]:
    """The record of `reft` as it was trained on `model`.

    Raises:
        ValueError: if `rebuild` would not make the same of it: a class that takes the name of another kind, settings
            that are no JSON values, tensors of several dtypes, or parameters shared between interventions.
    """
    _refuse_ambiguous(reft)
    return {
        "format": FORMAT,
        "sites": [
            site.to_dict() | {"hook": hook, "written": site.hook, "intervention": i}
            for site, hook, i in zip(reft.sites, _canonical_hooks(reft, model), reft.which, strict=True)
        ],
        "interventions": [_described(m) for m in reft.distinct],
        "chat": reft.chat,
        "model": fingerprint(model).to_dict(),
        "versions": library_versions(),
    }


def rebuild(record: dict[str, Any], kinds: Kinds, folder: Path) -> ReFT:
    """The `ReFT` that a record describes, its weights not yet filled in.

    Raises:
        StoreMismatch: for a kind, a dtype or settings that are not known; `folder` is named.
    """
    table = {**KINDS, **GATES, **kinds}
    try:
        with torch.random.fork_rng(devices=[]):  # constructors draw a start that the weights then replace
            modules = [_built(spec, table, folder) for spec in record["interventions"]]
        reft = ReFT({Site.from_dict(s): modules[s["intervention"]] for s in record["sites"]})
    except (KeyError, IndexError, AttributeError) as error:
        raise StoreMismatch(f"the record in {folder} is not as save() writes it: {error!r}") from error
    reft.chat = record.get("chat")
    return reft


def _canonical_hooks(reft: ReFT, model: Any) -> list[str]:
    """The names of the hooks on a bridge; one that is edited again further on is known by its alias only."""
    if not is_bridge(model):
        return [site.hook for site in reft.sites]
    return [
        place.site.hook if place.carry is not None else place.point.name or place.site.hook
        for place in reft.bind(model)
    ]


def _described(module: Intervention) -> dict[str, Any]:
    name = type(module).__name__
    settings = stored_settings(module)
    try:
        with torch.random.fork_rng(devices=[]):
            again = type(module)(
                **arguments_of(settings, {part.kind: type(part) for part in _parts(module)})
            ).state_dict()
    except Exception as error:
        raise ValueError(f"{name}(**settings()) fails, so it could not be loaded again: {error}") from error
    if {k: t.shape for k, t in again.items()} != {k: t.shape for k, t in module.state_dict().items()}:
        raise ValueError(f"{name}(**settings()) has other tensors than it, so it could not be loaded again: {settings}")
    dtypes = {str(t.dtype).removeprefix("torch.") for t in module.state_dict().values() if t.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"{name} holds tensors of several dtypes, {sorted(dtypes)}: move it to one with .to(dtype)")
    return {"kind": module.kind, "settings": settings, "dtype": dtypes.pop() if dtypes else "float32"}


def _refuse_ambiguous(reft: ReFT) -> None:
    """Raise where the record could be read in two ways."""
    classes: dict[str, type[Intervention] | type[Gate]] = {**KINDS, **GATES}
    for module in (part for distinct in reft.distinct for part in _parts(distinct)):
        if classes.setdefault(module.kind, type(module)) is not type(module):
            raise ValueError(
                f"{type(module).__name__} has kind = {module.kind!r}, which names another class: give it a kind of "
                "its own"
            )
    names: dict[int, str] = {}
    for name, parameter in reft.interventions.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise ValueError(
                f"interventions share a parameter ({first} and {name}), which cannot be stored: to tie weights, use "
                "one intervention at several sites"
            )


def _built(spec: dict[str, Any], kinds: Kinds, folder: Path) -> Intervention:
    dtype = spec["dtype"]
    for kind in kinds_in(spec):
        if kind not in kinds:
            raise StoreMismatch(
                f"{folder} holds an intervention of kind {kind!r}, and the known ones are {', '.join(kinds)}; if "
                f"it is a class of yours, pass kinds={{{kind!r}: YourClass}}"
            )
    if dtype not in DTYPES:
        raise StoreMismatch(f"{folder} holds weights of dtype {dtype!r}, and the known ones are {', '.join(DTYPES)}")
    try:
        module = kinds[spec["kind"]](**arguments_of(spec["settings"], kinds)).to(DTYPES[dtype])
    except (TypeError, ValueError) as error:
        raise StoreMismatch(f"{folder} holds {spec['kind']} with settings {spec['settings']}: {error}") from error
    if not isinstance(module, Intervention):
        raise StoreMismatch(f"{folder} holds {spec['kind']} at a site, which is no intervention")
    return module


def _parts(module: Intervention) -> list[Intervention | Gate]:
    """An intervention, and those that it wraps."""
    return [part for part in module.modules() if isinstance(part, Intervention | Gate)]


def kinds_in(spec: Any) -> list[str]:
    """The kinds that a record of one intervention names, its own first."""
    if not _is_part(spec):
        return []
    return [spec["kind"], *(kind for value in spec["settings"].values() for kind in kinds_in(value))]


def arguments_of(settings: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """The constructor arguments that settings stand for, interventions and gates among them made."""
    return {
        name: kinds[value["kind"]](**arguments_of(value["settings"], kinds)) if _is_part(value) else value
        for name, value in settings.items()
    }


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and {"kind", "settings"} <= value.keys()
