"""What training costs: time, and how far memory grows."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from reftlens.experiments.methods.subjects import Subject
from reftlens.training.run import History

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Of what ran inside a `measured` block."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    """How far memory grew over what was held when the block began, at its largest: on CUDA what torch allocated, on
    Linux what the process held in RAM; None elsewhere."""


@dataclass(frozen=True)
class Measured:
    """What a fit took and how it went."""

    parameters: int = 0
    """Numbers that were trained, tied ones once."""
    percent: float = 0.0
    """Of the parameters of the model."""
    losses: tuple[float, ...] = ()
    """Mean training loss per target at each optimizer step."""
    validation: tuple[tuple[float, float], ...] = ()
    """`(steps done, mean loss per target)`."""
    seconds_per_step: float = 0.0
    """Wall time of the whole fit, with what it captures first and its evaluations, over the steps it took; loading the
    model is not in it."""
    peak_bytes: int | None = None
    """How far memory grew over what was held before training, model included: see `costs.measured`."""


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Wall time and memory of the block. What is held before it, such as the model's weights, is not counted."""
    cost = Cost()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _held()
    began = time.perf_counter()
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - began
        after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _field("VmHWM")
        cost.peak_bytes = None if before is None or after is None else max(0, after - before)


def measures(subject: Subject, count: int, history: History, cost: Cost, taken: int) -> Measured:
    """What a fit of `count` numbers took; `cost` is of the steps that it has `taken`, without those of a checkpoint."""
    return Measured(
        parameters=count,
        percent=100 * count / subject.parameters,
        losses=tuple(history.losses),
        validation=tuple(history.evaluations),
        seconds_per_step=cost.seconds / taken if taken else history.seconds / max(1, len(history.losses)),
        peak_bytes=cost.peak_bytes,
    )


def _held() -> int | None:
    """Bytes that the process holds in RAM, once what is free is given back; its peak is counted from here."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _field("VmRSS")


def _field(name: str) -> int | None:
    try:
        lines = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    except OSError:
        return None
    return int(lines[0].split()[1]) * 1024 if lines else None
