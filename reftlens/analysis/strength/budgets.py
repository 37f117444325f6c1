"""The doses at which interventions spend a budget of divergence: all of them search side by side."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from reftlens.analysis.strength.dose_search import Search
from reftlens.analysis.strength.equal_kl import Dose, EqualKL
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.errors import check_one_of
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
    signs: Literal["given", "both"] = "given",
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
        signs: "both" searches the opposite edit of each, too. The sign with the larger mean effect on every other row
            of `data` is the dose, and effect, accuracy, intervals and p are of the rows between them alone, so that
            the choice does not flatter them; the other sign is its `opposite`.
        tolerance: how far KL may be off the budget either way, relative to it.
        evaluations: how many strengths of each (and of each sign) are tried, at most.
        seed: of the sign flips.

    Raises:
        ValueError: for no ReFT, if none meets the budget, or for both signs of a negative `high` or of fewer than four
            rows.
    """
    if not isinstance(refts, Mapping) or not refts:
        raise TypeError(f"got {refts!r:.60}, expected {{name: reft}}, one or more")
    check_one_of("signs", signs, ("given", "both"))
    both = signs == "both"
    if both and (high < 0 or len(data) < 4):
        raise ValueError(f"signs='both' with high={high:g} and {len(data)} row(s): expected above 0, and four or more")
    factors = (1.0, -1.0) if both else (math.copysign(1.0, high),)
    names = {f"{sign:+g} {name}" if both else name: (name, sign) for name in refts for sign in factors}
    plans = {name: reft if isinstance(reft, Plan) else Plan(reft) for name, reft in refts.items()}
    signed = {label: _scaled(plans[name], sign) for label, (name, sign) in names.items()}
    searches = {label: Search(budget, abs(high), tolerance) for label in names}
    score = partial(responses, model, batch_size=batch_size, progress=progress)
    doses = _doses(score, signed, searches, data, spent_on, whole(evaluations, "evaluations", 1), Reuse.of(reuse))
    doses = {label: _times(dose, names[label][1]) for label, dose in doses.items()}
    if not both:
        return EqualKL(doses, seed)
    pairs = {name: (doses[f"+1 {name}"], doses[f"-1 {name}"]) for name in plans}
    return EqualKL({name: _better(*pair) for name, pair in pairs.items()}, seed, tuple(range(0, len(data), 2)))


def _times(dose: Dose, sign: float) -> Dose:
    """The dose of an edit that is `sign` times the one that was searched."""
    tried = tuple((sign * strength, kl) for strength, kl in dose.evaluations)
    return replace(dose, strength=sign * dose.strength, evaluations=tried)


def _better(plus: Dose, minus: Dose) -> Dose:
    """The sign with the larger mean effect on rows 0, 2, …, with the numbers of rows 1, 3, …"""

    def chosen_by(dose: Dose) -> float:
        return -math.inf if dose.problem else dose.effect[::2].mean().item()

    best, other = (plus, minus) if chosen_by(plus) >= chosen_by(minus) else (minus, plus)
    best, other = (replace(dose, effect=dose.effect[1::2], hits=dose.hits[1::2]) for dose in (best, other))
    return replace(best, opposite=other)


def _doses(
    score: Callable[..., Responses],
    plans: Mapping[str, Plan],
    searches: Mapping[str, Search],
    data: Batch,
    spent_on: Batch | None,
    evaluations: int,
    reuse: Reuse | None,
) -> dict[str, Dose]:
    """The dose of each plan, with its effect on the data where it meets the budget."""
    spent = (data if spent_on is None else spent_on).among_answers(None)  # a KL of a few answers is hardly a cost
    nearest = _nearest(partial(score, spent), plans, searches, evaluations, reuse)
    met = [name for name, search in searches.items() if search.met]
    if not met:
        raise ValueError("; ".join(f"{name}: {search.problem}" for name, search in searches.items()))
    gains = {name: nearest[name][2:] for name in met}
    if spent_on is not None or data.answers:
        dosed = {name: _scaled(plans[name], nearest[name][0]) for name in met}
        scored = score(data, dosed, reuse=reuse, describe="equal KL")
        gains = dict(zip(met, zip(scored.effect, scored.accuracy, strict=True), strict=True))
    nothing = torch.full((2, len(data)), math.nan, dtype=torch.float64)
    doses = {}
    for name, search in searches.items():
        strength, kl, *_ = nearest[name]
        effect, hits = gains.get(name, nothing)
        doses[name] = Dose(strength, search.budget, kl, effect, hits, tuple(search.measured), search.problem)
    return doses


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
