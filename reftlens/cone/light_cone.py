"""The light cone: only what the edits can change and the targets need; the rest was captured once."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.lengths import length_limit
from reftlens.bridge.protocol import device_of
from reftlens.cone.beginnings import Beginning, shared_beginnings
from reftlens.cone.body import Body
from reftlens.cone.caches import Prefilled, Stub, cache_of
from reftlens.cone.capture import Capture
from reftlens.cone.full import Full
from reftlens.cone.layout import PlanCone, plan_cones, right_padded
from reftlens.cone.plans import Job, Scored, Unsound, Way
from reftlens.cone.prefix import Captured, assemble, entering
from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import Span, Window, buckets, window, within_block
from reftlens.cone.stand_ins import Gather
from reftlens.cone.store import RowStore
from reftlens.cone.trim import Trimmed
from reftlens.editing.edits import Edit, joined, used_points
from reftlens.editing.engine import attached, check_fired, forward_inside
from reftlens.text.view import Mask

_TOGETHER = defaultdict(lambda: 131072, cpu=8192)  # tokens of several jobs in one pass, prefixes included
_ROWS = 8
"""The unembedding gets a multiple of so many rows. For some other numbers, CPU libraries with several threads add the
vocabulary's tens of thousands of terms one after the other in the backward pass, and gradients lose two digits."""
_OVERHEAD = defaultdict(lambda: 256.0, cpu=16.0)  # what one more pass through the blocks costs, in tokens


class _Row(NamedTuple):
    """A row of the data set, under the plan of one of the jobs that are computed together."""

    job: int
    plan: PlanCone
    number: int
    """In the data set."""

    @property
    def span(self) -> Span:
        return self.plan.spans[self.number]


@dataclass(frozen=True)
class _Pass:
    """One pass through the blocks of the cone, for rows of similar length."""

    group: list[int]
    """Numbers of its rows among those that are computed together."""
    rows: list[_Row]
    window: Window
    edits: list[Edit]
    at: tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]
    """Row and column, in the window, of what each target is predicted from."""
    way: Way


