"""The work of a search in pieces that do not depend on each other: some candidates, trained and scored together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.protocol import Bridge, Executor
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.errors import TrainingDiverged
from reftlens.scoring.objectives import Objective
from reftlens.selection.metrics import measures
from reftlens.text.batch import Batch
from reftlens.training.checkpoint import read_checkpoint, write_checkpoint
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit_many

_NAME = "reftlens search"
TOGETHER = 96
"""Candidates of a piece of work: so many share each pass, and their number does not depend on who computes them."""


class Outcome(NamedTuple):
    """What became of a candidate."""

    state: dict[str, Tensor]
    """Its parameters; empty where training diverged."""
    measured: Float[Tensor, "measure strength row"]


@dataclass(frozen=True, eq=False)
class Work:
    """Some candidates to train and score, complete in itself, so that another process can do it."""

    load: Callable[[], Bridge]
    train: Batch
    rows: Batch
    """That they are scored on."""
    refts: tuple[ReFT, ...]
    configs: tuple[FitConfig, ...]
    strengths: tuple[float, ...]
    objective: Objective
    batch_size: int
    reuse: Reuse | None


@lru_cache(maxsize=1)
def _loaded(load: Callable[[], Bridge]) -> Bridge:
    return load()


def outcomes_of(work: Work, model: Bridge | None = None) -> list[Outcome]:
    """Train all in shared passes and score them in one; a model is loaded where none is given, in another process."""
    model = _loaded(work.load) if model is None else model
    refts = [reft.clone() for reft in work.refts]
    alive = sorted(_trained(work, model, refts, list(range(len(refts)))))
    plans = [Plan(refts[i], Variant(strength)) for i in alive for strength in work.strengths]
    shape = len(alive), len(work.strengths), len(work.rows)
    measured = torch.zeros(3, *shape, dtype=torch.float64)
    if alive:
        measured = measures(model, work.rows, plans, batch_size=work.batch_size, reuse=work.reuse).view(3, *shape)
    lost = torch.tensor([-1e6, 0.0, 1e6], dtype=torch.float64)[:, None, None].expand(3, *shape[1:])
    states = {i: {name: t.detach().cpu().contiguous() for name, t in refts[i].state_dict().items()} for i in alive}
    every = {i: Outcome(states[i], measured[:, n]) for n, i in enumerate(alive)}
    return [every.get(i, Outcome({}, lost)) for i in range(len(refts))]


def _trained(work: Work, model: Bridge, refts: list[ReFT], some: Sequence[int]) -> list[int]:
    """Those that did not diverge: where one of several does, they are trained anew in two halves."""
    for i in some:
        refts[i] = work.refts[i].clone()
    named = {str(i): refts[i] for i in some}
    configs = {str(i): work.configs[i] for i in some}
    settings: dict[str, Any] = {"objective": work.objective, "reuse": work.reuse or False, "progress": False}
    try:
        fit_many(named, model, work.train, configs, **settings)
    except TrainingDiverged:
        half = len(some) // 2
        return [i for part in (some[:half], some[half:]) for i in _trained(work, model, refts, part)] if half else []
    return list(some)


class Journal:
    """The outcomes of each piece of work in one file, which is replaced after each; without a path, nowhere.

    Raises:
        CheckpointMismatch: where the file belongs to another search; the message names what differs.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self._tensors: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if path is not None and path.exists():
            self._tensors, record = read_checkpoint(path, _NAME, identity, of="search", maker="search")
            self._counts = record["counts"]

    def get(self, key: str) -> list[Outcome] | None:
        """What a piece of work gave, where it was done before."""
        if key not in self._counts:
            return None
        outcomes = []
        for n in range(self._counts[key]):
            begin = f"{key}/{n}/"
            state = {name.removeprefix(f"{begin}s."): t for name, t in self._tensors.items() if name.startswith(begin)}
            measured = state.pop(f"{begin}measured")
            outcomes.append(Outcome(state, measured))
        return outcomes

    def put(self, key: str, outcomes: Sequence[Outcome]) -> None:
        """Note what a piece of work gave."""
        if self.path is None:
            return
        for n, outcome in enumerate(outcomes):
            self._tensors |= {f"{key}/{n}/s.{name}": tensor for name, tensor in outcome.state.items()}
            self._tensors[f"{key}/{n}/measured"] = outcome.measured.contiguous()
        self._counts[key] = len(outcomes)
        write_checkpoint(self.path, _NAME, self._tensors, self.identity | {"counts": self._counts})


def done(
    works: Sequence[Work], key: str, model: Bridge, journal: Journal, executor: Executor | None
) -> Iterator[list[Outcome]]:
    """The outcomes of each, in order; what the journal holds is not computed again."""
    names = [f"{key}/{n}" for n in range(len(works))]
    known = [journal.get(name) for name in names]
    tasks = [
        executor.submit(outcomes_of, work) if executor is not None and outcomes is None else None
        for work, outcomes in zip(works, known, strict=True)
    ]
    for name, work, outcomes, task in zip(names, works, known, tasks, strict=True):
        if outcomes is None:
            outcomes = outcomes_of(work, model) if task is None else task.result()
            journal.put(name, outcomes)
        yield outcomes
