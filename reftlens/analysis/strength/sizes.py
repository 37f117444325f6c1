"""How large an edit is beside what it edits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.edits import Edit
from reftlens.editing.reading import read_sites
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.variant import Variant
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
    states: Sequence[Float[Tensor, "_ _"]] | None = None,
) -> Float[Tensor, "site example"]:
    """`‖h' - h‖ / ‖h‖` (that is, RMS over RMS) of each active site, mean over the example's edited tokens.

    `h` is unedited: each site's own edit, as if no other acted, so that it grows with `|strength|` exactly. Where
    several sites act, the later ones meet activations that are edited already, and their edits differ from this.
    NaN for an example in which a site edits no token.

    Args:
        states: what `read_sites` reads of the unedited model at the sites that act, where that has been done.
    """
    check_deterministic(model)
    data = data.to(device_of(model))
    bound = reft.bound_to(model, data, variant)
    sizes = torch.full((len(bound.active), len(data)), torch.nan, dtype=torch.float64)
    places = [(bound.places[i].site, bound.places[i].point) for i in bound.active]
    with training_mode(reft, training=False):
        for rows in pieces(len(data), batch_size if states is None else len(data)):
            batch = data[list(rows)]
            read = read_sites(model, batch, places, batch_size=len(rows)) if states is None else states
            for n, i in enumerate(bound.active):
                edit, (site, _) = bound.edit(i, batch.view, rows), places[n]
                if edit is not None:
                    acts = variant.mask(site, batch.view)[site.positions.mask(batch.view)]
                    sizes[n, list(rows)] = _relative(edit, read[n][acts], len(rows))
    return sizes


def _relative(edit: Edit, h: Float[Tensor, "tokens d"], count: int) -> Float[Tensor, " {count}"]:
    """`‖h' - h‖ / ‖h‖` of the tokens of an edit, mean over those of each row; NaN for a row without."""
    (part,), x = edit.parts, h.to(torch.promote_types(h.dtype, torch.float32))
    relative, rows = ((part(x) - x).norm(dim=-1) / x.norm(dim=-1)).cpu().double(), edit.tokens.rows.cpu()
    return torch.zeros(count, dtype=torch.float64).index_add(0, rows, relative) / torch.bincount(rows, minlength=count)
