"""How large an edit is beside what it edits."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.reft import Bound, ReFT, Variant, mode
from reftlens.editing.sources import Donor, places_of, read_sites
from reftlens.scoring.comparison import pieces
from reftlens.text.batch import Batch


@torch.no_grad()
def edit_size(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    variant: Variant = Variant(),
    batch_size: int = 16,
) -> Float[Tensor, "site example"]:
    """`‖h' - h‖ / ‖h‖` (that is, RMS over RMS) of each active site, mean over the example's edited tokens.

    `h` is unedited: each site's own edit, as if no other acted, so that it grows with `|strength|` exactly. Where
    several sites act, the later ones meet activations that are edited already, and their edits differ from this.
    NaN for an example in which a site edits no token.
    """
    check_deterministic(model)
    device = device_of(model)
    data, bound = data.to(device), reft.to(device).bind(model)
    reft.require(data.view, variant)
    active, donors = reft.active(variant), bound.donors(model, data, variant)
    sizes = torch.full((len(active), len(data)), torch.nan, dtype=torch.float64)
    places = [(reft.sites[i], bound.points[i]) for i in active]
    with mode(reft, training=False):
        for rows in pieces(len(data), batch_size):
            batch, index = data[list(rows)], torch.tensor(rows, device=device)
            for n, (i, h) in enumerate(
                zip(active, read_sites(model, batch, places, batch_size=len(rows)), strict=True)
            ):
                chosen = reft.sites[i].positions.mask(batch.view)
                acts = variant.mask(reft.sites[i], batch.view)[chosen]
                owner = chosen.nonzero()[:, 0]
                source = _source(donors.get(i), index[owner], chosen)
                relative = _relative(bound, variant, i, h, source, owner, acts)
                sizes[n, list(rows)] = _per_row(relative, owner[acts], len(rows))
    return sizes


def _source(donor: Donor | None, rows: Int[Tensor, " tokens"], chosen: Bool[Tensor, "batch seq"]) -> Tensor | None:
    return None if donor is None else donor.of(rows, places_of(chosen)[chosen])


def _relative(
    bound: Bound, variant: Variant, i: int, h: Float[Tensor, "tokens d"], source: Tensor | None,
    owner: Int[Tensor, " tokens"], acts: Bool[Tensor, " tokens"],
) -> Float[Tensor, " edited"]:  # fmt: skip
    """`‖h' - h‖ / ‖h‖` of the tokens on which site `i` acts."""
    module, x = bound.reft[i], h[acts].to(torch.promote_types(h.dtype, torch.float32))
    if not len(x):
        return x.new_zeros(0)
    rows = owner[acts] if module.pools else None
    edited = module(x, bound.reft.strength(variant, i), None, None if source is None else source[acts], rows)
    return (edited - x).norm(dim=-1) / x.norm(dim=-1)


def _per_row(values: Float[Tensor, " n"], rows: Int[Tensor, " n"], count: int) -> Float[Tensor, " rows"]:
    """Mean of the values of each row; NaN for a row without."""
    total = torch.zeros(count, dtype=torch.float64).index_add(0, rows.cpu(), values.double().cpu())
    return total / torch.bincount(rows.cpu(), minlength=count)
