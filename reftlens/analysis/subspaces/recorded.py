"""What an intervention does to each token of a data set: hidden states and edits, in coordinates of its subspace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.analysis.subspaces.geometry import span
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.engine import Edit, attached
from reftlens.editing.reft import ReFT, Variant, mode
from reftlens.editing.site import Site
from reftlens.editing.sources import read_sites
from reftlens.interventions.base import Intervention
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class SiteEdits:
    """One entry for each token that is edited at a site, row by row; float64 on the CPU."""

    data: Batch
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


@torch.no_grad()
def edits_of(reft: ReFT, model: Bridge, data: Batch, *, batch_size: int = 16, progress: bool = True) -> list[SiteEdits]:
    """Hidden states and edits of every site in one pass over `data`, all sites at strength 1, dropout off.

    Raises:
        ValueError: if a site chooses no token, an exchange has no source in `data`, or a basis is zero.
    """
    records = [_record_of(site, module) for site, module in reft.items()]

    def recorded(batch: Batch, edits: list[Edit]) -> list[Edit]:
        acting = [record for record in records if bool(record.site.positions.mask(batch.view).any())]
        return [_recorded(edit, record) for edit, record in zip(edits, acting, strict=True)]

    read_edited(reft, model, data, batch_size=batch_size, progress=progress, wrap=recorded)
    return [record.finished(data) for record in records]


@torch.no_grad()
def read_edited(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    variant: Variant = Variant(),
    *,
    batch_size: int = 16,
    progress: bool = True,
    wrap: Callable[[Batch, list[Edit]], list[Edit]] = lambda batch, edits: edits,
) -> list[Float[Tensor, "tokens d"]]:
    """Hidden states of the edited model at each site, after the edit there, dropout off; float64 on the CPU.

    Args:
        wrap: what to attach in place of the edits of a batch: one for each site that chooses a token in it, in order.

    Raises:
        ValueError: if a site chooses no token, or an exchange has no source in `data`.
    """
    check_deterministic(model)
    bound = reft.to(device_of(model)).bind(model)
    reft.require(data.view, variant)
    donors = {} if variant.strength == 0.0 else bound.donors(model, data, variant)

    def editing(batch: Batch, rows: Sequence[int]):
        return attached(wrap(batch, bound.edits(batch.view, variant, donors, rows)))

    places = list(zip(reft.sites, bound.points, strict=True))
    with mode(reft, training=False):
        states = read_sites(model, data, places, batch_size=batch_size, progress=progress, edited=editing)
    return [x.cpu().double() for x in states]


@dataclass
class _Record:
    """What has been seen at one site so far."""

    site: Site
    basis: Float[Tensor, "d rank"]
    span: Float[Tensor, "d k"]
    hidden: list[Tensor] = field(default_factory=list)
    edits: list[Tensor] = field(default_factory=list)

    def add(self, hidden: Float[Tensor, "tokens d"], code: Float[Tensor, "tokens rank"]) -> None:
        self.hidden.append(hidden.cpu().double() @ self.span)
        self.edits.append(code.cpu().double() @ (self.basis.T @ self.span))

    def finished(self, data: Batch) -> SiteEdits:
        rows, columns = self.site.positions.mask(data.view).nonzero().cpu().unbind(dim=1)
        hidden, edits = torch.cat(self.hidden), torch.cat(self.edits)
        return SiteEdits(data, self.site, self.basis, self.span, hidden, edits, rows, columns)


@dataclass(eq=False, repr=False)
class _Recorded(Edit):
    """An edit that records what it reads and what it adds."""

    record: _Record | None = None

    def __call__(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        part, before = self.parts[0], self._read(h)
        x = before.to(part.intervention.working_dtype(before.dtype))
        basis = part.intervention.basis()
        code = part.intervention.coded(x, None if basis is None else basis.to(x.dtype), part.source, part.rows)
        assert self.record is not None
        self.record.add(before, code)
        return super().__call__(h, hook)


def _recorded(edit: Edit, record: _Record) -> Edit:
    """The same edit, recorded."""
    settings = {f.name: getattr(edit, f.name) for f in fields(edit) if f.init}
    return _Recorded(**settings, record=record)


def _record_of(site: Site, module: Intervention) -> _Record:
    basis = module.basis()
    if basis is None:
        whole = torch.eye(module.d, dtype=torch.float64)
        return _Record(site, whole, whole)
    columns = basis.detach().cpu().double()
    return _Record(site, columns, span(columns, name=f"the basis of {module.kind} at {site}").basis)
