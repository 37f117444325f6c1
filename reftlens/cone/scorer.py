"""Logits at the targets of a data set, edited, by the cheapest computation that is exact.

Training, evaluation and the analyses all ask a `Scorer`. It computes only the light cone of the edits and takes the
rest from what was captured once; where that would not be valid it runs the whole model, and `computation` says why.
"""

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy

from transformer_lens.hook_points import HookPoint

from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.cone.body import Body
from reftlens.cone.full import Full
from reftlens.cone.light_cone import Cone
from reftlens.cone.plans import Autocast, Job, Plan, Scored, Unsound
from reftlens.cone.probe import Probe
from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import first_block
from reftlens.cone.watched import watched_on
from reftlens.editing.bound import Places, bound_to
from reftlens.editing.site import Site
from reftlens.text.batch import Batch


class Scorer:
    """Scores rows of `data` under any of `plans`, by one of two strategies: the light cone, or the full computation.

    Args:
        uses: how often each row will be scored, about; what is used once is not stored.
        autocast: makes the context of each forward pass.
        watched: hidden states of the edited model that are handed on beside the logits.
    """

    def __init__(
        self,
        model: Bridge,
        data: Batch,
        plans: Sequence[Plan],
        reuse: Reuse | None,
        *,
        uses: float = float("inf"),
        autocast: Autocast = nullcontext,
        progress: bool = False,
        watched: Mapping[str, Site] | None = None,
    ) -> None:
        self.watched = watched or {}
        self.model, self.plans, self.reuse = model, list(plans), reuse
        self.autocast, self.progress = autocast, progress
        refts = {id(plan.reft): plan.reft.to(device_of(model)) for plan in self.plans}
        bound = {key: reft.bind(model) for key, reft in refts.items()}
        self._places = [bound[id(plan.reft)] for plan in self.plans]
        looked = [each.point for each in watched_on(model, self.watched, data)]
        self._body, self._problem = body_of(model, self._places, reuse, looked)
        self._open(data, uses)

    def over(self, data: Batch) -> "Scorer":
        """A scorer of another data set, under the same plans."""
        scorer = copy(self)
        scorer._open(data, float("inf"))
        return scorer

    def _open(self, data: Batch, uses: float) -> None:
        plans = [(places, plan.variant) for places, plan in zip(self._places, self.plans, strict=True)]
        self.data, self._cone, watched = data, None, watched_on(self.model, self.watched, data)
        # What stands in for a cone that is refused is `reuse=False` bit for bit: rows are divided where there is none.
        most = 1 if self.reuse is None or self._body is not None else self.reuse.buckets
        self._full = Full(self.model, data, bound_to(self.model, data, plans), self.autocast, watched, most)
        if self._body is not None and self.reuse is not None:
            self._cone = Cone(self._body, self._full, self.reuse, uses=uses, progress=self.progress)
            if self.reuse.verify:
                self._cone.check = Probe(self._cone, self._full).check

    @property
    def computation(self) -> str:
        """How scores are computed, in words."""
        how = f"full computation: {self._problem}" if self._cone is None else self._cone.computation
        return f"{how}; scored{self.data.among}" if self.data.answers else how

    @property
    def reuses(self) -> bool:
        """Whether the frozen computation is reused."""
        return self._cone is not None

    def score(self, jobs: Sequence[Job], *, whole: bool = True) -> Generator[list[Scored], None, None]:
        """Score jobs, as many together as is sensible; those of one list share a graph, so call backward once.

        With `whole` False jobs may come in parts, as little memory as possible is taken, and each list is to go
        backward before the next is asked for.
        """
        left = [(job, list(job.rows)) for job in jobs]
        if self._cone is not None:
            with exclusive(self.model):
                self._problem = self._cone.body.obstacle()
            try:
                for group in () if self._problem else self._cone.score(jobs, whole=whole):
                    for scored in group:
                        _take(left, scored.job)
                    yield group
            except Unsound as problem:
                self._problem = str(problem)
                warnings.warn(f"the frozen computation is not reused: {problem}", stacklevel=4)
            if self._problem:
                self._cone = None
        rest = [Job(job.plan, tuple(rows)) for job, rows in left if rows]
        if rest:
            yield from self._full.score(rest, whole=whole)


def _take(left: list[tuple[Job, list[int]]], part: Job) -> None:
    """Strike the rows of `part` from the first job under its plan that has them left."""
    for job, rows in left:
        if job.plan == part.plan and set(part.rows) <= set(rows):
            for row in part.rows:
                rows.remove(row)
            return


def body_of(
    model: Bridge, places: Sequence[Places], reuse: Reuse | None, watched: Sequence[HookPoint] = ()
) -> tuple[Body | None, str]:
    """The parts of the model; or None, and why nothing can be reused on it with these sites."""
    if reuse is None:
        return None, "reuse is switched off"
    try:
        body = Body(model)
    except ValueError as error:
        return None, str(error)
    points = [place.point.name or "" for sites in places for place in sites] + [point.name or "" for point in watched]
    unknown = [name for name in points if first_block(name, body.depth) is None]
    problem = f"{unknown[0]} has no known place among the blocks" if unknown else body.obstacle()
    return (None, problem) if problem else (body, "")
