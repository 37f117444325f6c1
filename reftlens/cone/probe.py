"""The claim of the light cone is checked: each way of computing, on rows that are hard for all of them.

A way (`Way`) is compared with the full computation before it is first used, in logits, losses and, in training,
gradients: on four short rows of different beginnings, lengths and ends, with the interventions that are to be
computed; and once on a row of the data. What was seen of a model is remembered for as long as its weights stay.
"""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reftlens.bridge.protocol import Bridge, device_of
from reftlens.bridge.weights import weights_state
from reftlens.cone.full import Full
from reftlens.cone.light_cone import Cone
from reftlens.cone.plans import Job, Unsound, Way
from reftlens.cone.spans import within_block
from reftlens.editing.bound import Bound, bound_to
from reftlens.editing.reft import training_mode
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.errors import NotFinite, check_finite, in_brief
from reftlens.text.batch import Batch, batch_from_rows
from reftlens.text.positions import At, First, Last
from reftlens.text.view import TokenRole

_LONGEST = 128
"""Tokens of a row of the data that are compared."""
_LENGTHS, _PROMPTS, _ROWS = (6, 9, 11, 14), (2, 5, 4, 7), (0, 1, 2, 3)
"""Of the short rows. Their edits begin at tokens 0, 3, 2 and 5, or all at 0; they have one to five targets,
the first right after the prompt, which end at different tokens."""

_verdicts: WeakKeyDictionary[nn.Module, tuple[Hashable, dict[Hashable, str]]] = WeakKeyDictionary()
"""Of each model: the state of its weights, and what was wrong with each way of computing ("" for nothing)."""


class Probe:
    """Compares ways of computing of `cone` with `full`, each before it is first used."""

    def __init__(self, cone: Cone, full: Full) -> None:
        self.cone, self.full = cone, replace(full, watched=())
        self._passed: set[Hashable] = set()

    def check(self, way: Way, jobs: Sequence[Job]) -> None:
        """Raise `Unsound` where `way` does not give, for the plans of `jobs`, what the full computation gives."""
        key = way, torch.is_grad_enabled()
        if key in self._passed:
            return
        verdicts, setting = verdicts_of(self.full.model), self._setting()
        try:
            if (key, setting) not in verdicts:
                verdicts[key, setting] = self._on_short_rows(way, jobs)
            if not verdicts[key, setting] and setting not in verdicts:
                with torch.no_grad():
                    verdicts[setting] = self._on_data(jobs[0])
        except NotFinite:  # nothing to compare with; who uses such numbers will say where they are
            return
        problem = verdicts[key, setting] or verdicts.get(setting)
        if problem:
            raise Unsound(problem)
        self._passed.add(key)

    def _setting(self) -> Hashable:
        """What else decides how the cone computes."""
        config: Any = self.cone.body.config
        stored, attention = self.cone.store.uses > 1, getattr(config, "_attn_implementation", None)
        sites = frozenset(place.point.name for bound in self.full.bounds for place in bound.places)
        shares = bool(self.cone.capture.beginnings)
        return self.cone.reuse, self.cone.plain, stored, shares, attention, self._narrow, sites, self.full.data.answers

    @property
    def _narrow(self) -> bool:
        """Whether numbers of two bytes are computed with."""
        with self.full.autocast():
            return self.cone.reuse.half or torch.is_autocast_enabled(self.cone.device.type)

    def _on_short_rows(self, way: Way, jobs: Sequence[Job]) -> str:
        """What is wrong with `way` on rows that are hard for it, or ""."""
        plans = tuple(dict.fromkeys(job.plan for job in jobs))[: 2 if way.joined else 1]
        full = _on_rows_of_its_own(self.full, plans, way)
        numbers = range(len(plans)) if len(plans) > 1 or not way.joined else (0, 0)
        shares = way.shared or bool(self.cone.capture.beginnings)
        reuse = replace(self.cone.reuse, beginnings=shares, remember=False)
        cone = Cone(self.cone.body, full, reuse, uses=self.cone.store.uses, progress=False, way=way)
        return self._difference(full, cone, [Job(i, _ROWS) for i in numbers])

    def _on_data(self, job: Job) -> str:
        """What is wrong on the shortest row of `job`, cut where it is long, or ""."""
        row = min(job.rows, key=lambda r: self.cone.spans[r].stop)
        try:
            full = _on_one_row(self.full, job.plan, row)
            reuse = replace(self.cone.reuse, remember=False)  # the call itself captures the row beside others
            cone = Cone(self.cone.body, full, reuse, uses=1, progress=False)
        except ValueError:  # the text that a site looks for was cut off
            return ""
        return self._difference(full, cone, [Job(0, (0,))])

    def _difference(self, full: Full, cone: Cone, jobs: Sequence[Job]) -> str:
        modules = {id(p.intervention): p.intervention for bound in full.bounds for p in bound.places}.values()
        wanted = torch.is_grad_enabled()
        parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad and wanted}
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(training_mode(module, training=False))
            expected = _sums(full, jobs, list(parameters.values()))
            try:
                measured = _sums(cone, jobs, list(parameters.values()))
            except Exception as error:  # whatever a model's own code says to a stored cache: it cannot be reused
                return f"computing with stored keys and values failed: {in_brief(error)}"
        return difference(measured, expected, narrow=self._narrow)


def verdicts_of(model: Bridge) -> dict[Hashable, str]:
    """What is known of a model with the weights that it has now."""
    state, root = weights_state(model), model.original_model
    if root not in _verdicts or _verdicts[root][0] != state:
        _verdicts[root] = state, {}
    return _verdicts[root][1]


