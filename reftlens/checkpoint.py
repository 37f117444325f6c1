"""Checkpoints of a training run: one safetensors file, replaced atomically, so that a kill never leaves half of one."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = 1


class CheckpointMismatch(ValueError):
    """The checkpoint on disk belongs to another run."""


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


def write_atomically(path: Path, payload: bytes) -> None:
    """Replace the file at `path` in one step: a reader, or a kill, sees the old content or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none yet.

    Raises:
        CheckpointMismatch: naming the first part of `identity` (settings, data, model, sites) that differs.
    """
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["reftlens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = {"format": FORMAT, **identity}
    for key, value in json.loads(json.dumps(expected)).items():
        if record.get(key) != value:
            was, now = (repr(v)[:160] for v in (record.get(key), value))
            raise CheckpointMismatch(
                f"{path} belongs to another run, its {key} differ: {was} there, {now} here; delete the file or give "
                "another path"
            )
    return Checkpoint(tensors, record)
