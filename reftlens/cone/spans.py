"""The light cone of an edit: which blocks, and which tokens of each row, it can change.

An edit of a causal model at block L and token p changes blocks ≥ L at tokens ≥ p and nothing else. Whatever is
scored then lies in the cone from the first edited (or first scored) token to the last scored one. Everything here
is arithmetic on hook names and token masks; nothing runs a model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftlens.text.batch import Batch
from reftlens.text.beginnings import PASS
from reftlens.text.view import Mask

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_BEFORE = ("embed.", "pos_embed.", "embed_ln.", "rotary_emb.", "hook_embed", "hook_pos_embed")
_AFTER = ("ln_final.",)
_SQUARE = ("pattern", "attn_scores", "hook_rot")
_KEYS_PER_TOKEN = 4096  # reading so many keys costs about as much as all else that a block does with a token


def first_block(hook: str, depth: int) -> int | None:
    """The first block that an edit at `hook` (canonical name) can change; None where that is not known.

    The output of block l is the input of block l + 1. `depth` stands for "only the final norm and what follows".
    """
    block = _BLOCK.fullmatch(hook)
    if block is not None and not any(word in block[2] for word in _SQUARE):
        return int(block[1]) + (block[2] in ("hook_out", "hook_resid_post"))
    if hook.startswith(_AFTER):
        return depth
    return 0 if hook.startswith(_BEFORE) else None


def within_block(hook: str) -> str:
    """The name of a hook without the number of its block."""
    block = _BLOCK.fullmatch(hook)
    return hook if block is None else block[2]


@dataclass(frozen=True)
class Span:
    """The tokens `start <= place < stop` of one row, padding not counted, that have to be computed at each step."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def spans(data: Batch, edited: Mask, pooled: Mask | None = None, *, tokens: bool) -> list[Span]:
    """The cone of each row: from the first token edited or scored to the last one scored; or the whole row.

    It goes on to the last of the `pooled` tokens, whose edits each depend on all of them.
    """
    real = data.attention_mask
    if not tokens:
        return [Span(0, int(n)) for n in real.sum(dim=1)]
    place = real.long().cumsum(dim=1) - 1
    scoring = torch.zeros_like(real)
    scoring[data.predicting] = True
    needed = scoring if pooled is None else scoring | pooled & real
    far = torch.full_like(place, place.shape[1])
    start = torch.where(edited & real | scoring, place, far).amin(dim=1)
    stop = torch.where(needed, place, torch.full_like(place, -1)).amax(dim=1) + 1
    return [Span(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)]


def cost_of(rows: int, longest: int, keys: int, overhead: float) -> float:
    """What a group of rows costs, in tokens: its size times its longest cone, a little more for every key that
    attention reads (`keys` before the cones), and `overhead` for one more pass through the blocks."""
    return rows * longest * (1 + (keys + longest) / _KEYS_PER_TOKEN) + overhead


def buckets(lengths: Sequence[int], keys: Sequence[int], most: int | None, overhead: float) -> list[list[int]]:
    """Split rows into groups (at most `most`) that are computed apart, at the least cost; each keeps the rows' order.

    Exact among groups that are ranges of lengths, by dynamic programming; where all rows have as many keys, no other
    groups are cheaper.
    """
    steps = sorted(set(lengths))
    rows = [[i for i, length in enumerate(lengths) if length == step] for step in steps]
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for n, longest in enumerate(steps, start=1):
        cheapest: dict[int, tuple[float, tuple[int, ...]]] = {}
        size, deepest = 0, 0
        for first in range(n - 1, -1, -1):
            size, deepest = size + len(rows[first]), max(deepest, *(keys[i] for i in rows[first]))
            cost = cost_of(size, longest, deepest, overhead)
            for k, (before, cuts) in best[first].items():
                groups = 0 if most is None else k + 1  # how many there are does not matter
                if (most is None or k < most) and before + cost < cheapest.get(groups, (float("inf"), ()))[0]:
                    cheapest[groups] = (before + cost, (*cuts, first))
        best.append(cheapest)
    cuts = [*min(best[-1].values())[1], len(steps)]
    return [sorted(i for step in rows[a:b] for i in step) for a, b in pairwise(cuts)]


def by_length(data: Batch, rows: Sequence[int], most: int | None, device: torch.device) -> list[list[int]]:
    """Rows of a data set in groups (at most `most`) that pay where each is computed whole: those of similar length."""
    lengths = data.attention_mask[list(rows)].sum(dim=1).tolist()
    return [[rows[i] for i in part] for part in buckets(lengths, [0] * len(rows), most, PASS[device.type])]


@dataclass(frozen=True)
class Window:
    """Rows of a data set cut to their cones: `[rows, width]`, the cone's first token in column 0 of every row.

    It is on the host, whatever the model is on: nothing is waited for to know where a token is.
    """

    columns: Int[Tensor, "rows width"]
    """For each place the column of the data set's row; where `real` is false, any column."""
    real: Bool[Tensor, "rows width"]
    starts: Int[Tensor, " rows"]

    @property
    def before(self) -> int:
        """The most tokens before a cone."""
        return int(self.starts.max())

    def cut(self, values: Tensor) -> Tensor:
        """`values` `[rows, seq]` of the same rows, as the window shows them; meaningless where `real` is false."""
        return values.gather(1, self.columns)

    def take(self, rows: Int[Tensor, " n"]) -> "Window":
        """The window over some of its rows."""
        return Window(self.columns[rows], self.real[rows], self.starts[rows])


def window(cones: Sequence[Span]) -> Window:
    """The window over rows with these cones, as wide as the widest."""
    starts, stops = torch.tensor([(cone.start, cone.stop) for cone in cones]).unbind(dim=1)
    columns = starts[:, None] + torch.arange(max(c.length for c in cones))
    real = columns < stops[:, None]
    return Window(torch.where(real, columns, starts[:, None]), real, starts)
