"""The checkpoints of a training run: its state after an optimizer step, written to a file and taken up again."""

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from reftlens.bridge.fingerprint import fingerprint
from reftlens.training.checkpoint import Checkpoint, read_checkpoint
from reftlens.training.run import History, Run


@dataclass
class Saver:
    """Writes a run to the file at `path` after every so many steps and at its end; does nothing without a path."""

    run: Run
    path: Path | None
    every: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint has to agree with; read off the model once, as it does not change in a run."""
        run, model = self.run, fingerprint(self.run.model)
        modules = zip(run.reft.items(), run.reft.which, strict=True)
        return {
            "settings": asdict(run.config),
            "data": run.data.fingerprint,
            "validation": None if run.validation is None else run.validation.fingerprint,
            "model": [model.name, model.config, model.weights],
            "sites": [[site.to_dict(), i, module.kind, module.settings()] for (site, module), i in modules],
        }

    def after_step(self) -> None:
        run = self.run
        if self.path is None or not (run.finished or run.done % self.every == 0):
            return
        tensors = {f"reft.{n}": p for n, p in run.reft.state_dict().items()}
        tensors |= {f"best.{n}": p for n, p in run.best.items()}
        for i, state in run.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        Checkpoint(tensors, self.identity | asdict(run.history)).write(self.path)

    def resume(self) -> None:
        """Bring the run to where the file says it was, if there is one.

        Raises:
            CheckpointMismatch: if it belongs to other settings, data, model or sites.
        """
        saved = None if self.path is None else read_checkpoint(self.path, self.identity)
        if saved is None:
            return
        parts: dict[str, dict[str, Tensor]] = {"reft": {}, "best": {}, "optimizer": {}}
        for name, tensor in saved.tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        run, state = self.run, dict[int, dict[str, Tensor]]()
        for name, tensor in parts["optimizer"].items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        run.reft.load_state_dict(parts["reft"])
        run.best = {n: t.to(run.device) for n, t in parts["best"].items()}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})
        record = {f.name: saved.record[f.name] for f in fields(History)}
        run.history = History(**{**record, "evaluations": [(step, loss) for step, loss in record["evaluations"]]})
