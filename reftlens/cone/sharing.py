"""How far rows under one plan are one computation: equal tokens, edited alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens.cone.layout import PlanCone
from reftlens.text.batch import Batch
from reftlens.text.beginnings import Beginning, shared_beginnings


@dataclass(frozen=True)
class Sharing:
    """Of the rows of right-padded `data` under one plan, what is the same computation."""

    data: Batch
    cone: PlanCone

    @cached_property
    def codes(self) -> Int[Tensor, "rows seq"]:
        """Equal for equal tokens that are edited at the same sites, and, where that counts, as far after the prompt."""
        codes = self.data.tokens.cpu().long()
        if any(self.cone.bound.places[i].intervention.counts for i in self.cone.masks):
            steps = self.cone.steps.cpu() + 1
            _, codes = torch.unique(codes * (steps.max() + 1) + steps, return_inverse=True)
        masks = {mask.cpu().numpy().tobytes(): mask.cpu() for mask in self.cone.masks.values()}
        for mask in masks.values():
            _, codes = torch.unique(2 * codes + mask, return_inverse=True)
        return codes

    @cached_property
    def _ends(self) -> dict[bool, list[int]]:
        """Of each row, where it goes on alone, in training and else: its first scored token, or the first whose edit
        is its own: exchanged for that of a source, pooled over tokens of the row, or with dropout."""
        real = self.data.attention_mask
        alone = torch.zeros_like(real)
        alone[self.data.predicting] = True
        random = alone.clone()
        for i, mask in self.cone.masks.items():
            module = self.cone.bound.places[i].intervention
            if module.pools or module.variables:
                alone = alone | mask
            if module.dropout.p > 0:
                random = random | mask
        return {t: mask.long().argmax(dim=1).tolist() for t, mask in ((False, alone), (True, alone | random))}

    def end(self, row: int) -> int:
        places = self.cone.bound.places
        training = any(places[i].intervention.training for i in self.cone.masks)
        return self._ends[training][row]


def shared_cones(rows: Sequence[tuple[int, int, Sharing]], overhead: float) -> list[Beginning]:
    """Groups of rows that begin with the same computation, where that pays; its length is that within the cone.

    Args:
        rows: of each its job, its number in the data set, and what is shared under its plan.
    """
    spans = [sharing.cone.spans[number] for _, number, sharing in rows]
    ends = [sharing.end(number) for _, number, sharing in rows]
    lengths = [max(0, end - span.start) for end, span in zip(ends, spans, strict=True)]
    if sum(lengths) - max(lengths) <= overhead:
        return []
    codes, before = torch.full((len(rows), max(lengths)), -1), dict[tuple[object, ...], int]()
    for n, (job, number, sharing) in enumerate(rows):
        if lengths[n]:
            own, start = sharing.codes[number], spans[n].start
            codes[n, : lengths[n]] = own[start : ends[n]]
            key = job, start, own[: start + 1].numpy().tobytes()
            codes[n, 0] = before.setdefault(key, len(before))
    return shared_beginnings(codes, lengths, overhead=overhead)
