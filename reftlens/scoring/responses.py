"""How the model's predictions respond to edits: log-probability gained, and divergence from the unedited model."""

from collections.abc import Hashable, Mapping
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
from reftlens.editing.reft import check_types
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

    What is the same computation (equal tokens, sites and strength of one `ReFT`) is computed once.

    Raises:
        NotFinite: with `finite`, for logits that hold NaN or infinity.
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """
    first: dict[Hashable, Plan] = {}
    keys: list[Hashable] = []
    for plan in plans.values():
        check_types(plan.reft, model, data)
        nothing = plan._replace(variant=replace(plan.variant, strength=0.0))
        first = first or {_computation(nothing, data): nothing}  # the unedited model, before all
        keys.append(_computation(plan, data))
        first.setdefault(keys[-1], plan)
    scorer = scorer_of(model, data, list(first.values()), reuse)
    settings = {"batch_size": batch_size, "describe": describe, "progress": progress, "finite": finite}
    places = {key: i for i, key in enumerate(first)}
    measures = _measures(scorer, settings)[:, [0, *(places[key] for key in keys)]]
    (base, log_prob), (base_accuracy, accuracy), (_, kl) = ((values[0], values[1:]) for values in measures)
    labels, computation = tuple(plans), scorer.computation
    return Responses(labels, log_prob, log_prob - base, accuracy, kl, base_accuracy, computation, scorer.reuses)


def swept(
    model: Bridge,
    data: Batch,
    questions: Mapping[str, Mapping[str, Plan]],
    *,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
    describe: str = "responses",
) -> dict[str, Responses]:
    """`responses` to the plans of several questions, by the question's name, scored in one sweep."""
    every = {f"{name}: {label}": plan for name, plans in questions.items() for label, plan in plans.items()}
    r = responses(model, data, every, batch_size=batch_size, reuse=reuse, progress=progress, describe=describe)
    parts, ends = {}, accumulate(map(len, questions.values()))
    for (name, plans), end in zip(questions.items(), ends, strict=True):
        log_prob, effect, accuracy, kl = (x[end - len(plans) : end] for x in (r.log_prob, r.effect, r.accuracy, r.kl))
        parts[name] = replace(r, labels=tuple(plans), log_prob=log_prob, effect=effect, accuracy=accuracy, kl=kl)
    return parts


def _computation(plan: Plan, data: Batch) -> Hashable:
    """Equal for two plans that are one computation on `data`: what acts, how strongly, on which tokens."""
    reft, variant = plan
    masks = ((i, variant.mask(reft.sites[i], data.view)) for i in variant.active(reft.sites))
    return id(reft), variant.strength, *((i, mask.cpu().numpy().tobytes()) for i, mask in masks)


def _measures(scorer: Scorer, settings: dict[str, Any]) -> Float[Tensor, "measures plan example"]:
    """Log-probability, accuracy and divergence from the first of the plans, the unedited model, on each example."""
    measures = torch.zeros(3, len(scorer.plans), len(scorer.data), dtype=torch.float64)
    before = base = None
    for scored in scored_batches(scorer, range(len(scorer.plans)), **settings):
        if before is None or base is None or scored.job.plan == 0:
            before = softmax_of(scored.logits)
            base = _measured(scored, before, torch.zeros_like(before.total[:, 0]))
        unchanged = scored.logits is before.logits
        values = base if unchanged else _measured(scored, *softmax_and_divergence(scored.logits, before))
        measures[:, scored.job.plan, list(scored.job.rows)] = values
    return measures


def _measured(scored: Scored, p: Softmax, kl: Float[Tensor, " targets"]) -> Float[Tensor, "measures row"]:
    """Mean log-probability, accuracy and divergence of the targets of each row."""
    ids = scored.batch.target_ids
    right = (scored.logits.argmax(dim=-1) == ids).double()
    return torch.stack([per_example(values, scored.batch) for values in (p.log_prob(ids), right, kl)])
