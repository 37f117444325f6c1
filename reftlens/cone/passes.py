"""Rows that are computed at a step, in passes through the blocks: what each holds, edits, and is scored at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens.cone.body import Body
from reftlens.cone.groups import Section, sections
from reftlens.cone.layout import PlanCone
from reftlens.cone.plans import Way
from reftlens.cone.reuse import Reuse
from reftlens.cone.sharing import Sharing, shared_cones
from reftlens.cone.spans import Span, Window, first_block, window, within_block
from reftlens.editing.edits import Edit, joined, used_points
from reftlens.text.batch import Batch


class Row(NamedTuple):
    """A row of the data set, under the plan of one of the jobs that are computed together."""

    job: int
    plan: PlanCone
    number: int
    """In the data set."""

    @property
    def span(self) -> Span:
        return self.plan.spans[self.number]


@dataclass(frozen=True)
class Pass:
    """One pass through the blocks of the cone, for rows of similar length."""

    group: list[int]
    """Numbers of its rows among those that are computed together."""
    rows: list[Row]
    window: Window
    edits: list[Edit]
    at: tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]
    """Row and column, in the window, of what each target is predicted from."""
    way: Way

    @property
    def numbers(self) -> Int[Tensor, " rows"]:
        """Of its rows, in the data set."""
        return torch.tensor([row.number for row in self.rows])


@dataclass(frozen=True)
class Course:
    """Passes that go on from one beginning, which one row stands for; or from none."""

    beginning: Pass | None
    passes: list[Pass]

    @property
    def saved(self) -> int:
        """Tokens that the beginning stands for and that are not computed."""
        if self.beginning is None:
            return 0
        return self.beginning.window.real.shape[1] * (sum(len(each.group) for each in self.passes) - 1)


@dataclass
class Planner:
    """Puts rows of right-padded `data` into passes on `device`.

    The data is on the host, and so are all decisions. `way` is computed in, whether it is the cheapest or not.
    """

    body: Body
    data: Batch
    device: torch.device
    plans: Sequence[PlanCone]
    reuse: Reuse
    way: Way | None
    watches: bool = False
    """Whether hidden states are looked at, which the last block then has for all tokens."""

    def __post_init__(self) -> None:
        self._sharing = {id(plan): Sharing(self.data, plan) for plan in self.plans}

    def courses(self, rows: Sequence[Row], *, joined_jobs: bool) -> Iterator[Course]:
        """All rows, of jobs whose cones begin at one block."""
        divided = self._sections(rows)
        grouped = sum(len(section.groups) for section in divided) > 1
        through = partial(self._pass, rows, grouped=grouped, joined_jobs=joined_jobs)
        for shared, groups in ((section.shared, section.groups) for section in divided):
            beginning = through(groups[0][:1], 0, shared) if shared else None
            yield Course(beginning, [through(group, shared, None) for group in groups])

    def _sections(self, rows: Sequence[Row]) -> list[Section]:
        lengths, before = [row.span.length for row in rows], [row.span.start for row in rows]
        first, overhead = rows[0].plan.first, self.body.pass_cost
        able = self.reuse.beginnings and self.reuse.tokens and first < self.body.depth and len(rows) > 1
        shares = able and (self.way is None or self.way.shared)
        known = [(row.job, row.number, self._sharing[id(row.plan)]) for row in rows]
        if self.way is None:
            beginnings = shared_cones(known, 2 * overhead) if shares else []  # two passes more
            return sections(lengths, before, beginnings, self.reuse.buckets, overhead)
        beginnings = shared_cones(known, 0.0) if shares else []
        together = sorted({n for beginning in beginnings for n in beginning.rows})
        alone = [n for n in range(len(rows)) if n not in together]
        parts = [(b.length, list(b.rows)) for b in beginnings] + ([(0, alone)] if alone else [])
        return [Section(shared, self._halves(group, lengths)) for shared, group in parts]

    def _halves(self, group: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """The shorter rows and the longer ones, where the way has several groups."""
        assert self.way is not None
        middle = sorted(lengths[n] for n in group)[len(group) // 2] if self.way.grouped else 0
        halves = ([n for n in group if (lengths[n] < middle) is half] for half in (True, False))
        return [half for half in halves if half]

    def _pass(
        self, rows: Sequence[Row], group: list[int], skip: int, most: int | None, *, grouped: bool, joined_jobs: bool
    ) -> Pass:
        """The cones of some rows without their first `skip` tokens; or `most` tokens of them, which are not scored."""
        some = [rows[n] for n in group]
        numbers = torch.tensor([row.number for row in some])
        spans = [Span(r.span.start + skip, r.span.stop if most is None else r.span.start + most) for r in some]
        win = window(spans)
        edits = self._edits(some, numbers, win)
        targets = self.data.target_mask[numbers] & (most is None)
        lines, columns = targets.nonzero().unbind(dim=1)
        at = lines, columns - 1 - win.starts[lines]
        first = some[0].plan.first
        trimmed = most is None and self._trims(first, at, win, edits)
        hooks = frozenset(
            (within_block(edit.point.name or ""), p.intervention.label) for edit in edits for p in edit.parts
        )
        entry = "norm" if first == self.body.depth else "block" if first else "embedding"
        way = Way(hooks, entry, bool(some[0].span.start), trimmed, grouped, joined_jobs, skip > 0)
        return Pass(group, some, win, edits, at, way)

    def _edits(self, rows: Sequence[Row], numbers: Int[Tensor, " rows"], win: Window) -> list[Edit]:
        """The edits of all jobs, those at the same place of their `ReFT` in one."""
        together: dict[tuple[Any, ...], list[Edit]] = {}
        for job in dict.fromkeys(row.job for row in rows):
            which = [n for n, row in enumerate(rows) if row.job == job]
            places = torch.tensor(which)
            for i, edit in rows[which[0]].plan.edits(win, places, numbers[places], self.device).items():
                together.setdefault((i, id(edit.point), id(edit.carry), edit.heads), []).append(edit)
        return [joined(together[key]) for key in sorted(together, key=lambda key: key[0])]

    def _trims(self, first: int, at: tuple[Tensor, Tensor], win: Window, edits: Sequence[Edit]) -> bool:
        """Whether the last block is worth computing, and can be computed, at the scored tokens only."""
        able = self.reuse.scored_only and self.reuse.tokens and self.body.may_trim and not self.watches
        pools = any(part.intervention.pools for edit in edits for part in edit.parts)  # over tokens that nobody scores
        if not able or pools or first == self.body.depth:
            return False
        if self.way is not None:
            return self.way.trimmed
        rows, width = win.real.shape
        most = int(torch.bincount(at[0], minlength=rows).max())
        return most < 0.7 * width and not self.body.uses_more_than_output(used_points(edits))


def unread(edit: Edit, depth: int) -> bool:
    """Whether an edit of a beginning may be left out: its last block is computed as far as its keys and values."""
    block = first_block(edit.point.name or "", depth)
    return block is None or block >= depth - 1


def back_in_order(order: Sequence[int], counts: Sequence[int], device: torch.device) -> Int[Tensor, " targets"] | None:
    """Where each target is when rows stand in `order`; None if that is where it should be."""
    if list(order) == sorted(order):
        return None
    begins, total = {}, 0
    for n in order:
        begins[n], total = total, total + counts[n]
    return torch.tensor([begins[n] + i for n in range(len(order)) for i in range(counts[n])], device=device)
