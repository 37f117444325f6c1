"""What each plan can change of a data set: the tokens it edits, the block its cone begins at, the cone of each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import Span, Window, first_block, spans
from reftlens.cone.watched import Watched
from reftlens.editing.bound import Bound
from reftlens.editing.edits import Edit, TokenIndex
from reftlens.text.batch import Batch
from reftlens.text.view import Mask


@dataclass(frozen=True)
class PlanCone:
    """The light cone of one plan on a right-padded data set, which is on the host."""

    bound: Bound
    masks: dict[int, Mask]
    """The tokens edited at each active place."""
    first: int
    """The first block that is computed."""
    spans: list[Span]
    """Of each row."""
    steps: Int[Tensor, "rows seq"]
    """Of each token: `TokenView.steps`."""

    def edits(
        self, window: Window, places: Int[Tensor, " rows"], numbers: Int[Tensor, " rows"], device: torch.device
    ) -> dict[int, Edit]:
        """The edit of each place that chooses a token of some rows of a window, for a pass on `device`.

        Args:
            places: of the rows, in the window.
            numbers: of the same rows, in the data set.
        """
        edits: dict[int, Edit] = {}
        part = window.take(places)
        for i, mask in self.masks.items():
            rows, columns = (part.cut(mask[numbers]) & part.real).nonzero().unbind(dim=1)
            if len(rows):
                shape = window.real.shape[0], window.real.shape[1]
                tokens = TokenIndex(places[rows].to(device), columns.to(device), shape)
                number, place = numbers[rows], columns + part.starts[rows]
                edits[i] = self.bound.edit_on(i, tokens, number, place, self.steps[number, place])
        return edits


def plan_cones(
    data: Batch, bounds: Sequence[Bound], depth: int, reuse: Reuse, watched: Sequence[Watched] = ()
) -> list[PlanCone]:
    """The cone of each plan on right-padded `data`; spans are computed once for plans that edit the same tokens.

    That of the unedited model begins at the final norm, at the first scored token. All that is watched is in each cone.
    """
    cones, known, view = [], dict[bytes, list[Span]](), data.view
    looked = [each.site.positions.mask(view) for each in watched]
    lowest = [first_block(each.point.name or "", depth) or 0 for each in watched]
    for bound in bounds:
        places = bound.places
        active = () if bound.variant.strength == 0.0 else bound.active
        masks = {i: bound.variant.mask(places[i].site, view) for i in active}
        none = torch.zeros_like(data.attention_mask)
        edited = torch.stack([none, *looked, *masks.values()]).any(dim=0)
        over = [mask & view.prompt for i, mask in masks.items() if places[i].intervention.pools]
        pooled = torch.stack([none, *looked, *over]).any(dim=0)
        key = torch.stack([edited, pooled]).cpu().numpy().tobytes()
        if key not in known:
            known[key] = spans(data, edited, pooled, tokens=reuse.tokens)
        blocks = [*lowest, *(first_block(places[i].point.name or "", depth) or 0 for i in active)]
        first = min(blocks, default=depth) if reuse.depth else 0
        cones.append(PlanCone(bound, masks, first, known[key], view.steps))
    return cones


def alone(data: Batch, row: int) -> Batch:
    """One row, without padding."""
    single = data[[row]].right_padded()
    length = int(single.attention_mask.sum())
    return single.rearranged(lambda x: x[:, :length])
