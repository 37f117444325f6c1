"""A recommendation as Python that can be pasted."""

from dataclasses import fields

from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.interventions import KINDS
from reftlens.interventions.base import Intervention
from reftlens.selection.splitting import Split
from reftlens.text.positions import At, Positions
from reftlens.text.positions.base import Chain, Difference, Union
from reftlens.training.config import FitConfig

_JOINED = {Union: "|", Difference: "-", Chain: ">>"}


def code_of(reft: ReFT, config: FitConfig, variant: Variant, split: Split | None) -> str:
    """Python that makes and trains an edit anew."""
    sites = [f"    {_site(site)}: {_kind(module)}," for site, module in reft.items()]
    default, settings = FitConfig(), []
    for each in fields(config):
        value = getattr(config, each.name)
        if value != getattr(default, each.name):
            settings.append(f"{each.name}={value!r}")
    rows = [] if split is None else [f"train = data[list(rl.selection.split(data, seed={split.seed}).train)]"]
    return "\n".join(
        [
            "import reftlens as rl",
            "",
            *rows,
            "reft = rl.ReFT({",
            *sites,
            "})",
            f"reft.reset({config.seed})",
            f"run = rl.fit(reft, model, train, {', '.join(settings)})",
            f"variant = {variant.strength!r}  # rl.generate(reft, model, prompts, variant=variant)",
        ]
    )


def _site(site: Site) -> str:
    heads = "" if site.heads is None else f", heads={list(site.heads)}"
    return f"rl.Site({site.hook!r}, {_positions(site.positions)}{heads})"


def _positions(positions: Positions) -> str:
    if isinstance(positions, Union | Difference | Chain):
        return f"({_positions(positions.left)} {_JOINED[type(positions)]} {_positions(positions.right)})"
    if isinstance(positions, At):
        return f"rl.positions.At({', '.join(map(str, positions.indices))})"
    return f"rl.positions.{positions}"


def _kind(module: Intervention) -> str:
    where = "rl.interventions." if KINDS.get(module.kind) is type(module) else ""
    return f"{where}{type(module).__name__}({', '.join(f'{k}={v!r}' for k, v in module.settings().items())})"
