"""Which pairs a score counts, and why it leaves out the others."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from reftlens import figures
from reftlens.editing.reft import ReFT
from reftlens.editing.sources import differing
from reftlens.editing.variant import Variant
from reftlens.errors import index_of
from reftlens.figures import DataFrame
from reftlens.interventions.masks import GatedExchange
from reftlens.text.batch import Batch

Reasons = Mapping[str, Bool[Tensor, " pair"]]
"""For each reason the pairs that it holds for."""


@dataclass(frozen=True)
class Ledger:
    """For each score and pair the first reason that holds for leaving the pair out, None where it counts.

    Counted and left out together are all pairs.
    """

    reasons: Mapping[str, tuple[str | None, ...]]

    @staticmethod
    def of(pairs: int, scores: Mapping[str, Reasons]) -> "Ledger":
        """Of `pairs` pairs, for each score the reasons in the order in which they are looked at."""
        reasons: dict[str, tuple[str | None, ...]] = {}
        for score, holds in scores.items():
            masks = {reason: mask.tolist() for reason, mask in holds.items()}
            reasons[score] = tuple(next((r for r, mask in masks.items() if mask[i]), None) for i in range(pairs))
        return Ledger(reasons)

    def _of(self, score: str) -> tuple[str | None, ...]:
        return list(self.reasons.values())[index_of(list(self.reasons), score, "score")]

    def counted(self, score: str) -> Bool[Tensor, " pair"]:
        """The pairs that a score counts."""
        return torch.tensor([reason is None for reason in self._of(score)], dtype=torch.bool)

    def left_out(self, score: str) -> dict[str, int]:
        """How many pairs each reason leaves out of a score."""
        return dict(Counter(reason for reason in self._of(score) if reason is not None))

    def columns(self) -> dict[str, list[str]]:
        """For a table of one row per pair: of each score that leaves out some, the reason, empty where it counts."""
        return {
            f"not in {score}": [r or "" for r in reasons] for score, reasons in self.reasons.items() if any(reasons)
        }

    def to_frame(self) -> DataFrame:
        """One row per score and reason, with the number of pairs; the reason of those that count is "counted"."""
        records = []
        for score, reasons in self.reasons.items():
            counts = {"counted": reasons.count(None), **self.left_out(score)}
            records += [{"score": score, "reason": reason, "pairs": n} for reason, n in counts.items()]
        return figures.table(records)

    @property
    def lines(self) -> list[str]:
        """A sentence for each score that leaves out some."""
        sentences = []
        for score, reasons in self.reasons.items():
            why = "; ".join(f"{reason}: {n}" for reason, n in self.left_out(score).items())
            if why:
                sentences.append(f"{score} counts {reasons.count(None)} of {len(reasons)} pairs ({why})")
        return sentences

    def __repr__(self) -> str:
        return "\n".join(self.lines) or "every score counts every pair"


COMPLETE = Ledger({})
"""Of what leaves out nothing."""


def without_exchange(reft: ReFT, data: Batch, variant: Variant = Variant()) -> Reasons:
    """The pairs in which an exchange changes nothing, so that their answers are those of the unedited model."""
    sites = [reft.sites[i] for i in variant.active(reft.sites)]
    alike, missing = torch.ones(2, len(data), dtype=torch.bool)
    alike[list(differing(sites, data))] = False
    for source in data.sources.values():
        missing &= source.rows.cpu() < 0
    gated = [m for m in (reft[site] for site in sites) if isinstance(m, GatedExchange) and not m.learned_rank]
    shut = torch.full_like(alike, len(gated) == len(sites))
    return {
        "every gate is shut (learned rank 0)": shut,
        "no source to take from": missing,
        "alike up to what is exchanged": alike,
    }


def of_variable(batches: Mapping[str, Batch], variable: str | None) -> Ledger:
    """Of pairs by what they are for, those left out as they exchange other variables than the one looked at."""
    reasons: dict[str, tuple[str | None, ...]] = {}
    for name, data in batches.items():
        looked_at = variable or next(iter(data.sources))
        others = {f"does not exchange {looked_at!r}": data.sources[looked_at].rows.cpu() < 0}
        reasons |= Ledger.of(len(data), {name: others}).reasons
    return Ledger(reasons)
