"""What was captured of a data set, stored where there is room for it, and captured anew when the model changes.

That is on the device, in host memory, in a file on disk, or nowhere. The file is unlinked as soon as it is mapped: it
is gone when the process ends, however it ends, and no later run can take it for its own.
"""

import os
import shutil
import tempfile
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import device_of
from reftlens.bridge.weights import version_of, weights_versions
from reftlens.cone.capture import Capture
from reftlens.cone.captured import Captured, Pool, packed, together
from reftlens.cone.extension import extended
from reftlens.cone.memory import MEMORY, Cones, Known, free_memory
from reftlens.cone.reuse import Reuse
from reftlens.cone.spans import Span

Tier = Literal["on the device", "in host memory", "on disk", "nowhere, recomputed"]


@dataclass
class RowStore:
    """Captured rows, by their number; rows that are used once (`uses` of 1 or less) are kept in the memory alone."""

    capture: Capture
    reuse: Reuse
    uses: float
    progress: bool
    tier: Tier = field(default="nowhere, recomputed", init=False)
    size: int = field(default=0, init=False)
    recalled: int = field(default=0, init=False)
    """Rows that an earlier call captured."""
    extended: int = field(default=0, init=False)
    """Those of them from which more was computed."""
    _rows: dict[int, Captured] = field(default_factory=dict, init=False, repr=False)
    _state: tuple[int, ...] = field(default=(), init=False, repr=False)
    _keys: list[Hashable] = field(default_factory=list, init=False, repr=False)
    """Of each row, for the memory: the model as it is now, what else decides, and the row's tokens."""

    def __str__(self) -> str:
        size = f" ({self.size / 1e6:.1f} MB)" if self.size else ""
        recalled = f", {self.recalled} rows of it from earlier calls" if self.recalled else ""
        return f"{self.tier}{size}{recalled}" + (f", {self.extended} of them extended" if self.extended else "")

    def prepare(self) -> None:
        """Capture all rows, if they are to be stored and this was not done before for the model as it is now."""
        data = self.capture.data
        state = (*weights_versions(self.capture.body.model), *version_of(data.tokens), *version_of(data.role))
        if self._state == state:
            return
        self._rows, self._state, self.recalled, self.extended = {}, state, 0, 0
        if MEMORY.budget(self.reuse):
            model, setting = MEMORY.state(self.capture.body.model), self.capture.setting
            rows, lengths = data.tokens.cpu().numpy(), data.attention_mask.sum(dim=1).tolist()
            self._keys = [(model, setting, row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
        if self.uses > 1:
            self._store()

    def _store(self) -> None:
        """Capture all rows, always in the same order: the bits of a training run do not depend on earlier calls."""
        chunks = captured_together(self.capture.cones)
        order = [row for chunk in chunks for row in chunk]
        shapes = self._shapes(max(order, key=lambda r: self.capture.latest[r]))
        need, device = sum(map(padded_bytes, shapes.tensors())), device_of(self.capture.body.model)
        self.tier = choose_tier(need, device, self.reuse.memory, self.reuse.disk)
        if self.tier == "nowhere, recomputed":
            return
        shelf, capture = Shelf(self.tier, device, need), self.capture
        pool, cone, before, shared = shapes.rebuilt([shelf.room(t) for t in shapes.tensors()]), 0, 0, list[Captured]()
        for number in range(len(capture.beginnings)):
            shared += pool.write([capture.beginning(number)], cone, before)
            before = shared[-1].before.stop
        with tqdm(total=len(order), desc="capture", unit="example", disable=not self.progress, leave=False) as bar:
            for rows in chunks:
                for row, captured in zip(rows, pool.write(capture(rows), cone, before), strict=True):
                    beginning = shared[capture.of_row[row]] if row in capture.of_row else None
                    self._rows[row] = replace(captured, beginning=beginning)
                    cone, before = captured.cone.stop, captured.before.stop
                bar.update(len(rows))
        if self.tier == "on the device":
            self._remember(order)
        self.size = shelf.used
        capture.forget()

    def fetch(self, rows: Sequence[int]) -> list[Captured]:
        """What was captured of these rows; those that are not stored are captured now, each once."""
        if any(r not in self._rows for r in rows) and self.tier == "nowhere, recomputed":
            self._rows = {r: c for r, c in self._rows.items() if r in rows}
        self._recall(rows)
        missing = sorted({r for r in rows if r not in self._rows})
        if missing:
            self._rows |= dict(zip(missing, packed(self.capture(missing)), strict=True))
            self.capture.forget()
            if self.uses <= 1:
                self._remember(missing)
        self._rows |= dict(zip(rows, together([self._rows[r] for r in rows]), strict=True))
        return [self._rows[r] for r in rows]

    def _cones(self, row: int) -> Cones:
        return Cones(self.capture.firsts, self.capture.cones[row], self.capture.latest[row])

    def _recall(self, rows: Iterable[int]) -> None:
        """Take what an earlier call captured, and compute from it what is missing."""
        near = dict[tuple[int, ...], dict[int, Known]]()
        for row in rows if MEMORY.budget(self.reuse) and self.uses <= 1 else ():
            known = None if row in self._rows else MEMORY.get(self._keys[row], self._cones(row))
            if known is not None and known.cones.hold(self._cones(row)):
                self._take(row, known)
            elif known is not None and not self.reuse.half:
                near.setdefault(known.cones.firsts, {})[row] = known
        for some in near.values():
            for row, known in extended(self.capture, some).items():
                MEMORY.put(self._keys[row], known, MEMORY.budget(self.reuse))
                self._take(row, known)
                self.extended += 1

    def _take(self, row: int, known: Known) -> None:
        self._rows[row], self.capture.returns = known.part(self._cones(row)), known.returns
        self.recalled += 1

    def _remember(self, rows: Iterable[int]) -> None:
        """Leave what was captured to later calls."""
        for row in rows if (budget := MEMORY.budget(self.reuse)) else ():
            known = Known(self._cones(row), self._rows[row], self.capture.returns)
            MEMORY.put(self._keys[row], known, budget)

    def _shapes(self, sampled: int) -> Pool:
        """A pool of the size that all rows need, without any content; of one row it is seen how wide a token is."""
        (sample,), cones = self.capture([sampled]), self.capture.cones
        shared = self.capture.beginnings
        before = sum(self.capture.latest) - sum(b.length * (len(b.rows) - 1) for b in shared)
        sizes = [sum(cone.length for cone in cones)] * len(sample.pool.streams)
        every = sample.pool.tensors()
        sizes += [before] * (len(every) - len(sizes))
        rooms = [t.new_empty(n, t.shape[1], device="meta") for n, t in zip(sizes, every, strict=True)]
        return sample.pool.rebuilt(rooms)


def captured_together(cones: Sequence[Span], *, most: int = 4096) -> list[list[int]]:
    """All rows, the shorter ones first, in parts of up to `most` tokens with their padding."""
    chunks: list[list[int]] = []
    for row in sorted(range(len(cones)), key=lambda r: (cones[r].stop, r)):
        if not chunks or (len(chunks[-1]) + 1) * cones[row].stop > most:
            chunks.append([])
        chunks[-1].append(row)
    return chunks


def choose_tier(need: int, device: torch.device, memory: int | None = None, disk: int | None = None) -> Tier:
    """The first place with room for `need` bytes: device, host, disk; else nowhere.

    `memory` and `disk` are budgets in bytes; by default, half of what is free now.
    """
    if device.type == "cuda" and need <= (torch.cuda.mem_get_info(device)[0] // 2 if memory is None else memory):
        return "on the device"
    if need <= (free_memory() // 2 if memory is None else memory):
        return "in host memory" if device.type == "cuda" else "on the device"
    room = shutil.disk_usage(tempfile.gettempdir()).free // 2 if disk is None else disk
    return "on disk" if need <= room else "nowhere, recomputed"


def padded_bytes(tensor: Tensor) -> int:
    """Bytes that a shelf takes for a tensor: every one begins at a multiple of eight."""
    return -(-tensor.numel() * tensor.element_size() // 8) * 8


@dataclass
class Shelf:
    """Stores tensors on one tier; `capacity` bytes are set aside at once where the tier is the disk."""

    tier: Tier
    device: torch.device
    capacity: int
    used: int = field(default=0, init=False)
    _file: Tensor | None = field(default=None, init=False, repr=False)

    def room(self, like: Tensor) -> Tensor:
        """A tensor of this shape and dtype on this tier, for what will be written to it."""
        self.used += padded_bytes(like)
        if self.tier == "on disk":
            return self._room_for(like)
        where = self.device if self.tier == "on the device" else torch.device("cpu")
        pinned = where.type == "cpu" and self.device.type == "cuda"
        return torch.empty(like.shape, dtype=like.dtype, device=where, pin_memory=pinned)

    def _room_for(self, tensor: Tensor) -> Tensor:
        if self._file is None:
            handle, name = tempfile.mkstemp(prefix="reftlens-")
            try:
                self._file = torch.from_file(name, shared=True, size=self.capacity, dtype=torch.uint8)
            finally:
                os.close(handle)
                os.unlink(name)
        if self.used > self.capacity:
            raise ValueError(f"{self.used} bytes do not fit into the {self.capacity} set aside")
        begin = self.used - padded_bytes(tensor)
        piece = self._file[begin : begin + tensor.numel() * tensor.element_size()]
        return piece.view(tensor.dtype).view(tensor.shape)
