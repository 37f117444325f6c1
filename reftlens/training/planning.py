"""`plan`: what `fit` would compute and store, before anything runs; for a model at hand or a bare configuration."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from reftlens.bridge.lengths import changes_with_length, length_limit
from reftlens.bridge.protocol import Bridge, device_of, is_bridge
from reftlens.bridge.weightless import weightless
from reftlens.cone.body import Body
from reftlens.cone.full import Full
from reftlens.cone.light_cone import Cone
from reftlens.cone.plans import Job
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import body_of
from reftlens.cone.size import Size, size_of
from reftlens.cone.spans import first_block, within_block
from reftlens.cone.stored import Stored
from reftlens.cone.watched import watched_on
from reftlens.cone.work import Work, full_work, step_work
from reftlens.editing.bound import Bound, Places, exchanges_of
from reftlens.editing.reft import ReFT, check_types, training_mode
from reftlens.editing.sources import check_sources
from reftlens.editing.variant import Variant
from reftlens.scoring.objectives import Loss, Objective, as_objective, cross_entropy
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig, replaced
from reftlens.training.drawing import step_jobs
from reftlens.training.forecast import Forecast, in_units

_WIDE = tuple(f"hook_{name}" for name in ("in", "out", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"))
"""Hooks of a block at which vectors are as wide as the residual stream."""


def plan(
    reft: ReFT,
    model: Any,
    data: Batch,
    config: FitConfig = FitConfig(),
    *,
    objective: Objective | Loss = cross_entropy,
    reuse: bool | Reuse = True,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Forecast:
    """What `fit(reft, model, data, config, objective=objective, reuse=reuse)` would compute and store.

    Rows are drawn, and put into passes, by the same functions as in `fit`, so that tokens are those of the run, one for
    one. Operations are those of matrix products, two for each multiply-add, `2 · tokens · (weights + heads · (d_key +
    d_value) · keys)` of a block, padding included, and in a backward pass the same with attention twice. Left out are
    the edits themselves, norms, the reading of sources, validation, log-probabilities of the unedited model, and the
    check of each way of computing on a few short rows, which may end in the full computation. Bytes are estimates.

    Args:
        model: a bridge, which is not run but for the few tokens of its first trial; or a configuration of transformers,
            such as `LlamaConfig(…)` or `AutoConfig.from_pretrained(…)`, of which no weight is allocated, and which is
            taken for that of a model that predicts each token from those before it.
        data: encoded with the model's tokenizer: which tokens rows share decides what is computed once.
        device: that `fit` would run on; by default the model's own, and for a configuration a GPU where there is one.
            A GPU that is not here is taken to have room for what is captured.
        settings: fields of `FitConfig` by name, in place of those of `config`.

    Raises:
        TypeError: for a model that is neither, or a setting that does not exist.
        ValueError: naming a field that the configuration lacks, or a row or site that `fit` would refuse.
        HookNotFound: for a site on a block that the model does not have.
    """
    config = replaced(config, settings)
    bridge, runs_on = _model_on(model, device)
    check_types(reft, bridge, data)
    data.require_targets()
    Variant().require(reft.sites, data.view)
    objective = as_objective(objective)
    objective.check(data, "data")
    places, reused, watched = reft.bind(bridge), Reuse.of(reuse), watched_on(bridge, objective.sites, data)
    bounds = [Bound(each.reft.bind(bridge), each.variant, {}) for each in objective.plans(reft)]
    body, problem = body_of(bridge, [places], reused, [each.point for each in watched])
    exchanged = list(exchanges_of(places, Variant()).values())
    if exchanged or data.sources:
        check_sources(data, exchanged)
    size = size_of(body or Body(bridge))
    _check_widths(places, size)
    obstacle = problem or changes_with_length(bridge, int(data.attention_mask.sum(dim=1).max()))
    run = _Run(bridge, data, config, objective, size, _lowest(places, size.depth), runs_on)
    if body is None or reused is None or obstacle:
        return run.in_full(f"full computation: {obstacle}")
    body.kind = runs_on.type
    full = Full(bridge, data, bounds, nullcontext, watched)
    with training_mode(reft, training=True):
        return run.in_cone(Cone(body, full, reused, uses=config.uses(run.units), progress=False))


def _model_on(model: Any, device: str | torch.device | None) -> tuple[Bridge, torch.device]:
    """A bridge, made of a configuration if need be, and the device that it is to run on."""
    if is_bridge(model):
        return model, device_of(model) if device is None else torch.device(device)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    return weightless(model), torch.device(usual if device is None else device)


def _lowest(places: Places, depth: int) -> int:
    """The lowest block that a gradient goes back through."""
    names = [place.point.name or "" for place in places]
    return min((first_block(name, depth) or 0) + name.endswith((".mlp.hook_out", "hook_mlp_out")) for name in names)


def _check_widths(places: Places, size: Size) -> None:
    """Raise `ValueError` where an intervention on the residual stream was made for another width."""
    for place in places:
        hook, d = within_block(place.point.name or ""), place.intervention.d
        if hook in _WIDE and d != size.d:
            kind = place.intervention.kind
            raise ValueError(f"{place.site} has vectors of width {size.d}, and its {kind} was made for d={d}")


@dataclass(frozen=True)
class _Run:
    """A run of `fit` that is not made."""

    model: Bridge
    data: Batch
    config: FitConfig
    objective: Objective
    size: Size
    lowest: int
    device: torch.device

    @property
    def units(self) -> int:
        return len(self.data) // self.objective.group

    @property
    def _steps(self) -> Iterator[list[list[Job]]]:
        total, rows = self.config.total_steps(self.units), len(self.data)
        return (step_jobs(self.config, self.objective, step, rows) for step in range(total))

    @cached_property
    def _full_steps(self) -> tuple[Work, ...]:
        lengths = self.data.attention_mask.sum(dim=1).tolist()
        limit = length_limit(self.model)

        def work(job: Job) -> Work:
            own = [lengths[row] for row in job.rows]
            alone = limit is not None and max(own) > limit[1]
            return full_work(self.size, own, self.lowest, alone=alone)

        return tuple(sum((work(job) for jobs in step for job in jobs), Work()) for step in self._steps)

    def in_full(self, computation: str) -> Forecast:
        return self._forecast(computation, Work(), self._full_steps, 0, "nowhere, recomputed")

    def in_cone(self, cone: Cone) -> Forecast:
        narrow = cone.reuse.half or self.config.precision == "bfloat16"
        stored, steps = Stored(cone, self.size, 2 if narrow else self.size.width), list[Work]()
        capture, size, cut, answers = stored.prepare(self.device), self.size, cone.body.cut, len(self.data.answers)
        if cut is not None and answers:  # no more of the unembedding than the answers need
            size = replace(size, unembedding=answers * cut.in_features)
        for step in self._steps:
            total = Work()
            for group in (group for jobs in step for group in cone.groups(jobs)):
                capture += stored.fetch([row for job in group for row in job.rows])
                courses = cone.divided(group)[1]
                total += step_work(size, courses, self.lowest, scored_only=cone.reuse.scored_only)
            steps.append(total)
        return self._forecast(cone.computation, capture, tuple(steps), cone.store.size, cone.store.tier)

    def _forecast(self, computation: str, capture: Work, steps: tuple[Work, ...], stored: int, tier: str) -> Forecast:
        name, size = type(self.model.original_model).__name__, self.size
        what = (
            f"{name} ({size.depth} blocks of width {size.d:,}, {in_units(size.bytes, 'B')} of weights) on {self.device}"
        )
        computation += f"; scored{self.data.among}" if self.data.answers else ""
        return Forecast(what, computation, self.config, capture, steps, self._full_steps, stored, tier)
