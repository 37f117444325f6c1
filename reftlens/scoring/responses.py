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
from reftlens.text.batch import Batch

_TOGETHER = 64  # targets that are computed at once: a vocabulary in float64 is large


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
    every, before = range(len(scorer.plans)), None
    settings = {"batch_size": batch_size, "describe": describe, "progress": progress, "finite": finite}
    for scored in scored_batches(scorer, every, **settings):
        before = scored.logits if scored.job.plan == 0 or before is None else before
        measures[:, scored.job.plan, list(scored.job.rows)] = _measured(scored, before)
    (base, log_prob), (base_accuracy, accuracy), (_, kl) = ((values[0], values[1:]) for values in measures)
    labels, computation = tuple(plans), scorer.computation
    return Responses(labels, log_prob, log_prob - base, accuracy, kl, base_accuracy, computation, scorer.reuses)


@torch.no_grad()
def _measured(scored: Scored, before: Float[Tensor, "targets vocab"]) -> Float[Tensor, "measures row"]:
    """Log-probability, accuracy and divergence from the unedited logits `before`, of each row."""
    columns: list[Tensor] = []
    parts = (x.split(_TOGETHER) for x in (scored.logits, before, scored.batch.target_ids))
    for logits, unedited, ids in zip(*parts, strict=True):
        p, q = (x.double().log_softmax(dim=-1) for x in (logits, unedited))
        right = (logits.argmax(dim=-1) == ids).double()
        columns.append(torch.stack([p.gather(1, ids[:, None])[:, 0], right, _divergence(p, q)]))
    values = torch.cat(columns, dim=1)
    return torch.stack([per_example(row, scored.batch) for row in values])


def _divergence(p: Float[Tensor, "tokens vocab"], q: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """`KL(p ‖ q) = Σ p (log p - log q)` of each token, in nats, from log-probabilities in float64.

    In float32 the two normalisers alone are wrong by more than small doses change. A token that `p` excludes adds
    nothing.
    """
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=-1)
