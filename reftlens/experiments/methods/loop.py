"""AdamW on parameters of any module, with the steps that `rl.fit` takes: the same rows, order and rates.

For what is no `ReFT`: adapters of `peft`, biases, heads. Everything is computed at each step.
"""

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from reftlens.bridge.protocol import gradients_on
from reftlens.cone.spans import by_length
from reftlens.editing.reft import training_mode
from reftlens.errors import TrainingDiverged
from reftlens.files import destination
from reftlens.scoring.objectives import cross_entropy, per_target
from reftlens.text.batch import Batch
from reftlens.training.checkpoint import read_checkpoint, write_checkpoint
from reftlens.training.config import FitConfig
from reftlens.training.run import History, decayed, seed_step

Forward = Callable[[Any, Batch], Tensor]
"""`(module, batch)` → what a loss is computed of: logits at the targets, hidden states, whatever it is."""
Losses = Callable[[Tensor, Batch], Tensor]
"""`(what the module gave, batch)` → losses in one dimension, whose mean over an optimizer step is minimised.

It sees whole micro-batches; or rows of similar length, in less time, if it says `per_target = True`, as an objective.
"""


def target_logits(model: Any, batch: Batch) -> Float[Tensor, "targets vocab"]:
    """The logits of a plain transformers model, or a `PeftModel`, at the targets of right-padded rows.

    The unembedding is computed for columns with a target alone, where the model's forward pass can do so.
    """
    rows, columns = batch.predicting
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    some: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        kept, columns = columns.unique(return_inverse=True)
        some = {"logits_to_keep": kept}
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False, **some).logits
    logits = logits[rows, columns]
    return logits[:, list(batch.answers)] if batch.answers else logits


