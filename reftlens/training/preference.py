"""Objectives on pairs of completions, one of them preferred: DPO, SimPO, BiPO and RePS, for any kind of intervention.

Rows of the data come two by two, the chosen completion and then the rejected one (`preference_pairs`); `batch_size` and
data order are of pairs. `log p(y)` is the sum over the targets of a row, `p` the edited and `p₀` the unedited model.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.interventions.base import Intervention
from reftlens.interventions.fixed import SteeringVector
from reftlens.interventions.pooled import ReFTr1
from reftlens.numbers import real, reals
from reftlens.scoring.objectives import Objective, Predictions
from reftlens.text.batch import Batch, Example
from reftlens.text.encoding import encode
from reftlens.text.template import Prompt


def preference_pairs(
    model: Bridge,
    pairs: Sequence[tuple[Prompt, str, str]],
    *,
    chat: bool = False,
    system: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    end: bool = True,
    max_length: int | None = None,
) -> Batch:
    """Encode triples `(prompt, chosen, rejected)` for `DPO`, `SimPO`, `BiPO` and `RePS`: two rows for each, in order.

    Other arguments, and errors: see `encode`.
    """
    if wrong := [i for i, pair in enumerate(pairs) if not isinstance(pair, tuple) or len(pair) != 3]:
        raise TypeError(f"pair {wrong[0]} is {pairs[wrong[0]]!r:.80}, expected (prompt, chosen, rejected)")
    rows = [Example(prompt, completion) for prompt, *both in pairs for completion in both]
    arguments: dict[str, Any] = {"template_arguments": template_arguments, "end": end, "max_length": max_length}
    return encode(model, rows, chat=chat, system=system, **arguments)


@dataclass(frozen=True)
class Sided:
    """The chosen, or the rejected, completions of some pairs."""

    log_prob: Float[Tensor, " pairs"]
    """log p(y): the sum over the targets of each completion, in nats."""
    length: Float[Tensor, " pairs"]
    """Targets."""
    given: Float[Tensor, " pairs"] | None
    """log p₀(y), for an objective that asks for it."""

    @property
    def reference(self) -> Float[Tensor, " pairs"]:
        """log p₀(y)."""
        assert self.given is not None
        return self.given

    @property
    def gain(self) -> Float[Tensor, " pairs"]:
        return self.log_prob - self.reference


class Preference(Objective):
    """What all objectives on pairs share: the data are checked, and the loss of a pair is that of both its rows."""

    reference = True
    group = 2

    @abstractmethod
    def margin(self, chosen: Sided, rejected: Sided, plan: int) -> Float[Tensor, " pairs"]:
        """How far the edited model prefers what it is to prefer under this plan; the loss is `-log σ` of it."""

    def losses(self, predictions: Predictions) -> Float[Tensor, " rows"]:
        sums, reference = predictions.by_row(predictions.log_probs), predictions.reference
        lengths = predictions.by_row(torch.ones_like(predictions.log_probs))
        given = None if reference is None else predictions.by_row(reference)
        sides = [Sided(sums[i::2], lengths[i::2], None if given is None else given[i::2]) for i in range(2)]
        return -logsigmoid(self.margin(sides[0], sides[1], predictions.plan)).repeat_interleave(2)

    def check(self, data: Batch, name: str) -> None:
        """Raise `ValueError` where rows are no pairs of completions of one prompt."""
        super().check(data, name)
        for row in range(0, len(data), 2):
            chosen, rejected = (data.tokens[i][data.prompt_mask[i]].tolist() for i in (row, row + 1))
            if chosen != rejected:
                raise ValueError(
                    f"rows {row} and {row + 1} of {name} have different prompts, and are to be a chosen and a rejected "
                    "completion of one: training.preference_pairs(model, [(prompt, chosen, rejected), …]) encodes them"
                )


class DPO(Preference):
    """`-log σ(β (log p(y⁺)/p₀(y⁺) - log p(y⁻)/p₀(y⁻)))` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""

    def __init__(self, beta: SupportsFloat = 0.1) -> None:
        self.beta = real(beta, "beta")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={beta}, expected a finite number above 0")

    def margin(self, chosen: Sided, rejected: Sided, plan: int) -> Float[Tensor, " pairs"]:
        return self.beta * (chosen.gain - rejected.gain)


class SimPO(Preference):
    """`-log σ(β (log p(y⁺)/|y⁺| - log p(y⁻)/|y⁻|) - γ)` (Meng et al. 2024, arXiv 2405.14734, eq. 6): no reference.

    Means per token in place of sums, so that a longer completion is not less likely for its length, and a margin γ.
    """

    reference = False

    def __init__(self, beta: SupportsFloat = 2.0, gamma: SupportsFloat = 1.0) -> None:
        self.beta, self.gamma = real(beta, "beta"), real(gamma, "gamma")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={beta}, expected a finite number above 0")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma={gamma}, expected a finite number, 0 or more")

    def margin(self, chosen: Sided, rejected: Sided, plan: int) -> Float[Tensor, " pairs"]:
        return self.beta * (chosen.log_prob / chosen.length - rejected.log_prob / rejected.length) - self.gamma


