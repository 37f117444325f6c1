"""What an intervention does to each token of a data set: hidden states and edits, in coordinates of its subspace."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.analysis.subspaces.geometry import span
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.engine import Edit, attached
from reftlens.editing.reft import Bound, ReFT, Variant, mode
from reftlens.editing.site import Site
from reftlens.editing.sources import read_sites
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class SiteEdits:
    """One entry for each token that is edited at a site, row by row; float64 on the CPU."""

    site: Site
    basis: Float[Tensor, "d rank"]
    """Of the intervention, as it is."""
    span: Float[Tensor, "d k"]
    """Orthonormal basis of its column space."""
    hidden: Float[Tensor, "tokens k"]
    """Coordinates of the hidden state in `span`, before the edit at this site (those at earlier sites are in it)."""
    edits: Float[Tensor, "tokens k"]
    """Coordinates of the edit at strength 1; `edits @ spanᵀ` is all of it."""
    rows: Int[Tensor, " tokens"]
    """The row of the data that each token is of."""
    columns: Int[Tensor, " tokens"]


@dataclass
class _Kept:
    """What was seen at one site so far."""

    site: Site
    basis: Float[Tensor, "d rank"]
    span: Float[Tensor, "d k"]
    hidden: list[Tensor] = field(default_factory=list)
    edits: list[Tensor] = field(default_factory=list)

    def add(self, hidden: Float[Tensor, "tokens d"], code: Float[Tensor, "tokens rank"]) -> None:
        self.hidden.append(hidden.cpu().double() @ self.span)
        self.edits.append(code.cpu().double() @ (self.basis.T @ self.span))


@dataclass(eq=False, repr=False)
class _Recorded(Edit):
    """An edit that keeps what it reads and what it adds."""

    kept: _Kept | None = None

    def __call__(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        part, before = self.parts[0], self._read(h)
        x = before.to(part.intervention.working_dtype(before.dtype))
        basis = part.intervention.basis()
        code = part.intervention.coded(x, None if basis is None else basis.to(x.dtype), part.source, part.rows)
        assert self.kept is not None
        self.kept.add(before, code)
        return super().__call__(h, hook)


@torch.no_grad()
def edits_of(reft: ReFT, model: Bridge, data: Batch, *, batch_size: int = 16, progress: bool = True) -> list[SiteEdits]:
    """Hidden states and edits of every site in one pass over `data`, all sites at strength 1, dropout off.

    Raises:
        ValueError: if a site chooses no token, an exchange has no source in `data`, or a basis is zero.
    """
    check_deterministic(model)
    bound = reft.to(device_of(model)).bind(model)
    bound.require(data.view)
    donors = bound.donors(model, data)
    kept = [_kept(site, module) for site, module in reft.items()]
    places = list(zip(reft.sites, bound.points, strict=True))
    with mode(reft, training=False):
        read_sites(
            model, data, places, batch_size=batch_size, progress=progress,
            edited=lambda batch, rows: attached(_recorded(bound, batch, kept, bound.edits(batch.view, Variant(), donors,
                                                                                         rows))),
        )  # fmt: skip
    found = []
    for one in kept:
        rows, columns = one.site.positions.mask(data.view).nonzero().cpu().unbind(dim=1)
        found.append(SiteEdits(one.site, one.basis, one.span, torch.cat(one.hidden), torch.cat(one.edits), rows,
                               columns))  # fmt: skip
    return found


def _kept(site: Site, module: Any) -> _Kept:
    basis = module.basis()
    if basis is None:
        whole = torch.eye(module.d, dtype=torch.float64)
        return _Kept(site, whole, whole)
    columns = basis.detach().cpu().double()
    return _Kept(site, columns, span(columns, name=f"the basis of {module.kind} at {site}").basis)


def _recorded(bound: Bound, batch: Batch, kept: list[_Kept], edits: list[Edit]) -> list[Edit]:
    """The same edits, recorded: `bound.edits` gives one for each site that chooses a token in `batch`, in order."""
    acting = [one for one in kept if bool(one.site.positions.mask(batch.view).any())]
    return [
        _Recorded(e.point, e.parts, e.rows, e.columns, e.shape, e.heads, e.carry, one)
        for e, one in zip(edits, acting, strict=True)
    ]