@dataclass
class Loop:
    """A training run in progress; its state after each step is all that it needs to go on.

    Args:
        module: its parameters that take gradients are trained.
        parts: those of its modules that are in training mode while it trains, such as an adapter's dropout; the rest
            stays as it is.
        identity: what a checkpoint has to agree with beside settings and data, such as the model and the method.
    """

    module: nn.Module
    data: Batch
    config: FitConfig
    forward: Forward = target_logits
    losses: Losses = cross_entropy
    validation: Batch | None = None
    parts: Sequence[nn.Module] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(f"nothing to train: no parameter of this {type(self.module).__name__} takes a gradient")
        for name in ("patience", "eval_every"):
            if getattr(self.config, name) is not None and self.validation is None:
                raise ValueError(f"{name}={getattr(self.config, name)} needs validation=…, a batch to evaluate")
        self.device = next(iter(self.trained.values())).device
        self.history, self.best, self.resumed = History(), dict[str, Tensor](), 0
        with_decay = {id(p) for p in decayed(self.module)}
        groups = [
            ([p for p in self.trained.values() if id(p) in with_decay], self.config.weight_decay),
            ([p for p in self.trained.values() if id(p) not in with_decay], 0.0),
        ]
        groups = [{"params": ps, "weight_decay": decay} for ps, decay in groups if ps]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr)

    @property
    def done(self) -> int:
        return len(self.history.losses)

    @property
    def taken(self) -> int:
        """Steps of this loop, without those of a checkpoint."""
        return self.done - self.resumed

    @property
    def total(self) -> int:
        return self.config.total_steps(len(self.data))

    @property
    def finished(self) -> bool:
        return self.done >= self.total or self.history.stopped_early

    def step(self) -> float:
        """One optimizer step; its mean loss."""
        began = time.perf_counter()
        seed_step(self.config, self.done, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, 0
        for rows in self.config.micro_batches(self.done, len(self.data)):
            for group in self._groups(self.data, rows):
                value, some = self._summed(self.data[group])
                value.backward()
                total, count = total + value.item(), count + some
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad /= count
        norm = float(clip_grad_norm_(self.trained.values(), self.config.clip or math.inf))
        loss, number = total / count, self.done + 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(f"step {number}: the loss is {loss:.4g}, its gradient's norm {norm:.4g}: lower lr")
        self._update(loss, norm)
        self.history.seconds += time.perf_counter() - began
        return loss

    def _groups(self, data: Batch, rows: Sequence[int]) -> list[list[int]]:
        """The rows of a micro-batch as they are computed: by length, where each loss comes from its own row alone."""
        if not per_target(self.losses):
            return [list(rows)]
        return by_length(data, rows, None, self.device)

    def _update(self, loss: float, norm: float) -> None:
        self.history.take(self.optimizer, loss, norm, self.config.learning_rate(self.done, self.total))
        every = self.config.eval_every or self.config.steps_per_epoch(len(self.data))
        if self.validation is not None and (self.done % every == 0 or self.done >= self.total):
            self._validate(self.validation)

    def _summed(self, batch: Batch) -> tuple[Tensor, int]:
        """The sum of the losses of some rows, and their number."""
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            losses = self.losses(self.forward(self.module, batch), batch)
        if losses.ndim != 1:
            raise ValueError(f"the losses have the shape {list(losses.shape)}, expected one dimension")
        return losses.sum(), losses.numel()

    @torch.no_grad()
    def _validate(self, validation: Batch) -> None:
        size, pieces = self.config.batch_size, list[tuple[Tensor, int]]()
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(training_mode(part, training=False))
            for start in range(0, len(validation), size):
                rows = range(start, min(start + size, len(validation)))
                pieces += [self._summed(validation[group]) for group in self._groups(validation, rows)]
        loss = sum(value.item() for value, _ in pieces) / sum(count for _, count in pieces)
        evaluations = self.history.evaluations
        if not evaluations or loss < min(value for _, value in evaluations):
            self.best = {n: p.detach().clone() for n, p in self.trained.items()}
        evaluations.append((self.done, loss))
        waited = len(evaluations) - 1 - min(range(len(evaluations)), key=lambda i: evaluations[i][1])
        self.history.stopped_early = self.config.patience is not None and waited >= self.config.patience

    @torch.no_grad()
    def finish(self) -> None:
        """Take the best weights where `patience` asks for them."""
        if self.config.patience is not None:
            for name, value in self.best.items():
                self.trained[name].copy_(value)

    def _told(self) -> dict[str, Any]:
        validation = None if self.validation is None else self.validation.fingerprint
        run = {"settings": asdict(self.config), "data": self.data.fingerprint, "validation": validation}
        return {**self.identity, **run, "trained": {n: list(p.shape) for n, p in self.trained.items()}}

    def write(self, path: Path) -> None:
        tensors = {f"trained.{n}": p for n, p in self.trained.items()} | {f"best.{n}": p for n, p in self.best.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        write_checkpoint(path, "reftlens", tensors, self._told() | asdict(self.history))

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Bring the run to where its file says it was; `CheckpointMismatch` for that of another run."""
        saved, record = read_checkpoint(path, "reftlens", self._told(), of="run", maker="this loop")
        state = dict[int, dict[str, Tensor]]()
        for name, tensor in saved.items():
            part, rest = name.split(".", 1)
            if part == "optimizer":
                index, key = rest.split(".", 1)
                state.setdefault(int(index), {})[key] = tensor
            elif part == "best":
                self.best[rest] = tensor.to(self.device)
            else:
                self.trained[rest].copy_(tensor)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        history = {f.name: record[f.name] for f in fields(History)}
        self.history = History(**{**history, "evaluations": [(step, loss) for step, loss in history["evaluations"]]})
        self.resumed = self.done


def train(
    loop: Loop, *, checkpoint: str | Path | None = None, checkpoint_every: int = 20, progress: bool = True
) -> History:
    """Take a loop to its end, from its checkpoint where there is one; what was measured at each step.

    Losses and gradients are those of `rl.fit`: the mean over all losses of an optimizer step, whatever micro-batch they
    are in, its gradient clipped. A run that was killed ends with the weights of one that was not, on a CPU bit for bit.

    Raises:
        TrainingDiverged: on the first loss or gradient that is not finite.
        CheckpointMismatch: if the file belongs to another run.
    """
    path = None if checkpoint is None else destination(checkpoint)
    if path is not None and path.exists():
        loop.resume(path)
    with ExitStack() as stack:
        stack.enter_context(gradients_on())
        stack.enter_context(torch.random.fork_rng([loop.device] if loop.device.type == "cuda" else []))
        for part in loop.parts:
            stack.enter_context(training_mode(part, training=True))
        bar = stack.enter_context(tqdm(total=loop.total, initial=loop.done, desc="fit", disable=not progress))
        while not loop.finished:
            bar.set_postfix(loss=f"{loop.step():.4f}")
            bar.update()
            if path is not None and (loop.finished or loop.done % checkpoint_every == 0):
                loop.write(path)
        loop.finish()
    return loop.history
