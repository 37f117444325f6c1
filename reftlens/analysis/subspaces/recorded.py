"""What an intervention does to each token of a data set: hidden states and edits, in coordinates of its subspace."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.analysis.subspaces.geometry import span
from reftlens.bridge.protocol import Bridge, check_deterministic
from reftlens.editing.edits import Observer, Part
from reftlens.editing.engine import attached
from reftlens.editing.reading import read_sites
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
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
    observers = {i: record.observe for i, record in enumerate(records)}
    read_edited(reft, model, data, batch_size=batch_size, progress=progress, observers=observers)
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
    observers: Mapping[int, Observer] = {},
) -> list[Float[Tensor, "tokens d"]]:
    """Hidden states of the edited model at each site, after the edit there, dropout off; float64 on the CPU.

    Args:
        observers: called with the edits at the sites of these indices and the hidden states that they edit.

    Raises:
        ValueError: if a site chooses no token, or an exchange has no source in `data`.
    """
    check_deterministic(model)
    bound = reft.bound_to(model, data, variant)

    def editing(batch: Batch, rows: Sequence[int]) -> AbstractContextManager[None]:
        return attached(model, bound.edits(batch.view, rows, observers))

    places = [(place.site, place.point) for place in bound.places]
    with training_mode(reft, training=False):
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

    def observe(self, part: Part, hidden: Float[Tensor, "tokens d"]) -> None:
        """Take note of the hidden states that an edit reads, and of what it adds."""
        module, basis = part.intervention, part.intervention.basis()
        x = hidden.to(module.working_dtype(hidden.dtype))
        code = module.coded(x, None if basis is None else basis.to(x.dtype), part.source, part.origin)
        self.hidden.append(hidden.cpu().double() @ self.span)
        self.edits.append(code.cpu().double() @ (self.basis.T @ self.span))

    def finished(self, data: Batch) -> SiteEdits:
        rows, columns = self.site.positions.mask(data.view).nonzero().cpu().unbind(dim=1)
        hidden, edits = torch.cat(self.hidden), torch.cat(self.edits)
        return SiteEdits(data, self.site, self.basis, self.span, hidden, edits, rows, columns)


def _record_of(site: Site, module: Intervention) -> _Record:
    basis = module.basis()
    if basis is None:
        whole = torch.eye(module.d, dtype=torch.float64)
        return _Record(site, whole, whole)
    columns = basis.detach().cpu().double()
    return _Record(site, columns, span(columns, name=f"the basis of {module.kind} at {site}").basis)