class BiPO(DPO):
    """`-log σ(d β (log p(y⁺)/p₀(y⁺) - log p(y⁻)/p₀(y⁻)))`, the edit at strength `d`, drawn from -1 and 1 for each pair.

    Bidirectional preference optimization (Cao et al. 2024, arXiv 2406.00045, eq. 2): the edit at strength 1 prefers the
    chosen completion, its opposite the rejected one. In `evaluate`, whose variants say the strength, `d` is 1.
    """

    def plans(self, reft: ReFT) -> list[Plan]:
        return [Plan(reft, Variant(float(d))) for d in (1, -1)]

    def drawn(self, rows: Sequence[int], generator: torch.Generator) -> dict[int, tuple[int, ...]]:
        return _divided(rows, torch.randint(2, (len(rows) // 2,), generator=generator))

    def margin(self, chosen: Sided, rejected: Sided, plan: int) -> Float[Tensor, " pairs"]:
        return (1 - 2 * plan) * super().margin(chosen, rejected, plan)


class RePS(Preference):
    """Reference-free preference steering (Wu et al. 2025, arXiv 2505.20809): two terms for each pair, `-log σ(Δ)` each.

    `Δ⁺ = max(log p₀(y⁻) - log p₀(y⁺), 1) · log p(y⁺)/|y⁺| - log p(y⁻)/|y⁻|`, the edit at a strength drawn from
    `factors` for each pair; `Δ⁻` is the mirror image, `y⁺` and `y⁻` exchanged, while the edit is nulled. For a vector
    `w` (`SteeringVector`, `ReFTr1`) that is `nulled(reft)`, `h' = h - relu(h·w) w / ‖w‖²`; other kinds have no one
    direction to take out, and are applied at minus the factor.

    Validation draws the same for every pair each time; in `evaluate`, whose variants say the strength, there is no Δ⁻.

    Raises:
        ValueError: for no factor, or one that is not above 0.
    """

    def __init__(self, factors: Sequence[SupportsFloat] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)) -> None:
        self.factors = reals(factors, "factors")
        if not self.factors or not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"factors={factors!r}, expected one or more finite numbers above 0")

    def plans(self, reft: ReFT) -> list[Plan]:
        steering = [Plan(reft, Variant(factor)) for factor in self.factors]
        if all(isinstance(module, _DIRECTED) for _, module in reft.items()):
            nulls = [Plan(nulled(reft))] * len(steering)
        else:
            nulls = [Plan(reft, Variant(-factor)) for factor in self.factors]
        return [*steering, *nulls]

    def drawn(self, rows: Sequence[int], generator: torch.Generator) -> dict[int, tuple[int, ...]]:
        count = len(self.factors)
        chosen = torch.randint(count, (len(rows) // 2,), generator=generator)
        return _divided(rows, chosen) | _divided(rows, chosen + count)

    def margin(self, chosen: Sided, rejected: Sided, plan: int) -> Float[Tensor, " pairs"]:
        winning, losing = (chosen, rejected) if plan < len(self.factors) else (rejected, chosen)
        scale = (losing.reference - winning.reference).clamp(min=1)
        return scale * winning.log_prob / winning.length - losing.log_prob / losing.length


_DIRECTED = (SteeringVector, ReFTr1)


def nulled(reft: ReFT) -> ReFT:
    """The edit that takes the directions of vectors out, `h' = h - relu(h·w) w / ‖w‖²`; it shares their parameters.

    So it cannot be saved: save `reft`, and null it again once it is loaded.

    Raises:
        TypeError: for a kind other than `SteeringVector` and `ReFTr1`, which has no one direction.
        ValueError: for a vector of zeros.
    """
    for site, module in reft.items():
        if not isinstance(module, _DIRECTED):
            raise TypeError(
                f"{module.kind} at {site} has no one direction to take out: give a SteeringVector or ReFTr1"
            )
        if not module.basis().any():
            raise ValueError(
                f"the vector at {site} is zero, and has no direction to take out: start from a small one, such as "
                f"SteeringVector({module.d}, vector=0.01 * torch.randn({module.d}))"
            )
    return ReFT({site: _Nulled(module) for site, module in reft.items()})


class _Nulled(Intervention):
    """`h' = h - strength · relu(h·w) w / ‖w‖²` with the direction `w` of another intervention."""

    kind = "nulled"
    unsaved = "its parameters are those of the edit that it takes out; store that, and take nulled(…) of it once loaded"

    def __init__(self, of: Intervention) -> None:
        super().__init__(of.d, 1)
        self.of = of

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        assert basis is not None
        return -torch.relu(h @ basis) / basis.square().sum()

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"] | None:
        return self.of.basis()

    def settings(self) -> dict[str, Any]:
        return {"of": self.of.kind}

    def reset(self, generator: torch.Generator | None = None) -> None:
        raise TypeError("a nulled edit has no parameters of its own: reset the one that it takes out")


def _divided(rows: Sequence[int], plans: Tensor) -> dict[int, tuple[int, ...]]:
    """The rows of pairs by the plan of each pair."""
    by_plan: dict[int, tuple[int, ...]] = {}
    for number, plan in enumerate(plans.tolist()):
        by_plan[plan] = (*by_plan.get(plan, ()), *rows[2 * number : 2 * number + 2])
    return by_plan
