"""Collect hidden states at a site: what mean ablation, fixed directions and many analyses start from."""

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge, check_deterministic, check_model, resolve_hook
from reftlens.editing.site import Site
from reftlens.editing.sources import read_sites
from reftlens.text.batch import Batch


@torch.no_grad()
def activations(
    model: Bridge, data: Batch, site: Site, *, batch_size: int = 16, progress: bool = True
) -> Float[Tensor, "tokens d"]:
    """Hidden states of the unedited model at the positions of `site`, row by row, on the CPU in float32 or wider.

    Chosen heads of one token are joined to one vector, as an intervention at the site would see them.
    """
    if not isinstance(site, Site):
        raise TypeError(f"site={site!r}, expected a Site: Site({site!r}, 'last'), or resid_post(8, 'last')")
    check_model(model)
    check_deterministic(model)
    place = (site, resolve_hook(model, site.hook))
    (read,) = read_sites(model, data, [place], batch_size=batch_size, progress=progress)
    result = read.to("cpu", torch.promote_types(read.dtype, torch.float32))
    if not len(result):
        raise ValueError(f"{site} chooses no token in any of {len(data)} row(s)")
    return result
