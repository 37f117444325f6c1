"""Checkpoints of a training run: its state after an optimizer step, written to one file and taken up again.

The file is replaced atomically, so that a kill never leaves half of one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reftlens.bridge.fingerprint import fingerprint
from reftlens.editing.reft import ReFT
from reftlens.errors import CheckpointMismatch
from reftlens.files import digest, write_atomically
from reftlens.interventions.base import stored_settings
from reftlens.training.run import History, Run

FORMAT = 2


@dataclass
class Checkpoint:
    """The file at `path`, written after every so many steps of a run and at its end; without a path, nothing."""

    run: Run
    path: Path | None
    every: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the file has to agree with; read off the model once, as it does not change in a run."""
        run, model = self.run, fingerprint(self.run.model)
        modules = zip(run.reft.items(), run.reft.which, strict=True)
        return {
            "settings": asdict(run.config),
            "objective": run.objective.name,
            "data": run.data.fingerprint,
            "validation": None if run.validation is None else run.validation.fingerprint,
            "model": [model.name, model.config, model.weights],
            "sites": [[site.to_dict(), i, module.kind, stored_settings(module)] for (site, module), i in modules],
            "frozen tensors": digest(frozen_tensors(run.reft)),
        }

    def after_step(self) -> None:
        """Write the file, if it is time to."""
        run = self.run
        if self.path is None or run.processes.number or not (run.finished or run.done % self.every == 0):
            return
        tensors = {f"reft.{n}": p for n, p in run.reft.state_dict().items()}
        tensors |= {f"best.{n}": p for n, p in run.best.items()}
        for i, state in run.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        write_checkpoint(self.path, "reftlens", tensors, self.identity | asdict(run.history))

    def resume(self) -> None:
        """Bring the run to where the file says it was, if there is one.

        Raises:
            CheckpointMismatch: naming the first part of the run (settings, objective, data, model, sites, frozen
                tensors) that differs.
        """
        if self.path is None or not self.path.exists():
            return
        saved, record = read_checkpoint(self.path, "reftlens", self.identity, of="run", maker="fit")
        tensors: dict[str, dict[str, Tensor]] = {"reft": {}, "best": {}, "optimizer": {}}
        for name, tensor in saved.items():
            part, rest = name.split(".", 1)
            tensors[part][rest] = tensor
        run, state = self.run, dict[int, dict[str, Tensor]]()
        for name, tensor in tensors["optimizer"].items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        run.reft.load_state_dict(tensors["reft"])
        run.best = {n: t.to(run.device) for n, t in tensors["best"].items()}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})
        history = {f.name: record[f.name] for f in fields(History)}
        run.history = History(**{**history, "evaluations": [(step, loss) for step, loss in history["evaluations"]]})


def frozen_tensors(reft: ReFT) -> dict[str, Tensor]:
    """What an edit was given and no training changes, such as the direction of a gate: its settings do not tell it."""
    trained = {name for name, parameter in reft.named_parameters() if parameter.requires_grad}
    kept = {name: tensor for name, tensor in reft.state_dict().items() if name not in trained}
    copy = reft.clone()
    with torch.random.fork_rng(devices=[]):
        for progress in (0.0, 1.0):
            for module in copy.distinct:
                module.anneal(progress)
            kept = {name: t for name, t in copy.state_dict().items() if name in kept and torch.equal(t, kept[name])}
    return kept


def write_checkpoint(path: Path, name: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Tensors, and the record under a name in their metadata, for `read_checkpoint`."""
    flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    told = json.dumps({"format": FORMAT} | record)
    write_atomically(path, safetensors.torch.save(flat, metadata={name: told}))


def read_checkpoint(
    path: Path, name: str, identity: dict[str, Any], *, of: str, maker: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a file, and the record that its metadata hold under a name.

    Raises:
        CheckpointMismatch: for another file than `maker` writes; naming the first part of `identity` that is another
            in the record, which is then of another run, or whatever it is `of`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()[name])
            tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, OSError) as error:
        raise CheckpointMismatch(f"{path} is no checkpoint that {maker} wrote: {error}") from None
    if record.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"{path} was written by another version of reftlens, in format {record.get('format')}, and this one goes "
            f"on from format {FORMAT}: delete the file or give another path"
        )
    for key, value in json.loads(json.dumps(identity)).items():
        if record.get(key) != value:
            raise CheckpointMismatch(
                f"{path} belongs to another {of}, its {key} differ: {_difference(record.get(key), value)}; "
                "delete the file or give another path"
            )
    return tensors, record


def _difference(was: Any, now: Any) -> str:
    """What differs, of two tables only the entries that do."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
        return ", ".join(f"{k} {_difference(was.get(k), now.get(k))}" for k in keys[:4])
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return ", ".join(_difference(a, b) for a, b in zip(was, now, strict=True) if a != b)
    return f"{str(was)[:160]} there, {str(now)[:160]} here"
