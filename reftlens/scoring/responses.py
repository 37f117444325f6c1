"""How the model's predictions respond to edits: log-probability gained, and divergence from the unedited model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan, Scored
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.numbers import whole
from reftlens.scoring.comparison import check_plans, per_example, scored_batches, scorer_of
from reftlens.scoring.divergence import Softmax, softmax_and_divergence, softmax_of
from reftlens.scoring.remembered import ScoreTable
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Responses:
    """For each plan, in their order, and example: means over the example's target tokens."""

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
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""


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

    What is the same computation of a row (equal edited tokens, parameters and strength) is computed once, and what
    an earlier call scored is read, unless `reuse` says otherwise.

    Raises:
        NotFinite: with `finite`, for logits that hold NaN or infinity.
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """
    first = next(iter(plans.values()), None)
    every = [] if first is None else [first._replace(variant=replace(first.variant, strength=0.0)), *plans.values()]
    check_plans(model, data, every)
    table = ScoreTable(model, data, every, reuse, "responses")
    settings = {
        "batch_size": whole(batch_size, "batch_size", 1),
        "describe": describe,
        "progress": progress,
        "finite": finite,
    }
    scorer = _score_missing(table, model, data, every, settings)
    (base, log_prob), (base_accuracy, accuracy), (_, kl) = ((x[0], x[1:]) for x in table.table())
    computation = table.computation(scorer)
    reused = scorer is None or scorer.reuses
    return Responses(log_prob, log_prob - base, accuracy, kl, base_accuracy, computation, reused, data.among)


def swept(
    model: Bridge,
    data: Batch,
    questions: Mapping[str, Mapping[str, Plan]],
    *,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
) -> dict[str, Responses]:
    """`responses` to the plans of several questions, by the question's name, scored in one sweep."""
    every = {f"{name}: {label}": plan for name, plans in questions.items() for label, plan in plans.items()}
    r = responses(model, data, every, batch_size=batch_size, reuse=reuse, progress=progress)
    parts, ends = {}, accumulate(map(len, questions.values()))
    for (name, plans), end in zip(questions.items(), ends, strict=True):
        log_prob, effect, accuracy, kl = (x[end - len(plans) : end] for x in (r.log_prob, r.effect, r.accuracy, r.kl))
        parts[name] = replace(r, log_prob=log_prob, effect=effect, accuracy=accuracy, kl=kl)
    return parts


def _score_missing(
    table: ScoreTable, model: Bridge, data: Batch, every: Sequence[Plan], settings: dict[str, Any]
) -> Scorer | None:
    """Log-probability, accuracy and divergence from the first plan, the unedited model, of what is not known."""
    missing = table.missing()
    missing[0] = sorted(set().union(*missing))
    plans = [p for p, rows in enumerate(missing) if rows]
    if not plans:
        return None
    scorer = scorer_of(model, data, [every[p] for p in plans], table.reuse)
    unedited = _Unedited(compares=len(plans) > 1)
    for scored in scored_batches(scorer, range(len(plans)), rows=[missing[p] for p in plans], whole=False, **settings):
        p, kl = unedited.read(scored) if scored.job.plan == 0 else unedited.compared(scored)
        table.put(plans[scored.job.plan], scored.job.rows, _measured(scored, p, kl))
    table.keep(scorer)
    return scorer


class _Unedited:
    """What the unedited model predicts for the rows that are scored now, which come in parts."""

    def __init__(self, *, compares: bool) -> None:
        self.compares = compares
        self._parts: list[Softmax] = []
        self._at: dict[int, list[int]] = {}
        """Of each row, its targets among those of all parts."""
        self._whole: Softmax | None = None

    def read(self, scored: Scored) -> tuple[Softmax, Float[Tensor, " targets"]]:
        """Of some rows; the first that come after others have been compared begin anew."""
        if self._whole is not None:
            self._parts, self._at, self._whole = [], {}, None
        p, begin = softmax_of(scored.logits), sum(map(len, self._at.values()))
        for row, count in zip(scored.job.rows, scored.batch.target_mask.sum(dim=1).tolist(), strict=True):
            self._at[row] = list(range(begin, begin + count))
            begin += count
        self._parts += [p] * self.compares
        return p, torch.zeros_like(p.total[:, 0])

    def compared(self, scored: Scored) -> tuple[Softmax, Float[Tensor, " targets"]]:
        """The softmax of edited rows, and their divergence."""
        if self._whole is None:
            parts = self._parts
            self._whole = parts[0] if len(parts) == 1 else Softmax(*map(torch.cat, zip(*parts, strict=True)))
        at = torch.tensor([i for row in scored.job.rows for i in self._at[row]], device=scored.logits.device)
        return softmax_and_divergence(scored.logits, self._whole, at)


def _measured(scored: Scored, p: Softmax, kl: Float[Tensor, " targets"]) -> Float[Tensor, "measures row"]:
    """Mean log-probability, accuracy and divergence of the targets of each row."""
    ids = scored.batch.target_ids
    right = (scored.logits.argmax(dim=-1) == ids).double()
    return torch.stack([per_example(values, scored.batch) for values in (p.log_prob(ids), right, kl)])
