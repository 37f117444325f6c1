"""A recommendation as Python that can be pasted."""

from dataclasses import fields
from typing import Any

from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.interventions import GATES, KINDS
from reftlens.interventions.base import Kind
from reftlens.scoring.objectives import Objective, cross_entropy
from reftlens.selection.splitting import Split
from reftlens.text.positions import At, Positions
from reftlens.text.positions.base import Chain, Difference, Union
from reftlens.training.checkpoint import frozen_tensors
from reftlens.training.config import FitConfig

_JOINED = {Union: "|", Difference: "-", Chain: ">>"}


def code_of(reft: ReFT, config: FitConfig, variant: Variant, split: Split | None, objective: Objective) -> str:
    """Python that makes and trains an edit anew; what it cannot spell is a name that the reader has to define."""
    sites = [f"    {_site(site)}: {_kind(module)}," for site, module in reft.items()]
    default, settings = FitConfig(), []
    for each in fields(config):
        value = getattr(config, each.name)
        if value != getattr(default, each.name):
            settings.append(f"{each.name}={value!r}")
    rows = [] if split is None else [f"train = data[list(rl.selection.split(data, seed={split.seed}).train)]"]
    own = [] if getattr(objective, "loss", None) is cross_entropy else [f"# objective: {objective.name}"]
    settings += ["objective=objective"] * len(own)
    return "\n".join(
        [
            "import reftlens as rl",
            *_imports(reft),
            "",
            *rows,
            "reft = rl.ReFT({",
            *sites,
            "})",
            f"reft.reset({config.seed})",
            *_frozen(reft),
            *own,
            f"run = rl.fit(reft, model, train, {', '.join(settings)})",
            f"variant = {variant.strength!r}  # rl.generate(reft, model, prompts, variant=variant)",
        ]
    )


def _frozen(reft: ReFT) -> list[str]:
    """What an edit was given and does not train, of the `result` of the search."""
    given = [f"    {name!r}: result.recommended.state_dict()[{name!r}]," for name in frozen_tensors(reft)]
    return ["reft.load_state_dict({", "    **reft.state_dict(),", *given, "})"] if given else []


def _imports(reft: ReFT) -> list[str]:
    """Of classes of one's own, which have to be in sight; those of a script or notebook are."""
    classes = {type(part) for module in reft.distinct for part in module.modules() if isinstance(part, Kind)}
    own = [kind for kind in classes if not _known(kind) and kind.__module__ != "__main__"]
    return sorted(f"from {kind.__module__} import {kind.__name__}" for kind in own)


def _known(kind: type[Kind]) -> bool:
    return kind in (*KINDS.values(), *GATES.values())


def _site(site: Site) -> str:
    heads = "" if site.heads is None else f", heads={list(site.heads)}"
    return f"rl.Site({site.hook!r}, {_positions(site.positions)}{heads})"


def _positions(positions: Positions) -> str:
    if isinstance(positions, Union | Difference | Chain):
        return f"({_positions(positions.left)} {_JOINED[type(positions)]} {_positions(positions.right)})"
    if isinstance(positions, At):
        return f"rl.positions.At({', '.join(map(str, positions.indices))})"
    return f"rl.positions.{positions}"


def _kind(module: Kind) -> str:
    """The call that makes it, and what it wraps."""
    where = "rl.interventions." if _known(type(module)) else ""
    settings = ", ".join(f"{name}={_value(module, name, value)}" for name, value in module.settings().items())
    return f"{where}{type(module).__name__}({settings})"


def _value(module: Kind, name: str, value: Any) -> str:
    part = getattr(module, name, None)
    return _kind(part) if isinstance(part, Kind) else repr(value)
