"""How large an edit is beside what it edits."""

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.engine import Edit
from reftlens.editing.reft import ReFT, Variant, mode
from reftlens.editing.sources import read_sites
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
    data, bound = data.to(device_of(model)), reft.to(device_of(model)).bind(model)
    reft.require(data.view, variant)
    active, donors = reft.active(variant), bound.donors(model, data, variant)
    sizes = torch.full((len(active), len(data)), torch.nan, dtype=torch.float64)
    places = [(reft.sites[i], bound.points[i]) for i in active]
    with mode(reft, training=False):
        for rows in pieces(len(data), batch_size):
            batch = data[list(rows)]
            states = read_sites(model, batch, places, batch_size=len(rows))
            edits = iter(bound.edits(batch.view, variant, donors, rows))
            for n, (site, _) in enumerate(places):
                acts = variant.mask(site, batch.view)
                if acts.any():
                    h = states[n][acts[site.positions.mask(batch.view)]]
                    sizes[n, list(rows)] = _relative(next(edits), h, len(rows))
    return sizes


def _relative(edit: Edit, h: Float[Tensor, "tokens d"], count: int) -> Float[Tensor, " {count}"]:
    """`‖h' - h‖ / ‖h‖` of the tokens of an edit, mean over those of each row; NaN for a row without."""
    (part,), x = edit.parts, h.to(torch.promote_types(h.dtype, torch.float32))
    edited = part.intervention(x, part.strength, None, part.source, part.rows)
    relative, rows = ((edited - x).norm(dim=-1) / x.norm(dim=-1)).cpu().double(), edit.rows.cpu()
    return torch.zeros(count, dtype=torch.float64).index_add(0, rows, relative) / torch.bincount(rows, minlength=count)
