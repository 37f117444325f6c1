"""What was captured of a data set, kept where there is room for it, and captured anew when the model changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from reftlens.model import Bridge, device_of, version_of, weights_state
from reftlens.prefix import Capture, Captured
from reftlens.reuse import Reuse
from reftlens.shelf import Shelf, Tier, choose_tier, padded_bytes

_WHERE = {"device": "on the device", "host": "in host memory", "disk": "on disk", "nowhere": "nowhere, recomputed"}


@dataclass
class Kept:
    """Captured rows, by their number; rows that are used once (`uses` of 1 or less) are not kept."""

    model: Bridge
    capture: Capture
    reuse: Reuse
    uses: float
    autocast: Callable[[], AbstractContextManager[Any]]
    progress: bool
    tier: Tier = field(default="nowhere", init=False)
    size: int = field(default=0, init=False)
    _rows: dict[int, Captured] = field(default_factory=dict, init=False, repr=False)
    _state: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __str__(self) -> str:
        return _WHERE[self.tier] + (f" ({self.size / 1e6:.1f} MB)" if self.tier != "nowhere" else "")

    def prepare(self) -> None:
        """Capture all rows, if they are to be kept and this was not done before for the model as it is now."""
        data = self.capture.data
        state = (*weights_state(self.model), *version_of(data.tokens), *version_of(data.role))
        if self._state == state:
            return
        self._rows, self._state = {}, state
        if self.uses <= 1:
            return
        cones = self.capture.cones
        order = sorted(range(len(data)), key=lambda r: (cones[r].stop, r))
        need = self._bytes_needed(max(order, key=lambda r: self.capture.latest[r]))
        self.tier = choose_tier(need, device_of(self.model), self.reuse.memory, self.reuse.disk)
        if self.tier == "nowhere":
            return
        shelf = Shelf(self.tier, device_of(self.model), need)
        with tqdm(total=len(order), desc="capture", unit="example", disable=not self.progress, leave=False) as bar:
            for rows in _chunks(order, [c.stop for c in cones], most=4096):
                for row, captured in zip(rows, self._captured(rows), strict=True):
                    self._rows[row] = captured.rebuilt([shelf.put(t) for t in captured.tensors()])
                bar.update(len(rows))
        self.size = shelf.used

    def fetch(self, rows: Sequence[int]) -> list[Captured]:
        """What was captured of these rows; those that are not kept are captured now, each once."""
        missing = sorted({r for r in rows if r not in self._rows})
        if missing:
            if self.tier == "nowhere":
                self._rows = {r: c for r, c in self._rows.items() if r in rows}
            self._rows |= dict(zip(missing, self._captured(missing), strict=True))
        return [self._rows[r] for r in rows]

    def forget(self) -> None:
        self._rows, self._state = {}, ()

    def _bytes_needed(self, sampled: int) -> int:
        """An estimate from one row: bytes per token of the cone, and per token before it; a little is added."""
        (sample,) = self._captured([sampled])
        cones, latest = self.capture.cones, self.capture.latest
        stream = sum(map(padded_bytes, sample.streams.values())) / max(1, cones[sampled].length)
        before = sum(map(padded_bytes, (*sample.keys, *sample.values))) / max(1, latest[sampled])
        fixed = 8 * len(sample.tensors())
        need = sum(stream * c.length + before * n + fixed for c, n in zip(cones, latest, strict=True))
        return int(need) + 4096

    def _captured(self, rows: Sequence[int]) -> list[Captured]:
        with self.autocast():
            found = self.capture(rows)
        if self.reuse.half:
            return [c.rebuilt([t.to(torch.bfloat16) for t in c.tensors()]) for c in found]
        return found


def _chunks(order: Sequence[int], lengths: Sequence[int], *, most: int) -> Iterator[list[int]]:
    """Consecutive rows together, up to `most` tokens with their padding; always the same for the same data."""
    chunk: list[int] = []
    for row in order:
        if chunk and (len(chunk) + 1) * max(lengths[r] for r in (*chunk, row)) > most:
            yield chunk
            chunk = []
        chunk.append(row)
    yield chunk