def _on_rows_of_its_own(full: Full, plans: Sequence[int], way: Way) -> Full:
    """The same plans at the sites of `way`, on four short rows: at the last tokens of prompts, or at the first."""
    positions = At(1, 2) if way.prefixed and way.shared else Last(2) if way.prefixed else First(2)
    bounds = [full.bounds[plan] for plan in plans]
    moved = [
        tuple(replace(p, site=Site(p.site.hook, positions, p.site.heads)) for p in bound.places) for bound in bounds
    ]
    variants = [Variant(bound.variant.strength, sites=_acting(bound, way)) for bound in bounds]
    names = {
        name
        for bound, variant in zip(bounds, variants, strict=True)
        for i in (variant.active(bound.places) if variant.strength != 0.0 else ())
        for name in bound.places[i].intervention.variables
    }
    data = _short_rows(full, seed=0)
    if names:
        data = data.with_sources({name: _short_rows(full, seed=1) for name in names})
    return replace(full, data=data, bounds=bound_to(full.model, data, list(zip(moved, variants, strict=True))))


def _acting(bound: Bound, way: Way) -> list[int]:
    """The sites that the way is of; all that act, where it is of none of them."""
    places = bound.places
    kinds = {i: (within_block(places[i].point.name or ""), places[i].intervention.label) for i in bound.active}
    return [i for i, kind in kinds.items() if kind in way.edited] or list(bound.active)


def _short_rows(full: Full, seed: int) -> Batch:
    """Four rows of tokens of the data, drawn by chance; the last one longer than a short window of attention."""
    config: Any = getattr(full.model.original_model, "config", None)
    window, most = getattr(config, "sliding_window", None) or 0, full.model.cfg.n_ctx
    lengths = [min(n, most) for n in (*_LENGTHS[:-1], window + 3 if 11 < window <= 29 else _LENGTHS[-1])]
    generator, pool = torch.Generator().manual_seed(seed), full.data.tokens[full.data.attention_mask].cpu()
    ids = [pool[torch.randint(len(pool), (n,), generator=generator)].tolist() for n in lengths]
    ids = [*ids[:1], *(ids[1][:3] + row[3:] for row in ids[1:])]  # a beginning that all but the first share
    roles = [[TokenRole.PROMPT] * p + [TokenRole.RESPONSE] * (n - p) for n, p in zip(lengths, _PROMPTS, strict=True)]
    targets = [
        [column == n - 2 or p <= column <= p + row for column in range(n)]
        for row, (n, p) in enumerate(zip(lengths, _PROMPTS, strict=True))
    ]
    answers = full.data.answers
    ids = [
        [
            answers[token % len(answers)] if target and answers else token
            for token, target in zip(row, scored, strict=True)
        ]
        for row, scored in zip(ids, targets, strict=True)
    ]
    batch = batch_from_rows(ids, roles, targets, tokenizer=full.data.tokenizer)
    return replace(batch, answers=answers).to(device_of(full.model))


def _on_one_row(full: Full, plan: int, row: int) -> Full:
    """One plan on one row of the data, cut to its first tokens."""
    data, bound = replace(full.data[[row]], sources={}).rearranged(lambda x: x[:, :_LONGEST]), full.bounds[plan]
    if not data.target_mask[:, 1:].any():
        data = replace(data, answers=())  # what is cut off is any token
        data.target_mask[:, -2:] = True
    donors = {
        i: replace(donor, lookups=tuple(lookup[[row]] for lookup in donor.lookups)) for i, donor in bound.donors.items()
    }
    return replace(full, data=data, bounds=[Bound(bound.places, bound.variant, donors)])


def _sums(strategy: Full | Cone, jobs: Sequence[Job], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Logits of all jobs one after the other, the sum of their losses, and its gradients."""
    logits, total = list[Tensor](), torch.zeros((), dtype=torch.float32)
    # None is 0: an edit after the last target is left out of the cone, and changes nothing in the full pass
    gradients = [torch.zeros_like(p) for p in parameters]
    for group in strategy.score(jobs):
        loss = torch.stack([F.cross_entropy(each.logits.float(), each.batch.target_ids) for each in group]).sum()
        logits += [each.logits.detach() for each in group]
        total = total + loss.detach().cpu()
        if parameters and loss.requires_grad:
            more = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = [old if new is None else old + new for old, new in zip(gradients, more, strict=True)]
    return [torch.cat(logits), total, *gradients]


def difference(measured: Sequence[Tensor], expected: Sequence[Tensor], *, narrow: bool) -> str:
    """By how much two results differ, if that is more than rounding, or ""."""
    for values in expected:
        check_finite(values, "the full computation")
    narrow = narrow or expected[0].dtype.itemsize < 4
    limit = 0.25 if narrow else 1e-3 if expected[0].dtype == torch.float32 else 1e-8
    largest = max((g.abs().max().item() for g in expected[1:]), default=0.0)
    floors = [0.0, *(1e-3 * largest for _ in expected[1:])]  # a gradient that is 0 in theory is mere rounding
    worst = max(relative_error(a, b, floor) for a, b, floor in zip(measured, expected, floors, strict=True))
    if not worst <= limit:
        what = "loss, logits or gradients" if len(expected) > 1 else "logits"
        return f"on short rows, {what} differ from the full computation by {worst:.2g}"
    return ""


def relative_error(measured: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over largest absolute value, or over `floor` where that is larger."""
    largest = max(expected.abs().max().item(), floor)
    error = (measured.to(expected.dtype) - expected).abs().max().item()
    return error / largest if largest > 0 else error
