"""Where captured tensors are kept: on the device, in host memory, in a file on disk, or nowhere.

The file is unlinked as soon as it is mapped: it is gone when the process ends, however it ends, and no later run
can take it for its own.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Tier = Literal["device", "host", "disk", "nowhere"]


def choose_tier(need: int, device: torch.device, memory: int | None = None, disk: int | None = None) -> Tier:
    """The first place with room for `need` bytes: device, host, disk; else nowhere.

    `memory` and `disk` are budgets in bytes; by default, half of what is free now.
    """
    if device.type == "cuda" and need <= (torch.cuda.mem_get_info(device)[0] // 2 if memory is None else memory):
        return "device"
    if need <= (_free_memory() // 2 if memory is None else memory):
        return "host" if device.type == "cuda" else "device"
    room = shutil.disk_usage(tempfile.gettempdir()).free // 2 if disk is None else disk
    return "disk" if need <= room else "nowhere"


def _free_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**31


def padded_bytes(tensor: Tensor) -> int:
    """Bytes that a shelf takes for a tensor: every one begins at a multiple of eight."""
    return -(-tensor.numel() * tensor.element_size() // 8) * 8


@dataclass
class Shelf:
    """Keeps tensors on one tier; `capacity` bytes are set aside at once where the tier is the disk."""

    tier: Tier
    device: torch.device
    capacity: int
    used: int = field(default=0, init=False)
    _file: Tensor | None = field(default=None, init=False, repr=False)

    def put(self, tensor: Tensor) -> Tensor:
        """The same values, on this tier; keeps nothing else of `tensor` alive."""
        self.used += padded_bytes(tensor)
        if self.tier == "disk":
            return self._room_for(tensor).copy_(tensor)
        where = self.device if self.tier == "device" else torch.device("cpu")
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=where, pin_memory=self._pinned(where))
        return kept.copy_(tensor)

    def _pinned(self, where: torch.device) -> bool:
        return where.type == "cpu" and self.device.type == "cuda"

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
