"""Hidden states of the edited model that an objective asked to see beside the logits, in the graph of the pass."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge, resolve_hook
from reftlens.editing.edits import token_vectors
from reftlens.editing.engine import Hook
from reftlens.editing.site import Site, check_site
from reftlens.editing.variant import Variant
from reftlens.errors import SiteNeverFired
from reftlens.text.batch import Batch
from reftlens.text.view import Mask


class Watched(NamedTuple):
    """A site that is looked at."""

    name: str
    site: Site
    point: HookPoint


def watched_on(model: Bridge, sites: Mapping[str, Site], data: Batch) -> tuple[Watched, ...]:
    """The sites on a model.

    Raises:
        TypeError: for what is no site.
        HookNotFound: for a hook that the model does not have.
        ValueError: for a hook that cannot be used, or a site that chooses no token in any row of the data.
    """
    hooks = model.hook_dict if sites else {}
    for site in sites.values():
        check_site(site)
        Variant().require([site], data.view)
    return tuple(Watched(name, site, resolve_hook(model, site.hook, hooks)) for name, site in sites.items())


class Watch:
    """Reads what passes through the hooks of watched sites in one forward pass, after any edit there."""

    def __init__(self, watched: Sequence[Watched], masks: Sequence[Mask]) -> None:
        self._watched, self._masks = watched, masks
        self._read: list[list[Tensor]] = [[] for _ in watched]
        self.hooks: list[Hook] = [
            (each.point, lambda h, hook, into=into: into.append(h))
            for each, into in zip(watched, self._read, strict=True)
        ]

    def by_row(self) -> list[dict[str, Float[Tensor, "tokens d"]]]:
        """For each row of the pass and each site the hidden states at the tokens that it chooses.

        Raises:
            SiteNeverFired: where nothing passed through a hook, or more than once.
        """
        rows: list[dict[str, Tensor]] = [{} for _ in range(len(self._masks[0]) if self._masks else 0)]
        for each, read, mask in zip(self._watched, self._read, self._masks, strict=True):
            if not read:
                raise SiteNeverFired(f"no hidden state passed through {each.site.hook}, which the objective looks at")
            vectors = token_vectors(read[0], each.site.heads, each.site.hook)
            parts = vectors[mask.to(vectors.device)].split(mask.sum(dim=1).tolist())
            for row, part in zip(rows, parts, strict=True):
                row[each.name] = part
        return rows


def joined_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Float[Tensor, "tokens d"]]:
    """The hidden states of several rows at each site, row after row."""
    return {name: torch.cat([row[name] for row in rows]) for name in (rows[0] if rows else ())}
