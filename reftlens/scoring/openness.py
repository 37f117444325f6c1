"""How far the gates of an intervention are open on a data set."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge, check_deterministic
from reftlens.editing.edits import Observer
from reftlens.editing.engine import attached
from reftlens.editing.reading import read_sites
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.variant import Variant
from reftlens.interventions.gates import Gated
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Openness:
    """Of the gate at one site, for each row; NaN where the site edits no token of it."""

    site: str
    gate: str
    """Its kind."""
    widest: Float[Tensor, " row"]
    """`g` where it is open furthest."""
    share: Float[Tensor, " row"]
    """Of the row's edited tokens, those at which `g` is over ½."""

    def __str__(self) -> str:
        rows, tokens = self.widest[~self.widest.isnan()], self.share[~self.share.isnan()]
        return (
            f"{self.gate} at {self.site}: open in {(rows > 0.5).double().mean():.0%} of {len(rows)} rows, at "
            f"{tokens.mean():.0%} of a row's edited tokens"
        )


@torch.no_grad()
def openness_of(
    reft: ReFT, model: Bridge, data: Batch, variant: Variant = Variant(), *, batch_size: int = 16
) -> list[Openness]:
    """What the gates of the sites that act are open at, in the edited model, dropout off; nothing without gates."""
    check_deterministic(model)
    active = [] if variant.strength == 0.0 else variant.active(reft.sites)
    gates = {i: module for i in active if isinstance(module := reft[i], Gated)}
    if not gates:
        return []
    bound, seen = reft.bound_to(model, data, variant), {i: list[Tensor]() for i in gates}

    def observer(i: int, module: Gated) -> Observer:
        return lambda part, h: seen[i].append(module.openness(h, part.origin)[:, 0].cpu().double())

    observers = {i: observer(i, module) for i, module in gates.items()}

    def editing(batch: Batch, rows: Sequence[int]) -> AbstractContextManager[None]:
        return attached(model, bound.edits(batch.view, rows, observers))

    places = [(bound.places[i].site, bound.places[i].point) for i in gates]
    with training_mode(reft, training=False):
        read_sites(model, data, places, batch_size=batch_size, edited=editing)
    return [
        Openness(str(reft.sites[i]), module.gate.kind, *_by_row(torch.cat(seen[i]), variant, reft, i, data))
        for i, module in gates.items()
    ]


def _by_row(values: Tensor, variant: Variant, reft: ReFT, i: int, data: Batch) -> tuple[Tensor, Tensor]:
    """The largest of each row, and the share over one half."""
    rows = variant.mask(reft.sites[i], data.view).cpu().nonzero()[:, 0]
    nothing = torch.full((len(data),), torch.nan, dtype=torch.float64)
    widest = nothing.scatter_reduce(0, rows, values, "amax", include_self=False)
    share = nothing.scatter_reduce(0, rows, (values > 0.5).double(), "mean", include_self=False)
    return widest, share
