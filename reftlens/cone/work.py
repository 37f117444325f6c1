"""What passes through a model compute, told from their shapes: tokens, operations, memory of a backward pass."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from reftlens.cone.light_cone import ROWS, Cone
from reftlens.cone.passes import Course, Pass
from reftlens.cone.size import Size


@dataclass(frozen=True)
class Work:
    """What some passes compute."""

    tokens: int = 0
    """Without padding."""
    padded: int = 0
    """With it: rows times columns of each pass."""
    forward: int = 0
    """Operations of matrix products, two for each multiply-add."""
    backward: int = 0
    memory: int = 0
    """Bytes, about, that the largest pass holds for the backward pass."""

    def __add__(self, other: "Work") -> "Work":
        sums = (a + b for a, b in zip(astuple(self)[:4], astuple(other)[:4], strict=True))
        return Work(*sums, memory=max(self.memory, other.memory))

    @property
    def operations(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Shape:
    """One pass: rows and columns, and the blocks that it runs."""

    rows: int
    columns: int
    keys: int
    """That each token attends to, those before the pass, padding and the future included."""
    tokens: int
    """Without padding."""
    blocks: range
    """The last of which, where the model ends with it, is computed in full only at `most` columns."""
    most: int | None = None
    unembedded: int = 0
    """Tokens that logits are computed of."""

    def work(self, size: Size, lowest: int | None = None) -> Work:
        """Forward, and where it is for a gradient, back to the input of block `lowest`."""
        below = self.blocks if lowest is None else range(max(lowest, self.blocks.start), self.blocks.stop)
        forward = self._products(size, self.blocks, backward=False)
        backward = 0 if lowest is None else self._products(size, below, backward=True)
        saved = 0 if lowest is None else self._saved(size, below)
        return Work(self.tokens, self.rows * self.columns, 2 * forward, 2 * backward, saved)

    def _products(self, size: Size, blocks: range, *, backward: bool) -> int:
        total, padded = self.unembedded * size.unembedding, self.rows * self.columns
        for number in blocks:
            if number < size.depth - 1 or self.most is None:
                total += size.block(number, padded, self.keys, backward=backward)
                continue
            scored = self.rows * self.most  # their keys and values are those of all tokens, and take no gradient again
            total += padded * (size.into_cache if backward else size.projections)
            total += size.block(number, scored, self.keys, backward=backward) - scored * size.into_cache * backward
        return total

    def _saved(self, size: Size, blocks: range) -> int:
        """What comes out of each product of a block and its norms, keys and values of all heads, logits in float32."""
        padded, numbers = self.rows * self.columns, 0
        for number in blocks:
            numbers += padded * (size.blocks[number] // size.d + 2 * size.d) + self.rows * self.keys * size.attention
        return numbers * size.width + self.unembedded * size.unembedding // size.d * (size.width + 8)


def full_work(size: Size, lengths: Sequence[int], lowest: int, *, alone: bool) -> Work:
    """Rows of these lengths through the whole model, in one pass or each `alone`."""
    total = Work()
    for rows in [[n] for n in lengths] if alone else [lengths]:
        count, longest = len(rows), max(rows)
        shape = Shape(count, longest, longest, sum(rows), range(size.depth), unembedded=count * longest)
        total += shape.work(size, lowest)
    return total


def step_work(size: Size, courses: Sequence[Course], lowest: int, *, scored_only: bool) -> Work:
    """One pass after the other, forward and back, each with the beginning that it goes on from."""
    total = Work()
    for course in courses:
        begun = Work() if course.beginning is None else _shape(size, course.beginning, True, True).work(size, lowest)
        passes = sum((_shape(size, each, False, scored_only).work(size, lowest) for each in course.passes), Work())
        total += replace(begun + passes, memory=begun.memory + passes.memory)
    return total


def _shape(size: Size, each: Pass, begins: bool, scored_only: bool) -> Shape:
    real, targets = each.window.real, len(each.at[0])
    rows, columns = real.shape
    most = 0 if begins else int(torch.bincount(each.at[0], minlength=rows).max()) if each.way.trimmed else None
    return Shape(
        rows,
        columns,
        int(each.window.starts.max()) + columns,
        int(real.sum()),
        range(each.rows[0].plan.first, size.depth),
        most,
        0 if begins else targets + -targets % ROWS if scored_only else rows * columns,
    )


def capture_work(size: Size, cone: Cone, rows: Sequence[int]) -> Work:
    """Rows that are captured together: blocks below the cone for all their tokens, those of the cone before it."""
    capture, total = cone.capture, Work()
    spans, latest, top = capture.after(rows), [capture.latest[row] for row in rows], max(capture.firsts)
    start, width = max(span.start for span in spans), max(span.length for span in spans)
    if top > 0:
        tokens = sum(span.length for span in spans)
        total += Shape(len(rows), width, start + width, tokens, range(top)).work(size)
    if max(latest) > 0 and top < size.depth:
        before = [n - span.start for n, span in zip(latest, spans, strict=True)]
        wide = max(1, *before)
        upper = Shape(len(rows), wide, start + wide, sum(before), range(top, size.depth), most=0).work(size)
        total += Work(0, 0, upper.forward) if top > 0 else upper  # the same tokens, at other blocks
    return total
