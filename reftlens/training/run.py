"""A training run in progress, one optimizer step at a time; its state after each step is all that it needs to go on."""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from reftlens.bridge.protocol import Bridge, device_of
from reftlens.bridge.source import source_of
from reftlens.cone.plans import Job, Scored
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import ReFT
from reftlens.files import digest
from reftlens.interventions.subspace import Frame
from reftlens.scoring.criterion import Criterion
from reftlens.scoring.evaluation import summed_loss
from reftlens.scoring.objectives import Objective
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig, derived_seed
from reftlens.training.drawing import step_jobs
from reftlens.training.failure import diverged
from reftlens.training.processes import ALONE, Processes
from reftlens.training.result import FitResult, encoding_of, library_versions


@dataclass(frozen=True)
class Step:
    """What an `on_step` callback sees after each optimizer step."""

    step: int
    """Optimizer steps done, from 1."""
    loss: float
    learning_rate: float
    gradient_norm: float
    reft: ReFT


def decayed(reft: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that weight decay acts on: all but the frames, whose scale means nothing."""
    frames = {id(f.matrix) for f in reft.modules() if isinstance(f, Frame)}
    return [p for p in reft.parameters() if p.requires_grad and id(p) not in frames]


def seed_step(config: FitConfig, step: int, device: torch.device, process: int = 0) -> None:
    """Random numbers of optimizer step `step` (from 0), such as those of dropout: a function of these numbers only."""
    # torch.manual_seed also notes its stack for every kind of device that is not in use: milliseconds
    seed_all = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    seed_all(derived_seed(config.seed, f"step of process {process}" if process else "step", step))


@dataclass
class History:
    """What was measured so far; `losses`, `rates` and `norms` have an entry for each optimizer step."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """`(steps done, mean loss per target)`."""
    seconds: float = 0.0
    stopped_early: bool = False

    def take(self, optimizer: torch.optim.Optimizer, loss: float, norm: float, rate: float) -> None:
        """Take an optimizer step at this learning rate, and note what was measured of it."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.losses.append(loss)
        self.norms.append(norm)
        self.rates.append(rate)


@dataclass
class Run:
    """A training run in progress."""

    reft: ReFT
    model: Bridge
    data: Batch
    config: FitConfig
    validation: Batch | None
    objective: Objective
    number: int = 0
    """Of its first plan among those of the scorers, of the data and of the validation set."""
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.device = device_of(self.model)
        self._losses, self.targets = list[Tensor](), 0
        self.modules = self.reft.distinct
        self.parameters = [p for p in self.reft.parameters() if p.requires_grad]
        with_decay = decayed(self.reft)
        rest = [p for p in self.parameters if all(p is not q for q in with_decay)]
        groups = [{"params": with_decay, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.config.lr)

    @property
    def done(self) -> int:
        return len(self.history.losses)

    @property
    def total(self) -> int:
        return self.config.total_steps(self.units)

    @property
    def units(self) -> int:
        """Groups of rows that belong together, which data order and batch size are of; mostly single rows."""
        return len(self.data) // self.objective.group

    def judge_by(self, scorer: Scorer, validator: Scorer | None, like: "Run | None" = None) -> None:
        """Make the objective ready for the data that these score, before the first step, as it is for another run."""
        scorers, size = [scorer] if validator is None else [scorer, validator], self.config.batch_size
        known = [Criterion(self.objective, each, size) for each in scorers] if like is None else like.criteria
        self.criteria = [criterion.numbered(self.number) for criterion in known]

    @property
    def finished(self) -> bool:
        return self.done >= self.total or self.history.stopped_early

    # -- one optimizer step ------------------------------------------------------------------------------

    def open_step(self) -> list[list[Job]]:
        """Make ready for the next optimizer step; its jobs here, by micro-batch: a function of seed and step only."""
        seed_step(self.config, self.done, self.device, self.processes.number)
        self.optimizer.zero_grad(set_to_none=True)
        for module in self.modules:
            module.anneal(self.done / max(1, self.total - 1))
        self._losses, self.targets = [], 0
        jobs = step_jobs(self.config, self.objective, self.done, len(self.data), self.number)
        return self.processes.share(jobs, self.objective.per_target)

    def loss_of(self, scored: Scored) -> Tensor:
        """Sum of the losses of a micro-batch; the step's mean is over all targets, whatever micro-batch they are in."""
        with self.autocast():
            losses = self.criteria[0](scored)
        value = losses.sum()
        self._losses.append(value.detach())
        self.targets += losses.numel()
        return value

    def measured(self) -> Float[Tensor, " parts_and_norm"]:
        """The losses gathered since `open_step`, and the norm of their mean's gradient, which is clipped now."""
        losses, self.targets = self.processes.gathered(self.parameters, self._losses, self.targets)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self.targets
        for module in self.modules:
            penalty = module.penalty()
            if penalty is not None:
                penalty.backward()
        norm = clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        return torch.cat([losses, norm[None].to(self.device)])  # in the wider of their dtypes

    def close_step(self, loss: float, norm: float, validator: Scorer | None) -> Step:
        """Take the optimizer step with the gradients that were `measured`; `validator` scores `validation`."""
        rate = self.config.learning_rate(self.done, self.total)
        self.history.take(self.optimizer, loss, norm, rate)
        if validator is not None:
            self._validate(validator)
        return Step(self.done, loss, rate, norm, self.reft)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # -- validation --------------------------------------------------------------------------------------

    def _validate(self, validator: Scorer) -> None:
        every = self.config.eval_every or self.config.steps_per_epoch(self.units)
        if self.done % every and self.done < self.total:
            return
        own, size = self.processes.part(self.objective.per_target), self.config.batch_size
        sums = summed_loss(validator, self.criteria[1], batch_size=size, part=own)
        total, targets = self.processes.totals(sums, self.device)
        loss = total / targets
        evaluations = self.history.evaluations
        if not evaluations or loss < min(value for _, value in evaluations):
            self.best = {n: p.detach().clone() for n, p in self.reft.named_parameters()}
        evaluations.append((self.done, loss))
        best = min(range(len(evaluations)), key=lambda i: evaluations[i][1])
        waited = len(evaluations) - 1 - best
        self.history.stopped_early = self.config.patience is not None and waited >= self.config.patience

    # -- the end -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Take the best weights where `patience` asks for them, and settle the frames."""
        if self.config.patience is not None and self.best:
            self.reft.load_state_dict(self.reft.state_dict() | self.best)
        self.reft.settle()
        self.reft.chat = self.data.template and self.data.template.chat

    def result(self, computation: str) -> FitResult:
        history = self.history
        return FitResult(
            config=self.config,
            losses=tuple(history.losses),
            learning_rates=tuple(history.rates),
            gradient_norms=tuple(history.norms),
            validation=tuple(history.evaluations),
            best_step=min(history.evaluations, key=lambda e: e[1])[0] if history.evaluations else None,
            stopped_early=history.stopped_early,
            seconds=history.seconds,
            data_hash=self.data.fingerprint,
            model_name=self.model.cfg.model_name,
            device=str(self.device),
            versions=library_versions(),
            computation=computation,
            source=source_of(self.model.original_model),
            encoding=encoding_of(self.data),
            objective=self.objective.name,
            weights=digest(self.reft.interventions.state_dict()),
        )


def advance(runs: Sequence[Run], scorer: Scorer, validator: Scorer | None) -> list[Step]:
    """One optimizer step of every run, scored together; each run's `number` is its plan at either scorer."""
    began = time.perf_counter()
    micro_batches = [run.open_step() for run in runs]
    owners = {
        job.plan: run for run, batches in zip(runs, micro_batches, strict=True) for jobs in batches for job in jobs
    }
    for turn in range(max(map(len, micro_batches))):
        jobs = [job for batches in micro_batches if turn < len(batches) for job in batches[turn]]
        whole = not all(run.objective.per_target for run in runs)
        with closing(
            scorer.score(jobs, whole=whole)
        ) as groups:  # an error of the objective leaves nothing on the model
            for group in groups:
                value = torch.stack([owners[scored.job.plan].loss_of(scored) for scored in group]).sum()
                if value.requires_grad:  # not so where no site chooses a token in these rows
                    value.backward()
    measured = [run.measured() for run in runs]
    on_host = torch.cat(measured).to("cpu").split([len(each) for each in measured])  # waits for the device, once
    steps = []
    for run, batches, (*losses, norm) in zip(runs, micro_batches, (each.tolist() for each in on_host), strict=True):
        loss = sum(losses) / run.targets
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(run.reft, loss, scorer, [job for jobs in batches for job in jobs], run.done + 1)
        steps.append(run.close_step(loss, norm, validator))
    for run in runs:
        run.history.seconds += (time.perf_counter() - began) / len(runs)
    return steps
