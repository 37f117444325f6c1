"""The doses at which interventions spend a budget of divergence: all of them search side by side."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from reftlens.analysis.strength.dose_search import Search
from reftlens.analysis.strength.equal_kl import Dose, EqualKL
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.numbers import whole
from reftlens.scoring.responses import Responses, responses
from reftlens.text.batch import Batch


def at_kl(
    budget: float,
    refts: Mapping[str, ReFT | Plan],
    model: Bridge,
    data: Batch,
    *,
    spent_on: Batch | None = None,
    high: float = 10.0,
    tolerance: float = 0.02,
    evaluations: int = 6,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> EqualKL:
    """The effect of each of `{name: reft}` on `data` at the strength where its mean KL per token is `budget` nats.

    The mean is over examples, of each the mean over its target tokens. All search side by side, in rounds of one sweep
    each. Where KL rises and falls again, the first crossing: below it every measured dose is within the budget.

    Args:
        refts: a `Plan` in place of a ReFT says at which tokens and sites it acts; its strength is the unit of the dose.
        spent_on: where the KL is measured, by default on `data`; unrelated prompts make it a budget of side effects.
        high: the largest strength that is tried (negative: of the opposite edit); what stays below the budget there is
            named and left out.
        tolerance: how far KL may be off the budget either way, relative to it.
        evaluations: how many strengths of each are tried, at most.
        seed: of the sign flips.

    Raises:
        ValueError: for no ReFT, or if none meets the budget.
    """
    if not isinstance(refts, Mapping) or not refts:
        raise TypeError(f"got {refts!r:.60}, expected {{name: reft}}, one or more")
    evaluations = whole(evaluations, "evaluations", 1)
    plans = {name: reft if isinstance(reft, Plan) else Plan(reft) for name, reft in refts.items()}
    searches = {name: Search(budget, abs(high), tolerance) for name in plans}
    score, sign = partial(responses, model, batch_size=batch_size, progress=progress), math.copysign(1.0, high)
    signed = {name: _scaled(plan, sign) for name, plan in plans.items()}
    spent = (data if spent_on is None else spent_on).among_answers(None)
    nearest = _nearest(partial(score, spent), signed, searches, evaluations, Reuse.of(reuse))
    met = [name for name, search in searches.items() if search.met]
    if not met:
        raise ValueError("; ".join(f"{name}: {search.problem}" for name, search in searches.items()))
    gains = {name: nearest[name][2:] for name in met}
    if spent_on is not None or data.answers:
        dosed = {name: _scaled(signed[name], nearest[name][0]) for name in met}
        scored = score(data, dosed, reuse=Reuse.of(reuse), describe="equal KL")
        gains = dict(zip(met, zip(scored.effect, scored.accuracy, strict=True), strict=True))
    nothing = torch.full((2, len(data)), math.nan, dtype=torch.float64)
    doses = {}
    for name, search in searches.items():
        tried = tuple((sign * strength, kl) for strength, kl in search.measured)
        strength, kl, *_ = nearest[name]
        effect, hits = gains.get(name, nothing)
        doses[name] = Dose(sign * strength, budget, kl, effect, hits, tried, search.problem)
    return EqualKL(doses, seed)


def _nearest(
    score: Callable[..., Responses],
    plans: Mapping[str, Plan],
    searches: Mapping[str, Search],
    evaluations: int,
    reuse: Reuse | None,
) -> dict[str, tuple[float, Tensor, Tensor, Tensor]]:
    """Of each plan the dose whose KL is nearest to the budget, with its KL, effect and accuracy on each example."""
    nearest: dict[str, tuple[float, Tensor, Tensor, Tensor]] = {}
    for number in range(1, evaluations + 1):
        doses = {name: dose for name, search in searches.items() if (dose := search.next()) is not None}
        if not doses:
            break
        dosed = {name: _scaled(plans[name], dose) for name, dose in doses.items()}
        measured = score(dosed, reuse=reuse, describe=f"dose {number}", finite=False)  # NaN is over any budget
        reuse = reuse if measured.reused else None
        for i, (name, dose) in enumerate(doses.items()):
            if searches[name].tell(dose, measured.kl[i].mean().item()):
                nearest[name] = dose, measured.kl[i], measured.effect[i], measured.accuracy[i]
    return nearest


def _scaled(plan: Plan, factor: float) -> Plan:
    """A plan with so many times its strength."""
    strength = plan.variant.strength
    scaled = tuple(factor * s for s in strength) if isinstance(strength, tuple) else factor * strength
    return Plan(plan.reft, replace(plan.variant, strength=scaled))
