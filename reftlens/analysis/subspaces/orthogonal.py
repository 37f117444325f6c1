"""Subspaces of several interventions made orthogonal to each other."""

from collections.abc import Sequence

import torch

from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.interventions.base import Intervention
from reftlens.interventions.family import ConsReFT, LobiReFT, LoReFT, OrthoDiReFT
from reftlens.interventions.interchange import DAS

_FRAMED = (LoReFT, OrthoDiReFT, ConsReFT, LobiReFT, DAS)


@torch.no_grad()
def orthogonalise(refts: Sequence[ReFT]) -> list[ReFT]:
    """Copies whose bases at equal sites are orthogonal to each other: none reads or writes what another does there.

    The bases `B₁ … Bₙ` of a site are replaced by the nearest jointly orthonormal columns (symmetric, after Löwdin
    1950: `[B₁ … Bₙ] = U S Vᵀ` becomes `U Vᵀ`), so that no edit comes first; orthogonal ones stay as they are. `W` and
    `b` are kept: a LoReFT still sets the coordinates along its basis to `f(W h + b)`. What that does to the effects
    is for `composition` to say.

    Raises:
        ValueError: where a kind without an orthonormal basis of its own shares a site (LoReFT, OrthoDiReFT, ConsReFT,
            LobiReFT and DAS have one), or the bases are linearly dependent.
    """
    copies = [reft.clone() for reft in refts]
    for sites, modules in _shared(copies):
        where = ", ".join(map(str, sites))
        frames = [m.frame for m in modules if isinstance(m, _FRAMED) and m.frame is not None]
        if len(frames) < len(modules):
            kinds = ", ".join(m.kind for m in modules)
            raise ValueError(f"{kinds} meet at {where}: only LoReFT, OrthoDiReFT, ConsReFT, LobiReFT and DAS can turn")
        bases = torch.cat([frame().double() for frame in frames], dim=1)
        left, size, right = torch.linalg.svd(bases, full_matrices=False)
        if bases.shape[1] > bases.shape[0] or size[-1] < 1e-4:
            raise ValueError(
                f"the {bases.shape[1]} directions at {where} are linearly dependent (smallest singular value "
                f"{size[-1].item():.2g}): no orthogonal ones are near them; use edits of smaller rank, or other sites"
            )
        if (size - 1).abs().max() > 1e-6:  # not orthogonal already, up to rounding
            turned = (left @ right).split([frame.matrix.shape[1] for frame in frames], dim=1)
            for frame, basis in zip(frames, turned, strict=True):
                frame.set(basis)
    return copies


def _shared(refts: Sequence[ReFT]) -> list[tuple[list[Site], list[Intervention]]]:
    """Sites at which several interventions meet, with these; sites that tied interventions link are one entry."""
    groups: list[tuple[list[Site], dict[int, Intervention]]] = []
    for site in dict.fromkeys(site for reft in refts for site in reft.sites):
        sites, here = [site], {id(reft[site]): reft[site] for reft in refts if site in reft.sites}
        linked = [group for group in groups if group[1].keys() & here.keys()]
        for group in linked:
            groups.remove(group)
            sites, here = [*group[0], *sites], group[1] | here
        groups.append((sites, here))
    return [(sites, list(here.values())) for sites, here in groups if len(here) > 1]
