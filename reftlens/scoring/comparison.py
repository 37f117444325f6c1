"""The one loop over a data set under many plans, batch by batch, dropout off."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_deterministic
from reftlens.bridge.trial import check_predicts
from reftlens.cone.plans import Job, Plan, Scored
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import check_types, training_mode
from reftlens.editing.site import Site
from reftlens.errors import check_finite
from reftlens.numbers import whole
from reftlens.text.batch import Batch


def check_plans(model: Bridge, data: Batch, plans: Sequence[Plan]) -> None:
    """Raise where `data` cannot be scored under these plans.

    Raises:
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """
    if not plans:
        raise ValueError("no plans: give one ReFT with one variant, or more")
    for plan in plans:
        check_types(plan.reft, model, data)
    check_deterministic(model)
    check_predicts(model)
    data.require_targets()
    for reft, variant in plans:
        variant.require(reft.sites, data.view)


def scorer_of(
    model: Bridge,
    data: Batch,
    plans: Sequence[Plan],
    reuse: Reuse | None,
    watched: Mapping[str, Site] | None = None,
) -> Scorer:
    """A scorer of `data` for one pass over it. Plans share what is frozen and each pass through the model.

    Raises:
        ValueError: as `check_plans`.
    """
    check_plans(model, data, plans)
    return Scorer(model, data, plans, reuse, uses=1, watched=watched)


@torch.no_grad()  # inside this generator only, not where its caller computes with what it yields
def scored_batches(
    scorer: Scorer,
    plans: Sequence[int],
    *,
    batch_size: int,
    rows: Sequence[Sequence[int]] | None = None,
    describe: str = "scores",
    progress: bool = False,
    finite: bool = True,
    whole: bool = True,
) -> Iterator[Scored]:
    """The scorer's rows, `batch_size` at a time, under each of its plans with these indices; fewer with `whole` False.

    Plans of strength 0 are the unedited model: they come first and are computed once.

    Args:
        rows: for each of the plans, those of the rows to score; None for all.

    Raises:
        NotFinite: with `finite`, for logits that hold NaN or infinity.
    """
    idle = [i for i in plans if scorer.plans[i].variant.strength == 0.0]
    active = [i for i in plans if i not in idle]
    every = range(len(scorer.data))
    chosen = {i: set(some) for i, some in zip(plans, rows or [every] * len(plans), strict=True)}
    order, total = sorted(set().union(*chosen.values())), sum(map(len, chosen.values()))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc=describe, unit="example", disable=not progress))
        for reft in {id(scorer.plans[i].reft): scorer.plans[i].reft for i in plans}.values():
            stack.enter_context(training_mode(reft, training=False))
        for piece in pieces(len(order), batch_size):
            jobs = {i: Job(i, tuple(order[n] for n in piece if order[n] in some)) for i, some in chosen.items()}
            for some in ([jobs[i] for i in idle[:1]], [jobs[i] for i in active if jobs[i].rows]):
                for group in scorer.score(some, whole=whole) if some else ():
                    for scored in group:
                        if finite and scored.logits.numel():  # a model may forbid a token by a logit of minus infinity
                            _check_finite(scored, scorer.plans[scored.job.plan])
                        same = idle if scored.job.plan in idle else [scored.job.plan]
                        yield from (replace(scored, job=replace(scored.job, plan=i)) for i in same)
            bar.update(sum(len(job.rows) for job in jobs.values()))


def _check_finite(scored: Scored, plan: Plan) -> None:
    sites, rows = "; ".join(map(str, plan.reft.sites)), list(scored.job.rows)[:4]
    what = f"the logits of rows {rows} at {plan.variant} of the edit at {sites}"
    check_finite(scored.logits.amax(), what, "lower the strength, or load the model in a wider dtype")


def pieces(count: int, size: int) -> list[tuple[int, ...]]:
    """The numbers below `count`, `size` at a time."""
    size = whole(size, "batch_size", 1)
    return [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]


def per_example(values: Float[Tensor, " n"], batch: Batch, group: int = 1) -> Float[Tensor, " example"]:
    """Mean of per-target values within each example, float64 on the CPU; values that are per example already stay.

    Those of groups of neighbouring examples are each example's of the group.

    Raises:
        ValueError: for another number of values than there are targets, examples or groups.
    """
    rows, targets = len(batch), len(batch.target_rows)
    if len(values) != targets and len(values) in (rows, rows / group):
        return values.detach().cpu().double().repeat_interleave(rows // len(values))
    if len(values) != targets:
        groups = f", or {rows // group} groups" if group > 1 else ""
        raise ValueError(f"{len(values)} losses for {targets} targets in {rows} rows{groups}: expected one for each")
    sums = torch.zeros(rows, device=values.device, dtype=values.dtype).index_add(0, batch.target_rows, values)
    return (sums / batch.target_mask.sum(dim=1)).detach().cpu().double()
