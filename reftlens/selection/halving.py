"""How a budget of optimizer steps is spent: successive halving, a second look at the best places, seeds last."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

ETA = 3
"""One in so many goes on, and is trained so many times as long."""
FINALISTS, SECOND = 8, 3
"""So many settings are trained with every seed, and at so many places all settings are tried."""


def survivors(count: int, rung: int) -> int:
    """How many of the first `count` are trained up to a rung."""
    return max(1, math.ceil(count / ETA**rung)) if count else 0


def halving_steps(count: int, rungs: Sequence[int]) -> int:
    """Optimizer steps that halving takes from so many candidates, each going on from where it was."""
    steps = [end - begin for begin, end in zip([0, *rungs], rungs, strict=False)]
    return sum(survivors(count, rung) * more for rung, more in enumerate(steps))


@dataclass(frozen=True)
class Schedule:
    """What is trained, and how long; a step is one optimizer step of one candidate."""

    rungs: tuple[int, ...]
    """Steps that a candidate has done when it is compared with the others."""
    first: int
    """Candidates of the first look."""
    second: int
    """Candidates of the second look, at most."""
    finalists: int
    seeds: int

    @property
    def steps(self) -> int:
        """Of all rungs, seeds and refits, at most."""
        looks = halving_steps(self.first, self.rungs) + halving_steps(self.second, self.rungs)
        return looks + self.finalists * self.seeds * self.rungs[-1]


def schedule_of(budget: int | None, steps: int, candidates: int, places: int, seeds: int) -> Schedule:
    """The most candidates that a budget allows; by default four at each place, or sixty where that is more.

    Raises:
        ValueError: where not even one candidate at each place can be tried.
    """
    rungs = tuple(sorted({max(1, math.ceil(steps / ETA**n)) for n in (2, 1, 0)}))
    settings = math.ceil(candidates / places)
    most = min(candidates, max(4 * places, 60)) if budget is None else candidates
    least = math.inf
    for first in range(most, places - 1, -1):
        second = 0 if first == candidates else min(SECOND, places) * max(0, settings - first // places)
        plan = Schedule(rungs, first, second, min(FINALISTS, candidates), seeds)
        if budget is None or plan.steps <= budget:
            return plan
        least = min(least, plan.steps)
    raise ValueError(
        f"budget={budget} optimizer steps, expected {least} or more: {places} places, each with one candidate, and "
        f"{min(FINALISTS, candidates)} finalists with {seeds} seed(s) of {steps} steps; narrow the space, or lower "
        "steps or seeds"
    )
