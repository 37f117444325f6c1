"""The light cone: only what the edits can change and the targets need; the rest was captured once."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.lengths import changes_with_length
from reftlens.bridge.protocol import device_of
from reftlens.cone.body import Body
from reftlens.cone.caches import Prefilled, Stub, cache_of, recorded, recorders_after
from reftlens.cone.capture import Capture
from reftlens.cone.captured import Captured
from reftlens.cone.continued import Begun, KeysAndValues
from reftlens.cone.full import Full, at_targets
from reftlens.cone.layout import plan_cones
from reftlens.cone.passes import Course, Pass, Planner, Row, back_in_order, unread
from reftlens.cone.plans import Job, Scored, Unsound, Way
from reftlens.cone.prefix import assemble, entering
from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import Span
from reftlens.cone.stand_ins import Columns, Gather
from reftlens.cone.store import RowStore
from reftlens.cone.trim import Trimmed
from reftlens.cone.watched import Watch, joined_rows
from reftlens.editing.edits import used_points
from reftlens.editing.engine import Stop, attached, check_fired, forward_inside, hooked
from reftlens.text.batch import Batch
from reftlens.text.beginnings import Beginning, shared_beginnings

_TOGETHER = defaultdict(lambda: 131072, cpu=8192)  # tokens of several jobs in one pass, prefixes included
ROWS = 8
"""The unembedding gets a multiple of so many rows. For some other numbers, CPU libraries with several threads add the
vocabulary's tens of thousands of terms one after the other in the backward pass, and gradients lose two digits."""


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
        reuse = replace(reuse, beginnings=False, buckets=1) if full.watched else reuse  # a row's tokens in one pass
        self.body, self.data, self.reuse, self.autocast, self.way = body, full.data, reuse, full.autocast, way
        self.check: Callable[[Way, Sequence[Job]], None] = lambda way, jobs: None
        """Called before anything is computed in some way for these jobs; raises `Unsound` where it must not be."""
        self.device = device_of(body.model)
        self.answers = torch.tensor(full.data.answers, device=self.device) if full.data.answers else None
        self.tidy = full.data.right_padded().to("cpu")
        self.plans = plan_cones(self.tidy, full.bounds, body.depth, reuse, full.watched)
        self.watched, view = full.watched, self.tidy.view
        self.looked = [each.site.positions.mask(view) for each in full.watched]
        self.first = min(plan.first for plan in self.plans)
        every = zip(*(plan.spans for plan in self.plans), strict=True)
        self.spans = [Span(min(s.start for s in row), max(s.stop for s in row)) for row in every]
        """Of each row, those of all plans together."""
        self.plain = reuse.plain and body.may_be_plain
        through = [plan for plan in self.plans if plan.first < body.depth]  # blocks, which read keys
        latest = [max((plan.spans[row].start for plan in through), default=0) for row in range(len(self.data))]
        firsts = tuple(sorted({plan.first for plan in self.plans}))
        shared = self._beginnings() if reuse.beginnings else []
        self.capture = Capture(
            body, self.tidy, self.spans, latest, firsts, self.plain, full.autocast, shared, narrow=reuse.half
        )
        self.store = RowStore(self.capture, reuse, uses, progress)
        self.planner = Planner(body, self.tidy, self.device, self.plans, reuse, way, bool(full.watched))
        self._counts: list[int] = self.tidy.target_mask.sum(dim=1).tolist()
        self._tokens = 0, 0

    def _beginnings(self) -> list[Beginning]:
        """Those of the frozen tokens that pay, or any, in the way that is asked for."""
        overhead = 0.0 if self.way is not None else self.body.pass_cost
        return shared_beginnings(self.tidy.tokens, [span.start for span in self.spans], overhead=overhead)

    @property
    def computation(self) -> str:
        """What is computed, in words."""
        tokens, whole = sum(span.length for span in self.spans), int(self.data.attention_mask.sum())
        last = self.body.depth - 1
        blocks = f"blocks {self.first} to {last}" if self.first <= last else "no block"
        repeated = sum((len(shared.rows) - 1) * shared.length for shared in self.capture.beginnings)
        distinct = f" ({whole - tokens - repeated} distinct of {whole - tokens})" if repeated else ""
        computed = f" ({self._tokens[1]} distinct of {self._tokens[0]} so far)" if len(set(self._tokens)) > 1 else ""
        return f"light cone: {blocks}, {tokens} of {whole} tokens{computed}; the rest{distinct} is kept {self.store}"

    def score(self, jobs: Sequence[Job], *, whole: bool = True) -> Iterator[list[Scored]]:
        """Jobs whose cones begin at the same block together, as long as they stay small.

        Keys are joined with their prefix once for every job. With `whole` False jobs come in parts, each with a graph
        of its own: what was scored goes backward before the next is asked for.
        """
        obstacle = changes_with_length(self.body.model, int(self.data.attention_mask.sum(dim=1).max()))
        if obstacle:
            raise Unsound(obstacle)
        for group in self.groups(jobs):
            yield from self._scored(group, whole=whole)

    def groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs that are computed together: their cones begin at one block, and they are small."""
        group: list[Job] = []
        size = 0
        for job in sorted(jobs, key=lambda job: self.plans[job.plan].first):
            more = sum(self.spans[row].stop for row in job.rows)
            other = bool(group) and self.plans[job.plan].first != self.plans[group[-1].plan].first
            if other or (group and size + more > _TOGETHER[self.device.type]):
                yield group
                group, size = [], 0
            group.append(job)
            size += more
        yield group

    def divided(self, jobs: Sequence[Job]) -> tuple[list[Row], list[Course]]:
        """All rows of jobs whose cones begin at one block, in passes; `computation` counts them."""
        rows = [Row(j, self.plans[job.plan], number) for j, job in enumerate(jobs) for number in job.rows]
        courses, tokens = list(self.planner.courses(rows, joined_jobs=len(jobs) > 1)), sum(r.span.length for r in rows)
        saved = sum(course.saved for course in courses)
        self._tokens = self._tokens[0] + tokens, self._tokens[1] + tokens - saved
        return rows, courses

    def _scored(self, jobs: list[Job], *, whole: bool) -> Iterator[list[Scored]]:
        """All rows of jobs whose cones begin at one block."""
        rows, courses = self.divided(jobs)
        for course in courses:
            for each in course.passes:
                self.check(each.way, jobs)
        self.store.prepare()
        captured = [
            stored.part(self.spans[row.number], row.span, row.span.start, row.plan.first - self.first)
            for stored, row in zip(self.store.fetch([row.number for row in rows]), rows, strict=True)
        ]
        results = list[tuple[list[int], Tensor]]()
        for course in courses:
            begun = Begun(self._begin(course.beginning, captured), apart=not whole and torch.is_grad_enabled())
            for each in course.passes:
                logits, seen = self._run(each, [captured[n] for n in each.group], begun.handed)
                if whole and not seen:
                    results.append((each.group, logits))
                else:
                    yield self._parts(jobs, rows, each.group, logits, seen)
            begun.send_back()
        if results:
            order = [n for group, _ in results for n in group]
            logits = torch.cat([x for _, x in results]) if len(results) > 1 else results[0][1]
            back = back_in_order(order, [self._counts[row.number] for row in rows], self.device)
            yield self._parts(jobs, rows, range(len(rows)), logits if back is None else logits[back])

    @property
    def _like(self) -> Tensor:
        """Has the dtype of hidden states, and the device of passes."""
        return torch.empty(0, dtype=next(self.body.head.original.parameters()).dtype, device=self.device)

    def _parts(
        self,
        jobs: Sequence[Job],
        rows: Sequence[Row],
        group: Sequence[int],
        logits: Tensor,
        seen: Sequence[dict[str, Tensor]] = (),
    ) -> list[Scored]:
        """Logits at the targets of some rows, in the order of the jobs, and what was `seen` of each row, by job."""
        by_job, states = defaultdict[int, list[int]](list), defaultdict[int, list[dict[str, Tensor]]](list)
        for place, n in enumerate(group):
            by_job[rows[n].job].append(rows[n].number)
            states[rows[n].job] += seen[place : place + 1]
        parts = [replace(jobs[j], rows=tuple(numbers)) for j, numbers in by_job.items()]
        sizes = [sum(self._counts[row] for row in part.rows) for part in parts]
        pieces = logits.split(sizes) if len(parts) > 1 else [logits]
        batches = [_moved(self.data[list(part.rows)], self.device) for part in parts]
        joined = (joined_rows(states[j]) for j in by_job)
        return [Scored(*each) for each in zip(parts, batches, pieces, joined, strict=True)]

    def _begin(self, beginning: Pass | None, captured: Sequence[Captured]) -> KeysAndValues:
        """Keys and values of a beginning at the blocks of the cone, the last of which only starts."""
        if beginning is None:
            return []
        first, depth = beginning.rows[0].plan.first, self.body.depth
        some = [captured[n] for n in beginning.group]
        stream, mask, layers = assemble(some, first, beginning.window, self._like)
        recorders = recorders_after(layers, first, depth, ends=True)
        with suppress(Stop):
            self._pass(beginning, stream, mask, recorders, Watch((), ()))
        check_fired([edit for edit in beginning.edits if not unread(edit, depth)])
        return list(zip(*recorded(recorders), strict=True))

    def _run(
        self, each: Pass, captured: Sequence[Captured], begun: KeysAndValues
    ) -> tuple[Float[Tensor, "targets vocab"], list[dict[str, Tensor]]]:
        """The logits of one pass at its targets, and what is watched of each row."""
        stream, mask, layers = assemble(captured, each.rows[0].plan.first, each.window, self._like, begun)
        if each.way.trimmed and not layers:
            layers = [Prefilled(len(each.rows), 0) for _ in range(self.body.depth - each.rows[0].plan.first)]
        win = each.window
        watch = Watch(self.watched, [win.cut(mask[each.numbers]) & win.real for mask in self.looked])
        logits = self._pass(each, stream, mask, layers, watch)
        check_fired(each.edits)
        targets = len(each.at[0])
        seen = watch.by_row()  # a slice of all logits would be copied by autograd
        return logits if len(logits) == targets else logits[:targets], seen

    def _pass(
        self, each: Pass, stream: Tensor | None, mask: Tensor, layers: Sequence[DynamicLayer], watch: Watch
    ) -> Tensor:
        """One pass through the blocks of the cone, from what enters it; logits with rows up to a multiple."""
        first, win = each.rows[0].plan.first, each.window
        used = used_points(each.edits) | {id(point) for point, _ in watch.hooks}
        at = each.at[0].to(self.device), each.at[1].to(self.device)
        places, cache, gather = entering(self.body, first, stream, self.capture.returns), None, Gather(at, ROWS)
        if self.reuse.scored_only:
            gather.unembed = self.body.piece(self.body.head, plain=self.plain, used=used)
            if self.answers is not None:
                gather.unembed = Columns(gather.unembed, self.answers, self.body.cut)
            places.append((self.body.head, gather))
        if layers:
            below: list[DynamicLayer] = [Stub(len(each.rows), win.before)] * first
            cache = cache_of([*below, *layers])
            if each.way.trimmed:
                places.append((self.body.blocks[-1], Trimmed(self.body, cache, layers[-1], win.before, each.at)))
        with (
            self.autocast(),
            attached(self.body.model, each.edits),
            hooked(self.body.model, watch.hooks),
            self.body.arranged(places, plain=self.plain, used=used),
        ):
            tokens, places = win.cut(self.tidy.tokens[each.numbers]).to(self.device), win.columns.to(self.device)
            logits = forward_inside(self.body.model, tokens, mask, places, cache)
        return logits.flatten(0, 1) if self.reuse.scored_only else at_targets(logits, at, self.data)


def _moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on `device`, where nothing is waited for to know its targets: they were looked up before."""
    moved = batch.to(device)
    vars(moved).update({name: getattr(batch, name).to(device) for name in ("target_ids", "target_rows")})
    return moved
