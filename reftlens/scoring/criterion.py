"""An objective on a data set: with what it is to see of the rows there."""

from collections.abc import Sequence
from copy import copy

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.cone.plans import Plan, Scored
from reftlens.cone.scorer import Scorer
from reftlens.editing.variant import Variant
from reftlens.scoring.comparison import scored_batches
from reftlens.scoring.objectives import Objective, Predictions, cross_entropy


class Criterion:
    """Losses of rows of the data that a scorer scores.

    `first` is the number of the objective's first plan among those of the scorer; None where others say how the rows
    are edited, and losses are those of the first plan.
    """

    first: int | None = None

    def __init__(self, objective: Objective, scorer: Scorer, batch_size: int) -> None:
        objective.check(scorer.data, "the data")
        self.objective, self._scorer = objective, scorer
        self._references: list[Float[Tensor, " targets"]] = []
        if objective.reference:
            self._references = reference_log_probs(scorer, batch_size * objective.group)

    def numbered(self, first: int) -> "Criterion":
        """The same for a run whose first plan has this number."""
        criterion = copy(self)
        criterion.first = first
        return criterion

    def __call__(self, scored: Scored) -> Float[Tensor, " losses"]:
        """Raises `ValueError` where the objective gives losses of another shape."""
        some = [self._references[row] for row in scored.job.rows] if self._references else []
        reference = torch.cat(some).to(scored.logits.device) if some else None
        plan, sites = 0 if self.first is None else scored.job.plan - self.first, self.objective.sites.items()
        rows = {name: site.positions.mask(scored.batch.view).nonzero()[:, 0] for name, site in sites}
        seen = reference, scored.activations, rows
        reft = self._scorer.plans[scored.job.plan].reft
        losses = self.objective.losses(Predictions(scored.logits, scored.batch, plan, *seen, reft))
        if losses.ndim != 1:
            raise ValueError(f"the objective gave losses of shape {list(losses.shape)}, expected one dimension")
        return losses

    def drawn(self, rows: Sequence[int], generator: torch.Generator) -> dict[int, tuple[int, ...]]:
        """By the number of a plan at the scorer, the rows to score under it, of these rows."""
        return {(self.first or 0) + plan: own for plan, own in self.objective.drawn(rows, generator).items()}


def reference_log_probs(scorer: Scorer, batch_size: int) -> list[Float[Tensor, " targets"]]:
    """Of the targets of each row of the scorer's data under the unedited model, in nats; computed in one sweep."""
    unedited = Plan(scorer.plans[0].reft, Variant(strength=0.0))
    sweep = Scorer(scorer.model, scorer.data, [unedited], scorer.reuse, uses=1, autocast=scorer.autocast)
    result: dict[int, Tensor] = {}
    for scored in scored_batches(sweep, [0], batch_size=batch_size, whole=False):
        with torch.no_grad():
            log_probs = -cross_entropy(scored.logits, scored.batch)
        counts = scored.batch.target_mask.sum(dim=1).tolist()
        result |= dict(zip(scored.job.rows, log_probs.split(counts), strict=True))
    return [result[row] for row in range(len(scorer.data))]
