"""Logits at the targets of a data set, edited, by the cheapest computation that is exact.

Training, evaluation and sweeps all ask a `Scorer`. It computes only the light cone of the edits and takes the rest
from what was captured once; where that would not be valid it runs the whole model, and says so in `computation`.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.protocol import Bridge, device_of
from reftlens.cone.body import Body, Gather
from reftlens.cone.kept import Kept
from reftlens.cone.plans import Job, Plan, Scored
from reftlens.cone.prefix import Capture, Entering, Prefilled, Stub, assemble, cache_of, entering
from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import Span, Window, buckets, first_block, spans, window
from reftlens.cone.trim import Trimmed
from reftlens.cone.verify import difference
from reftlens.editing.engine import Edit, Part, attached, check_fired, forward, forward_inside
from reftlens.editing.reft import shared_donors
from reftlens.editing.sources import places_of
from reftlens.text.batch import Batch
from reftlens.text.view import Mask

_TOGETHER = defaultdict(lambda: 131072, cpu=8192)  # tokens of several jobs in one pass, prefixes included
_ROWS = 8
"""The unembedding gets a multiple of so many rows. For some other numbers, CPU libraries with several threads add the
vocabulary's tens of thousands of terms one after the other in the backward pass, and gradients lose two digits."""
_OVERHEAD = defaultdict(lambda: 256.0, cpu=16.0)  # what one more pass through the blocks costs, in tokens


