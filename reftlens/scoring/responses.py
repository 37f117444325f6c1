"""How the model's predictions respond to edits: log-probability gained, and divergence from the unedited model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.scoring.comparison import Compared, Comparison
from reftlens.scoring.evaluation import per_example
from reftlens.text.batch import Batch

_TOGETHER = 64  # targets that are computed at once: a vocabulary in float64 is large


@dataclass(frozen=True, eq=False)
class Responses:
    """For each plan `(intervention, variant)` and example, means over the example's target tokens."""

    log_prob: Float[Tensor, "plan example"]
    """Of the targets, in nats per target token: the loss with its sign turned."""
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
    """Whether anything was: then it was also checked on the first batch, unless `reuse` says otherwise."""


def responses(
    model: Bridge,
    data: Batch,
    plans: Sequence[tuple[ReFT, Variant]],
    *,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
    describe: str = "responses",
) -> Responses:
    """Score `data` under each plan beside the unedited model, dropout off; float64 from the logits on.

    A plan takes those sources of `data` that its sites exchange.

    Raises:
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """
    found = torch.zeros(5, len(plans), len(data), dtype=torch.float64)
    compared = Comparison(model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe=describe)
    for one in compared:
        found[:, one.plan, list(one.rows)] = _measured(one)
    log_prob, effect, accuracy, kl, unedited = found
    said, full = compared.computation, compared.scorer.why_full
    return Responses(log_prob, effect, accuracy, kl, unedited[0], said, not full)


def _measured(one: Compared) -> Float[Tensor, "measures row"]:
    columns: list[Tensor] = []
    pieces = (x.split(_TOGETHER) for x in (one.logits, one.unedited, one.batch.target_ids))
    for logits, unedited, ids in zip(*pieces, strict=True):
        p, q = (x.double().log_softmax(dim=-1) for x in (logits, unedited))
        right, before = ((x.argmax(dim=-1) == ids).double() for x in (logits, unedited))
        gained = _of(p, ids) - _of(q, ids)
        columns.append(torch.stack([_of(p, ids), gained, right, _divergence(p, q), before]))
    values = torch.cat(columns, dim=1)
    return torch.tensor([per_example(row, one.batch) for row in values], dtype=torch.float64)


def _divergence(p: Float[Tensor, "tokens vocab"], q: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """`KL(p ‖ q) = Σ p (log p - log q)` of each token, in nats, from log-probabilities in float64.

    In float32 the two normalisers alone are wrong by more than small doses change. A token that `p` excludes adds
    nothing.
    """
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=-1)


def _of(log_probs: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return log_probs.gather(1, ids[:, None])[:, 0]