class Cone:
    """Scores jobs whose cones begin at one block together, in a few groups of rows of similar length.

    Args:
        full: the same, in full.
        uses: how often each row will be scored, about; what is used once is not stored.
        way: compute in this way, whether it is the cheapest or not.
    """

    def __init__(
        self, body: Body, full: Full, reuse: Reuse, *, uses: float, progress: bool, way: Way | None = None
    ) -> None:
        reuse = replace(reuse, tokens=False) if body.stateful else reuse
        self.body, self.data, self.reuse, self.autocast, self.way = body, full.data, reuse, full.autocast, way
        self.check: Callable[[Way, Sequence[Job]], None] = lambda way, jobs: None
        """Called before anything is computed in some way for these jobs; raises `Unsound` where it must not be."""
        self.device = device_of(body.model)
        self.tidy = right_padded(full.data).to(self.device)
        self.plans = plan_cones(self.tidy, full.bounds, body.depth, reuse)
        self.first = min(plan.first for plan in self.plans)
        every = zip(*(plan.spans for plan in self.plans), strict=True)
        self.spans = [Span(min(s.start for s in row), max(s.stop for s in row)) for row in every]
        """Of each row, those of all plans together."""
        self.plain = reuse.plain and body.may_be_plain
        latest = [max(plan.spans[row].start for plan in self.plans) for row in range(len(self.data))]
        firsts = tuple(sorted({plan.first for plan in self.plans}))
        shared = self._beginnings() if reuse.beginnings else []
        self.capture = Capture(
            body, self.tidy, self.spans, latest, firsts, self.plain, full.autocast, shared, narrow=reuse.half
        )
        self.store = RowStore(self.capture, reuse, uses, progress)

    def _beginnings(self) -> list[Beginning]:
        """Those of the frozen tokens that pay, or any, in the way that is asked for."""
        overhead = 0.0 if self.way is not None else _OVERHEAD[self.device.type]
        return shared_beginnings(self.tidy.tokens, [span.start for span in self.spans], overhead=overhead)

    @property
    def computation(self) -> str:
        """What is computed, in words."""
        tokens, whole = sum(span.length for span in self.spans), int(self.data.attention_mask.sum())
        last = self.body.depth - 1
        blocks = f"blocks {self.first} to {last}" if self.first <= last else "no block"
        repeated = sum((len(shared.rows) - 1) * shared.length for shared in self.capture.beginnings)
        distinct = f" ({whole - tokens - repeated} distinct of {whole - tokens})" if repeated else ""
        return f"light cone: {blocks}, {tokens} of {whole} tokens; the rest{distinct} is kept {self.store}"

    def score(self, jobs: Sequence[Job]) -> Iterator[list[Scored]]:
        """Jobs whose cones begin at the same block together, as long as they stay small.

        Keys are joined with their prefix once for every job.
        """
        limit = length_limit(self.body.model)
        if limit is not None and int(self.data.attention_mask.sum(dim=1).max()) > limit[1]:
            raise Unsound(f"its rotary positions ({limit[0]}) are others in rows of more than {limit[1]} tokens")
        group: list[Job] = []
        size = 0
        for job in sorted(jobs, key=lambda job: self.plans[job.plan].first):
            more = sum(self.spans[row].stop for row in job.rows)
            other = bool(group) and self.plans[job.plan].first != self.plans[group[-1].plan].first
            if other or (group and size + more > _TOGETHER[self.device.type]):
                yield self._scored(group)
                group, size = [], 0
            group.append(job)
            size += more
        yield self._scored(group)

    def _scored(self, jobs: list[Job]) -> list[Scored]:
        """All rows of jobs whose cones begin at one block."""
        rows = [_Row(j, self.plans[job.plan], number) for j, job in enumerate(jobs) for number in job.rows]
        passes = self._passes(rows, len(jobs) > 1)
        for each in passes:
            self.check(each.way, jobs)
        self.store.prepare()
        captured = [
            whole.cut(self.spans[row.number], row.span, row.plan.first, row.plan.first - self.first)
            for whole, row in zip(self.store.fetch([row.number for row in rows]), rows, strict=True)
        ]
        counts = self.tidy.target_mask.sum(dim=1)[[row.number for row in rows]].tolist()
        order = _back_in_order([n for each in passes for n in each.group], counts, self.device)
        gather, logits = Gather(order, _ROWS), []
        with self.autocast():
            for each in passes:
                gather.last = each is passes[-1]
                logits.append(self._run(each, [captured[n] for n in each.group], gather))
        if self.reuse.scored_only:
            (scored,) = logits[-1:]  # a slice of all, or a split into one, would be copied once more by autograd
            scored = scored if len(scored) == sum(counts) else scored[: sum(counts)]
        else:
            scored = torch.cat(logits) if order is None else torch.cat(logits)[order]
        sizes = [sum(count for count, row in zip(counts, rows, strict=True) if row.job == j) for j in range(len(jobs))]
        batches = [self.data[list(job.rows)].to(self.device) for job in jobs]
        parts = scored.split(sizes) if len(jobs) > 1 else [scored]
        return [Scored(*each) for each in zip(jobs, batches, parts, strict=True)]

    def _passes(self, rows: Sequence[_Row], joined_jobs: bool) -> list[_Pass]:
        """In what groups the rows are computed, and how."""
        lengths, before = [row.span.length for row in rows], [row.span.start for row in rows]
        if self.way is None:
            groups = buckets(lengths, before, self.reuse.buckets, _OVERHEAD[self.device.type])
        else:
            middle = sorted(lengths)[len(lengths) // 2] if self.way.grouped else 0
            halves = ([n for n, length in enumerate(lengths) if (length < middle) is half] for half in (True, False))
            groups = [half for half in halves if half]
        first, depth = rows[0].plan.first, self.body.depth
        entry = "norm" if first == depth else "block" if first else "embedding"
        passes = []
        for group in groups:
            some = [rows[n] for n in group]
            numbers = torch.tensor([row.number for row in some], device=self.device)
            win = window([row.span for row in some], self.device)
            edits, at = self._edits(some, numbers, win), _predicting(win, self.tidy.target_mask[numbers])
            trimmed = self._trims(first, at, win, edits)
            hooks = frozenset(
                (within_block(edit.point.name or ""), p.intervention.kind) for edit in edits for p in edit.parts
            )
            way = Way(hooks, entry, bool(win.starts.any()), trimmed, len(groups) > 1, joined_jobs)
            passes.append(_Pass(group, some, win, edits, at, way))
        return passes

    def _run(self, each: _Pass, captured: Sequence[Captured], gather: Gather) -> Float[Tensor, "targets vocab"]:
        """The logits of one pass at its targets (those of all passes so far where `gather` is at its last)."""
        rows, win, at = each.rows, each.window, each.at
        first, used = rows[0].plan.first, used_points(each.edits)
        stream, mask, layers = assemble(captured, first, win, next(self.body.head.original.parameters()))
        places = entering(self.body, first, stream, self.capture.returns)
        if self.reuse.scored_only:
            gather.at, gather.unembed = at, self.body.piece(self.body.head, plain=self.plain, used=used)
            places.append((self.body.head, gather))
        trims, cache, before = each.way.trimmed, None, int(win.starts.max())
        if trims and not layers:
            layers = [Prefilled([()] * len(rows), [()] * len(rows), 0) for _ in range(self.body.depth - first)]
        if layers:
            below: list[DynamicLayer] = [Stub(len(rows), before) for _ in range(first)]
            cache = cache_of([*below, *layers])
        if trims and cache is not None:
            places.append((self.body.blocks[-1], Trimmed(self.body, cache, layers[-1], before, at)))
        numbers = torch.tensor([row.number for row in rows], device=self.device)
        with attached(self.body.model, each.edits), self.body.arranged(places, plain=self.plain, used=used):
            tokens = win.cut(self.tidy.tokens[numbers])
            logits = forward_inside(self.body.model, tokens, mask, win.columns, cache)
        check_fired(each.edits)
        return logits.flatten(0, 1) if self.reuse.scored_only else logits[at]

    def _edits(self, rows: Sequence[_Row], numbers: Int[Tensor, " rows"], win: Window) -> list[Edit]:
        """The edits of all jobs, those at the same place of their `ReFT` in one."""
        together: dict[tuple[Any, ...], list[Edit]] = {}
        for job in dict.fromkeys(row.job for row in rows):
            which = [n for n, row in enumerate(rows) if row.job == job]
            places = torch.tensor(which, device=self.device)
            for i, edit in rows[which[0]].plan.edits(win, places, numbers[places]).items():
                together.setdefault((i, id(edit.point), id(edit.carry), edit.heads), []).append(edit)
        return [joined(together[key]) for key in sorted(together, key=lambda key: key[0])]

    def _trims(self, first: int, at: tuple[Tensor, Tensor], win: Window, edits: Sequence[Edit]) -> bool:
        """Whether the last block is worth computing, and can be computed, at the scored tokens only."""
        able = self.reuse.scored_only and self.reuse.tokens and self.body.may_trim
        pools = any(part.intervention.pools for edit in edits for part in edit.parts)  # over tokens that nobody scores
        if not able or pools or first == self.body.depth:
            return False
        if self.way is not None:
            return self.way.trimmed
        rows, width = win.real.shape
        most = int(torch.bincount(at[0], minlength=rows).max())
        return most < 0.7 * width and not self.body.uses_more_than_output(used_points(edits))


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
