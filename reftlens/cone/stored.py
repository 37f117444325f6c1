"""What a `RowStore` would capture and keep, and where, told before anything is captured."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from reftlens.cone.light_cone import Cone
from reftlens.cone.size import Size
from reftlens.cone.store import captured_together, choose_tier
from reftlens.cone.work import Shape, Work, capture_work


@dataclass
class Stored:
    """What is captured of the rows of `cone`, and when; a number of it takes `width` bytes."""

    cone: Cone
    size: Size
    width: int
    _rows: set[int] = field(default_factory=set, init=False)
    """Those that are there."""
    _read: set[int] = field(default_factory=set, init=False)
    """Beginnings that are there."""

    def prepare(self, device: torch.device) -> Work:
        """All rows, where they are used more than once and there is room for them; before, one to see how large."""
        store = self.cone.store
        if store.uses <= 1:
            return Work()
        chunks, latest = captured_together(self.cone.spans), self.cone.capture.latest
        order, need = [row for chunk in chunks for row in chunk], self._bytes()
        reuse, absent = self.cone.reuse, device.type == "cuda" and not torch.cuda.is_available()
        first = absent and reuse.memory is None  # on a GPU that is not here, the first that `RowStore` would try
        store.tier = "on the device" if first else choose_tier(need, device, reuse.memory, reuse.disk)
        work = self._captured([max(order, key=lambda row: latest[row])])
        if store.tier == "nowhere, recomputed":
            return work
        work = sum(map(self._captured, chunks), work)
        store.size, self._rows, self._read = need, set(order), set()
        return work

    def fetch(self, rows: Sequence[int]) -> Work:
        """Those of a micro-batch that are not there."""
        missing = sorted({*rows} - self._rows)
        if not missing:
            return Work()
        self._rows = {*rows} if self.cone.store.tier == "nowhere, recomputed" else self._rows | {*rows}
        work, self._read = self._captured(missing), set()
        return work

    def _captured(self, rows: Sequence[int]) -> Work:
        capture, work = self.cone.capture, Work()
        for number in sorted({capture.of_row[row] for row in rows if row in capture.of_row} - self._read):
            self._read.add(number)
            length = capture.beginnings[number].length  # at every block, the last of which only starts
            work += Shape(1, length, length, length, range(self.size.depth), most=0).work(self.size)
        return work + capture_work(self.size, self.cone, rows)

    def _bytes(self) -> int:
        """Streams of the cones, keys and values before them, those of a beginning once."""
        capture, blocks = self.cone.capture, self.size.depth - self.cone.first
        streams = len({*capture.firsts} - {0}) * sum(span.length for span in self.cone.spans)
        repeated = sum((len(shared.rows) - 1) * shared.length for shared in capture.beginnings)
        before = (sum(capture.latest) - repeated) * blocks * self.size.stored
        return (streams * self.size.d + before) * self.width
