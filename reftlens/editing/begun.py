"""Rows that begin alike, read without an edit: they go on from stored keys and values of their beginning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.trial import LIMITS
from reftlens.editing.site import Site
from reftlens.text.batch import Batch
from reftlens.text.beginnings import PASS, shared_beginnings
from reftlens.text.view import Mask

Read = Callable[[Tensor, Tensor, Sequence[Mask], DynamicCache | None], list[Sequence[Float[Tensor, "tokens d"]]]]
"""`(tokens, real, masks, cache)`: of each site, what its mask chooses in each row of one pass. The tokens come after
those in the cache, which `real` covers too."""


def read_begun(read: Read, data: Batch, sites: Sequence[Site], size: int) -> dict[int, Sequence[Tensor]]:
    """What is chosen at each site, of those rows that share a beginning that pays; `size` rows go on from it at a time.

    The longest row of each group is read in full as well. Where going on gives something else, or fails, as it may on
    a model that stores other things than keys and values of each token, that group and those after it are left out.
    """
    data, overhead = data.right_padded(), 3 * PASS[data.tokens.device.type]
    if len(data) < 3 or not shared_beginnings(data.tokens, data.attention_mask.sum(dim=1).tolist(), overhead=overhead):
        return {}
    rows = _Rows(read, data, [site.positions.mask(data.view) for site in sites])
    chosen = torch.stack([mask.cpu() for mask in rows.masks]).any(dim=0).long()
    firsts, states = chosen.argmax(dim=1).tolist(), dict[int, Sequence[Tensor]]()
    stops = (chosen * torch.arange(1, chosen.shape[1] + 1)).amax(dim=1).tolist()
    for shared in shared_beginnings(data.tokens, firsts, overhead=overhead):
        order = sorted(shared.rows, key=lambda row: -stops[row])
        if (len(order) - 1) * shared.length <= overhead + stops[order[0]]:
            continue
        try:
            group = rows.after(shared.length, [order[i : i + size] for i in range(0, len(order), size)], stops)
        except Exception:  # whatever a model's own code says to stored keys; what else is wrong, reading in full says
            break
        if not group:
            break
        states |= group
    return states


@dataclass(frozen=True)
class _Rows:
    """Right-padded rows, and which of their tokens are chosen at each site."""

    read: Read
    data: Batch
    masks: Sequence[Mask]

    def after(self, length: int, groups: Sequence[list[int]], stops: Sequence[int]) -> dict[int, Sequence[Tensor]]:
        """What is chosen in the rows of `groups`, the longest first, after a beginning of so many tokens that all have.

        Nothing, where it is not what is read of the first row in full.
        """
        first, cache, states = groups[0][:1], DynamicCache(), dict[int, Sequence[Tensor]]()
        self._columns(first, 0, length, cache)
        whole = [rows[0] for rows in self._columns(first, 0, stops[first[0]])]
        for group in groups:
            begun = DynamicCache()
            begun.layers.extend(_Begun(layer) for layer in cache.layers)
            vectors = self._columns(group, length, stops[group[0]], begun)
            states.update(zip(group, zip(*vectors, strict=True), strict=True))
            if not all(map(_agree, states[first[0]], whole)):
                return {}
        return states | {first[0]: whole}

    def _columns(
        self, rows: list[int], start: int, stop: int, cache: DynamicCache | None = None
    ) -> list[Sequence[Tensor]]:
        masks = [mask[rows, start:stop] for mask in self.masks]
        return self.read(self.data.tokens[rows, start:stop], self.data.attention_mask[rows, :stop], masks, cache)


class _Begun(DynamicLayer):
    """Stored keys and values of one row before those that a pass computes, in each of its rows; none of these stays."""

    def __init__(self, stored: Any) -> None:
        super().__init__()
        self.lazy_initialization(stored.keys, stored.values)
        self.keys, self.values = self.stored = stored.keys, stored.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        pairs = zip(self.stored, (key_states, value_states), strict=True)
        keys, values = (torch.cat([old.expand(len(new), -1, -1, -1), new], dim=2) for old, new in pairs)
        return keys, values


def _agree(measured: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding alone; not where one of them is NaN."""
    error, size = (measured.double() - expected.double()).norm(), expected.double().norm()
    return bool(error <= LIMITS.get(expected.dtype, 0.1) * size)
