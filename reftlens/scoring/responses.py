"""How the model's predictions respond to edits: log-probability gained, and divergence from the unedited model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan, Scored
from reftlens.cone.reuse import Reuse
from reftlens.scoring.comparison import per_example, scored_batches, scorer_of
from reftlens.scoring.divergence import Softmax, softmax_and_divergence, softmax_of
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Responses:
    """For each plan, in the order of the labels, and example: means over the example's target tokens."""

    labels: tuple[str, ...]
    """Of the plans."""
    log_prob: Float[Tensor, "plan example"]
    """Mean log-probability of the targets, in nats per token (minus the loss)."""
    effect: Float[Tensor, "plan example"]
    """The same less that of the unedited model: nats gained per target token."""
    accuracy: Float[Tensor, "plan example"]
    """Share of the targets that are the most likely token."""
    kl: Float[Tensor, "plan example"]
    """KL(edited ‖ unedited) of the predictions of the targets, in nats per token."""
    unedited_accuracy: Float[Tensor, " example"]
    computation: str
    """What was computed for each plan, and what was reused; or why everything was computed."""
    reused: bool
    """Whether anything was: then each way of computing was also checked, unless `reuse` says otherwise."""


def responses(
    model: Bridge,
    data: Batch,
    plans: Mapping[str, Plan],
    *,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
    describe: str = "responses",
    finite: bool = True,
) -> Responses:
    """Score `data` under each plan beside the unedited model, dropout off; float64 from the logits on.

    A plan takes those sources of `data` that its sites exchange.

    Raises:
        NotFinite: with `finite`, for logits that hold NaN or infinity.
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """
    edited = list(plans.values())
    unedited = [plan._replace(variant=replace(plan.variant, strength=0.0)) for plan in edited[:1]]
    scorer = scorer_of(model, data, [*unedited, *edited], reuse)
    measures = torch.zeros(3, len(scorer.plans), len(data), dtype=torch.float64)
    every, before, base = range(len(scorer.plans)), None, None
    settings = {"batch_size": batch_size, "describe": describe, "progress": progress, "finite": finite}
    for scored in scored_batches(scorer, every, **settings):
        if before is None or base is None or scored.job.plan == 0:
            before = softmax_of(scored.logits)
            base = _measured(scored, before, torch.zeros_like(before.total[:, 0]))
        unchanged = scored.logits is before.logits
        values = base if unchanged else _measured(scored, *softmax_and_divergence(scored.logits, before))
        measures[:, scored.job.plan, list(scored.job.rows)] = values
    (base, log_prob), (base_accuracy, accuracy), (_, kl) = ((values[0], values[1:]) for values in measures)
    labels, computation = tuple(plans), scorer.computation
    return Responses(labels, log_prob, log_prob - base, accuracy, kl, base_accuracy, computation, scorer.reuses)


def _measured(scored: Scored, p: Softmax, kl: Float[Tensor, " targets"]) -> Float[Tensor, "measures row"]:
    """Mean log-probability, accuracy and divergence of the targets of each row."""
    ids = scored.batch.target_ids
    right = (scored.logits.argmax(dim=-1) == ids).double()
    return torch.stack([per_example(values, scored.batch) for values in (p.log_prob(ids), right, kl)])
