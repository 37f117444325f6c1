"""What was captured of rows, and what they scored, kept for later calls: neither is computed a second time.

A row is known by its tokens, whatever batch it comes in; what was captured serves any cone that needs no more of it,
and cones that begin higher up or need keys of later tokens are computed from it.
All that is kept shares one budget of bytes, and what was not used for longest goes first.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Hashable
from threading import RLock
from typing import NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
from torch import nn

from reftlens.bridge.protocol import Bridge
from reftlens.bridge.weights import kept_by, weights_state
from reftlens.cone.captured import Captured
from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import Span

_NEEDS = 4
"""So much is kept of a row that cannot be computed from one another."""


class Cones(NamedTuple):
    """What was captured of a row: the streams of `span` entering `firsts`, and keys of the tokens before `latest`."""

    firsts: tuple[int, ...]
    span: Span
    latest: int

    def reach(self, other: "Cones") -> bool:
        """Whether all that others need can be computed from these: no lower block, and no other tokens."""
        inside = self.span.start <= other.span.start and other.span.stop <= self.span.stop
        return inside and min(self.firsts) <= min(other.firsts)

    def hold(self, other: "Cones") -> bool:
        """Whether these hold all that others need."""
        return self.reach(other) and {*other.firsts} - {0} <= {*self.firsts} and other.latest <= self.latest

    def union(self, other: "Cones") -> "Cones":
        """With all that others need, of the tokens of these."""
        return Cones(tuple(sorted({*self.firsts, *other.firsts})), self.span, max(self.latest, other.latest))

    def entry(self, first: int) -> "Cones":
        """What all of the tokens need to go on from block `first`."""
        return Cones((first,), self.span, self.span.start)


class Known(NamedTuple):
    """What is kept of a row."""

    cones: Cones
    captured: Captured
    returns: int
    """How many values a block of the model returns, which is seen when rows are captured."""

    def part(self, cones: Cones) -> Captured:
        """What cones need, of what this holds."""
        skip = min(cones.firsts) - min(self.cones.firsts)
        return self.captured.part(self.cones.span, cones.span, cones.latest, skip)


Scores = tuple[float, ...]
_SCORES = 512
"""About the bytes that the scores of a row and their key take."""


class Memory:
    """Captured rows of any model and scores of rows, and how many bytes they take."""

    def __init__(self) -> None:
        self.size = 0
        self._room = 0
        self._rows: OrderedDict[Hashable, tuple[Known, ...] | Scores] = OrderedDict()
        self._pools: Counter[int] = Counter()
        self._states: WeakKeyDictionary[nn.Module, tuple[object, object]] = WeakKeyDictionary()
        self._lock = RLock()

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self._pools.clear()
            self.size = 0

    def budget(self, reuse: Reuse) -> int:
        """In bytes, 0 to keep nothing; where none is set an eighth of what was free when that was first asked for."""
        if not reuse.remember:
            return 0
        if reuse.memory is not None:
            return reuse.memory
        self._room = self._room or free_memory() // 8
        return self._room

    def state(self, model: Bridge) -> object:
        """Stands for a model with the weights that it has now; rows of other weights of it are dropped."""
        root, now = model.original_model, (weights_state(model), _check_sum(model.original_model))
        with self._lock:
            known = self._states.get(root)
            if known is None or known[0] != now:
                if known is not None:
                    self._drop_all(known[1])
                self._states[root] = known = now, object()
                finalize(root, self._drop_all, known[1])
        return known[1]

    def _drop_all(self, state: object) -> None:
        """The rows of a model that was changed, or is gone."""
        with self._lock:
            for key in [key for key in self._rows if isinstance(key, tuple) and key[0] is state]:
                self._drop(key)

    def get(self, key: Hashable, cones: Cones) -> Known | None:
        """What is kept of a row and holds what cones need, or else what it can be computed from."""
        with self._lock:
            able = [known for known in self._known(key) if known.cones.reach(cones)]
        return next((known for known in able if known.cones.hold(cones)), able[-1] if able else None)

    def put(self, key: Hashable, new: Known, budget: int) -> None:
        """Keep what was captured, in place of all that it holds of what was known of the row, where there is room."""
        with self._lock:
            known = self._known(key)
            if not any(old.cones.hold(new.cones) for old in known):
                known = (*[old for old in known if not new.cones.hold(old.cones)][1 - _NEEDS :], new)
            for each in known:  # before the same are dropped: a beginning that goes on being used is counted once
                self.size += self._weigh(each.captured, 1)
            self._keep(key, known, budget)

    def scores(self, key: Hashable) -> Scores | None:
        """What a row scored, where it is kept."""
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
            return tuple(value for value in self._rows.get(key, ()) if isinstance(value, float)) or None

    def put_scores(self, key: Hashable, scores: Scores, budget: int) -> None:
        """Keep what a row scored, where there is room for it."""
        with self._lock:
            self.size += _SCORES
            self._keep(key, scores, budget)

    def _known(self, key: Hashable) -> tuple[Known, ...]:
        """What is kept of a row, which is used now."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return tuple(known for known in self._rows.get(key, ()) if isinstance(known, Known))

    def _keep(self, key: Hashable, entry: tuple[Known, ...] | Scores, budget: int) -> None:
        """Put what has been weighed in the place of what was there, and drop what there is no room for."""
        if key in self._rows:
            self._drop(key)
        self._rows[key] = entry
        while self._rows and self.size > budget:
            self._drop(next(iter(self._rows)))

    def _drop(self, key: Hashable) -> None:
        entry = self._rows.pop(key)
        self.size -= sum(self._weigh(known.captured, -1) for known in entry if isinstance(known, Known))
        self.size -= _SCORES if isinstance(entry[0], float) else 0

    def _weigh(self, captured: Captured, change: int) -> int:
        """Bytes that are needed for a row, beside those for rows that are in the same pool."""
        size = 0
        for pool in {id(part.pool): part.pool for part in captured.parts}.values():
            before = self._pools[id(pool)]
            self._pools[id(pool)] = after = before + change
            size += pool.size if min(before, after) == 0 else 0
        return size


def free_memory() -> int:
    """Bytes of memory that are available, to each of the processes that a launcher started on this machine."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**31


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _check_sum(root: nn.Module) -> tuple[int, ...]:
    """Changes with any number of any weight: the sum of their bits, taken for whole numbers, of each."""
    weights = [t.detach() for t in kept_by(root, buffers=True)[0] if t.numel() and not t.is_complex()]
    sums = [t.view(_WHOLE[t.element_size()]).sum(dtype=torch.int32) for t in weights]
    by_device = [torch.stack([s for s in sums if s.device == device]) for device in {s.device for s in sums}]
    return tuple(n for some in by_device for n in some.tolist())


MEMORY = Memory()


def forget() -> None:
    """Drop all that was captured and scored of rows and kept for later calls; they compute it anew."""
    MEMORY.clear()