class Scorer:
    """Scores rows of `data` under any of `plans`.

    Args:
        uses: how often each row will be scored, about; what is used once is not kept.
        autocast: makes the context of each forward pass; `narrow` says that it computes in 16 bits.
    """

    def __init__(
        self,
        model: Bridge,
        data: Batch,
        plans: Sequence[Plan],
        reuse: Reuse | None,
        *,
        uses: float = float("inf"),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        narrow: bool = False,
        progress: bool = False,
    ) -> None:
        self.model, self.data, self.plans, self.reuse, self.autocast = model, data, list(plans), reuse, autocast
        self.device = device_of(model)
        refts = {id(plan.reft): plan.reft.to(self.device) for plan in self.plans}
        bound = {key: reft.bind(model) for key, reft in refts.items()}
        self.bounds = [bound[id(plan.reft)] for plan in self.plans]
        """Of each plan its `ReFT`, bound to the model."""
        self._checked, self._narrow = False, narrow
        variants = [plan.variant for plan in self.plans]
        self.donors = shared_donors(model, data, list(zip(self.bounds, variants, strict=True)))
        """For each plan what its sources hold."""
        self.why_full = "reuse is switched off"
        if reuse is None:
            return
        try:
            self.body = Body(model)
        except ValueError as error:
            self.why_full = str(error)
            return
        self.why_full = self._obstacle()
        if not self.why_full:
            self._lay_out(uses, progress)

    # -- what is said ------------------------------------------------------------------------------------

    @property
    def computation(self) -> str:
        """How scores are computed, in words."""
        if self.why_full:
            return f"full computation: {self.why_full}"
        tokens, whole = sum(c.length for c in self.cones), int(self.data.attention_mask.sum())
        last = self.body.depth - 1
        blocks = f"blocks {self.first} to {last}" if self.first <= last else "no block"
        return f"light cone: {blocks}, {tokens} of {whole} tokens; the rest is kept {self.kept}"

    def _obstacle(self) -> str:
        """Why reuse is not valid on this model with these sites, or ""."""
        for bound in self.bounds:
            for point in bound.points:
                if first_block(point.name or "", self.body.depth) is None:
                    return f"{point.name} has no known place among the blocks"
        return self.body.obstacle()

    # -- layout and capture ------------------------------------------------------------------------------

    def _lay_out(self, uses: float, progress: bool) -> None:
        assert self.reuse is not None
        self.tidy = _right_padded(self.data).to(self.device)
        self.masks = {i: self._plan_masks(i) for i in range(len(self.plans))}
        self.firsts = [
            min(first_block(p.name or "", self.body.depth) or 0 for p in bound.points) if self.reuse.depth else 0
            for bound in self.bounds
        ]
        self.first = min(self.firsts)
        edited = [torch.stack(list(masks.values())).any(dim=0) for masks in self.masks.values()]
        self.own = self._spans(edited)
        """Of each plan."""
        self.cones = spans(self.tidy, torch.stack(edited).any(dim=0), tokens=self.reuse.tokens)
        """Of each row, those of all plans together."""
        latest = [max(cones[r].start for cones in self.own) for r in range(len(self.data))]
        self.plain = self.reuse.plain and self.body.may_be_plain
        chosen = {(i, k) for i, donors in enumerate(self.donors) for k in donors}
        self.places = {(i, k): places_of(self.plans[i].reft.sites[k].positions.mask(self.tidy.view)) for i, k in chosen}
        firsts = tuple(sorted(set(self.firsts)))
        self.capture = Capture(self.body, self.tidy, self.cones, latest, firsts, self.plain)
        self.kept = Kept(self.model, self.capture, self.reuse, uses, self.autocast, progress)

    def _spans(self, edited: Sequence[Mask]) -> list[list[Span]]:
        """The cones of each plan, given what it edits; made once for all plans that edit the same tokens."""
        assert self.reuse is not None
        known: dict[bytes, list[Span]] = {}
        result = []
        for mask in edited:
            key = mask.cpu().numpy().tobytes()
            if key not in known:
                known[key] = spans(self.tidy, mask, tokens=self.reuse.tokens)
            result.append(known[key])
        return result

    def _plan_masks(self, plan: int) -> dict[int, Mask]:
        (reft, variant), view = self.plans[plan], self.tidy.view
        return {i: variant.mask(reft.sites[i], view) for i in reft.active(variant)}

    # -- scoring -----------------------------------------------------------------------------------------

    def groups(self, jobs: Sequence[Job]) -> Iterator[list[Scored]]:
        """Score jobs, as many together as is sensible; jobs of one group share a graph, so call backward once."""
        if not self.why_full:
            self._check_again(jobs[0])
        if self.why_full:
            for job in jobs:
                with self._whole(job) as scored:
                    yield [scored]
            return
        for group in self._grouped(jobs):
            yield self._cone(group)

    def _check_again(self, job: Job) -> None:
        """Look for what could make reuse wrong; the first time, compare with the full computation."""
        self.why_full = self.body.obstacle()
        if self.why_full:
            return
        if not self._checked and self.reuse is not None and self.reuse.verify:
            self._checked = True
            self.why_full = self._difference(job)
            if self.why_full:
                warnings.warn(f"the frozen computation is not reused: {self.why_full}", stacklevel=4)
        if not self.why_full:
            self.kept.prepare()

    @contextmanager
    def _whole(self, job: Job) -> Iterator[Scored]:
        """The full computation of one job, its hooks attached for as long as the block is open."""
        plan, batch = self.plans[job.plan], self.data[list(job.rows)].to(self.device)
        edits = self.bounds[job.plan].edits(batch.view, plan.variant, self.donors[job.plan], job.rows)
        with attached(edits), self.autocast():
            logits = forward(self.model, batch.tokens, batch.attention_mask).logits
            yield Scored(job, batch, logits[batch.predicting])
        check_fired(edits)

    def _grouped(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs whose cones begin at the same block together, as long as they stay small.

        Keys are joined with their prefix once for every job.
        """
        group: list[Job] = []
        size = 0
        for job in sorted(jobs, key=lambda job: self.firsts[job.plan]):
            more = sum(self.cones[r].stop for r in job.rows)
            other = bool(group) and self.firsts[job.plan] != self.firsts[group[-1].plan]
            if other or (group and size + more > _TOGETHER[self.device.type]):
                yield group
                group, size = [], 0
            group.append(job)
            size += more
        yield group

    def _cone(self, jobs: list[Job]) -> list[Scored]:
        """The light cone of all rows of jobs that begin at one block, in a few groups of similar length."""
        assert self.reuse is not None
        rows = [(j, r) for j, job in enumerate(jobs) for r in job.rows]
        cones = [self.own[jobs[j].plan][r] for j, r in rows]
        first = self.firsts[jobs[0].plan]
        captured = [
            whole.cut(self.cones[r], cone, first, first - self.first)
            for whole, cone, (_, r) in zip(self.kept.fetch([r for _, r in rows]), cones, rows, strict=True)
        ]
        lengths, before = [c.length for c in cones], [c.start for c in cones]
        groups = buckets(lengths, before, self.reuse.buckets, _OVERHEAD[self.device.type])
        counts = [int(n) for n in self.tidy.target_mask.sum(dim=1)[[r for _, r in rows]]]
        order = _back_in_order([n for group in groups for n in group], counts, self.device)
        gather, logits = Gather(order, _ROWS), []
        with self.autocast():
            for i, group in enumerate(groups):
                gather.last = i == len(groups) - 1
                logits.append(self._bucket(jobs, [rows[n] for n in group], [captured[n] for n in group], gather))
        if self.reuse.scored_only:
            scored = logits[-1][: sum(counts)]
        else:
            scored = torch.cat(logits) if order is None else torch.cat(logits)[order]
        sizes = [sum(counts[n] for n, (k, _) in enumerate(rows) if k == j) for j in range(len(jobs))]
        batches = [self.data[list(job.rows)].to(self.device) for job in jobs]
        return [Scored(*parts) for parts in zip(jobs, batches, scored.split(sizes), strict=True)]

    def _bucket(
        self, jobs: list[Job], rows: list[tuple[int, int]], captured: list[Entering], gather: Gather
    ) -> Float[Tensor, "targets vocab"]:
        """One pass through the blocks of the cone, for rows `(job, row)` of similar length."""
        assert self.reuse is not None
        index = torch.tensor([r for _, r in rows], device=self.device)
        win, first = window([self.own[jobs[j].plan][r] for j, r in rows], self.device), self.firsts[jobs[0].plan]
        stream, mask, layers = assemble(captured, win, next(self.body.head.original.parameters()))
        edits = self._edits(jobs, rows, index, win)
        used = frozenset(id(p) for e in edits for p in (e.point, e.carry) if p is not None)
        places = entering(self.body, first, stream, self.capture.as_tuple)
        at = _predicting(win, self.tidy.target_mask[index])
        if self.reuse.scored_only:
            gather.at, gather.unembed = at, self.body.piece(self.body.head, plain=self.plain, used=used)
            places.append((self.body.head, gather))
        cache, before, trims = None, int(win.starts.max()), self._trims(first, at, win, used)
        if trims and not layers:
            layers = [Prefilled([None] * len(rows), [None] * len(rows), 0) for _ in range(self.body.depth - first)]
        if layers:
            below: list[DynamicLayer] = [Stub(len(rows), before) for _ in range(first)]
            cache = cache_of([*below, *layers])
        if trims and cache is not None:
            places.append((self.body.blocks[-1], Trimmed(self.body, cache, layers[-1], before, at)))
        with attached(edits), self.body.arranged(places, plain=self.plain, used=used):
            out = forward_inside(self.model, win.cut(self.tidy.tokens[index]), mask, win.columns, cache)
        check_fired(edits)
        return out.logits[0] if self.reuse.scored_only else out.logits[at]

    def _trims(self, first: int, at: tuple[Tensor, Tensor], win: Window, used: frozenset[int]) -> bool:
        """Whether the last block is worth computing, and can be computed, at the scored tokens only."""
        assert self.reuse is not None
        if not (self.reuse.scored_only and self.reuse.tokens) or first == self.body.depth:
            return False
        rows, width = win.real.shape
        most = int(torch.bincount(at[0], minlength=rows).max())
        return most < 0.7 * width and not self.body.uses_more_than_output(used)

    def _edits(
        self, jobs: list[Job], rows: list[tuple[int, int]], index: Int[Tensor, " rows"], win: Window
    ) -> list[Edit]:
        """The edits of all jobs, those at the same place of their `ReFT` in one."""
        found: dict[tuple[Any, ...], Edit] = {}
        for j, job in enumerate(jobs):
            mine = torch.tensor([n for n, (k, _) in enumerate(rows) if k == j], device=self.device)
            if not len(mine):
                continue
            plan, bound = self.plans[job.plan], self.bounds[job.plan]
            if plan.variant.strength == 0.0:  # computed as if there were no edit, bit for bit
                continue
            view = replace(win, columns=win.columns[mine], real=win.real[mine], starts=win.starts[mine])
            for i, mask in self.masks[job.plan].items():
                at, columns = (view.cut(mask[index[mine]]) & view.real).nonzero().unbind(dim=1)
                if not len(at):
                    continue
                site, point, carry = plan.reft.sites[i], bound.points[i], bound.carries[i]
                key = (i, id(point), id(carry), site.heads)
                if key not in found:
                    shape = (win.real.shape[0], win.real.shape[1])
                    found[key] = Edit(point, [], index[:0], index[:0], shape, site.heads, carry)
                edit = found[key]
                edit.rows = torch.cat([edit.rows, mine[at]])
                edit.columns = torch.cat([edit.columns, columns])
                donor, source = self.donors[job.plan].get(i), None
                if donor is not None:
                    real = index[mine[at]]
                    source = donor.of(real, self.places[job.plan, i][real, columns + win.starts[mine[at]]])
                module, strength = plan.reft[i], plan.reft.strength(plan.variant, i)
                whose = mine[at] if module.pools else None
                edit.parts.append(Part(module, len(at), strength, source=source, rows=whose))
        return [found[key] for key in sorted(found, key=lambda key: key[0])]

    def _difference(self, job: Job) -> str:
        """What is wrong with the cone on some rows of `job`, or ""."""
        narrow = self._narrow or (self.reuse is not None and self.reuse.half)
        lengths = [cone.stop for cone in self.cones]
        try:
            return difference(
                job, self.plans, self.firsts, lengths, self._whole, lambda jobs: map(self._cone, self._grouped(jobs)),
                narrow=narrow,
            )  # fmt: skip
        finally:
            self.kept.forget()


def _right_padded(data: Batch) -> Batch:
    """The same rows, padded on the right."""
    real = data.attention_mask
    order = (~real).long().argsort(dim=1, stable=True)
    moved = {k: getattr(data, k).gather(1, order) for k in ("tokens", "role", "target_mask")}
    return replace(data, **moved)


def _back_in_order(order: Sequence[int], counts: Sequence[int], device: torch.device) -> Int[Tensor, " targets"] | None:
    """Where each target is when rows stand in `order`; None if that is where it should be."""
    if list(order) == sorted(order):
        return None
    begins, total = {}, 0
    for n in order:
        begins[n], total = total, total + counts[n]
    return torch.tensor([begins[n] + i for n in range(len(order)) for i in range(counts[n])], device=device)


def _predicting(win: Window, targets: Mask) -> tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]:
    """Row and column, in the window, of what each target is predicted from."""
    rows, columns = targets.nonzero().unbind(dim=1)
    return rows, columns - 1 - win.starts[rows]
