"""Checkpoints of a training run: one safetensors file, replaced atomically, so that a kill never leaves half of one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reftlens.errors import CheckpointMismatch
from reftlens.files import write_atomically

FORMAT = 1


@dataclass
class Checkpoint:
    """Everything that a run needs to go on: tensors, and a record of plain values."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
        payload = save(flat, metadata={"reftlens": json.dumps({"format": FORMAT, **self.record})})
        write_atomically(path, payload)


def read_checkpoint(path: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none yet.

    Raises:
        CheckpointMismatch: naming the first part of `identity` (settings, data, model, sites) that differs.
    """
    if not path.exists():
        return None
    if path.is_dir():
        raise CheckpointMismatch(f"{path} is a folder, expected a file: checkpoint='{path}/run.pt', for example")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["reftlens"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError) as error:
        raise CheckpointMismatch(f"{path} is no checkpoint that fit wrote: {error}") from None
    expected = {"format": FORMAT, **identity}
    for key, value in json.loads(json.dumps(expected)).items():
        if record.get(key) != value:
            raise CheckpointMismatch(
                f"{path} belongs to another run, its {key} differ: {_difference(record.get(key), value)}; delete the "
                "file or give another path"
            )
    return Checkpoint(tensors, record)


def _difference(was: Any, now: Any) -> str:
    """What differs, of two tables only the entries that do."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
        return ", ".join(f"{k} {_difference(was.get(k), now.get(k))}" for k in keys[:4])
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return ", ".join(_difference(a, b) for a, b in zip(was, now, strict=True) if a != b)
    return f"{str(was)[:160]} there, {str(now)[:160]} here"
