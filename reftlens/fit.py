"""The one training loop: AdamW on the parameters of a `ReFT`, the model frozen for as long as it runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm

from reftlens.config import FitConfig, Schedule
from reftlens.data import Batch
from reftlens.model import Bridge, check_deterministic, device_of, frozen
from reftlens.objectives import Objective, cross_entropy
from reftlens.preflight import preflight
from reftlens.reft import ReFT, mode
from reftlens.result import FitResult
from reftlens.scorer import Plan, Reuse, Scorer
from reftlens.training import Run, Step, advance, decayed


def fit(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    epochs: int = 10,
    steps: int | None = None,
    lr: float = 4e-3,
    batch_size: int = 8,
    accumulate: int = 1,
    schedule: Schedule = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    precision: Literal["model", "bfloat16"] = "model",
    seed: int = 0,
    shuffle: bool = True,
    validation: Batch | None = None,
    eval_every: int | None = None,
    patience: int | None = None,
    objective: Objective = cross_entropy,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> FitResult:
    """Train `reft` in place on `data` and return the record of the run. Settings: see `FitConfig`.

    Args:
        objective: `(logits at the targets, batch) -> losses`, see `reftlens.objectives`.
        on_step: called after every optimizer step.
        checkpoint: a file, written every `checkpoint_every` steps and at the end. If it exists, the run goes on
            from it, and ends with the weights of a run that was never interrupted (bit-identical on a CPU).
        reuse: compute at each step only what the edits can change, and take the rest from what was captured once;
            False computes everything. `FitResult.computation` tells what was done.

    Raises:
        TrainingDiverged: on the first loss or gradient that is not finite.
        CheckpointMismatch: if the file belongs to other settings, data, model or sites.
        ValueError: if a row has no target, nothing can be trained, a site is unusable, or dropout of the model
            is active.
    """
    config = FitConfig(
        epochs=epochs, steps=steps, lr=lr, batch_size=batch_size, accumulate=accumulate, schedule=schedule,
        warmup=warmup, weight_decay=weight_decay, clip=clip, precision=precision, seed=seed, shuffle=shuffle,
        eval_every=eval_every, patience=patience,
    )  # fmt: skip
    path = None if checkpoint is None else Path(checkpoint)
    return run_fit(
        reft, model, data, config, validation=validation, objective=objective, on_step=on_step, checkpoint=path,
        checkpoint_every=checkpoint_every, reuse=Reuse.of(reuse), progress=progress,
    )  # fmt: skip


def fit_seeds(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    seeds: list[int],
    config: FitConfig = FitConfig(),  # noqa: B008
    *,
    validation: Batch | None = None,
    objective: Objective = cross_entropy,
    progress: bool = True,
) -> list[tuple[ReFT, FitResult]]:
    """One run per seed, each from its own initialisation and data order; `reft` itself stays as it is."""
    runs = []
    for seed in seeds:
        copy = reft.clone()
        copy.reset(seed)
        settings = replace(config, seed=seed)
        result = run_fit(copy, model, data, settings, validation=validation, objective=objective, progress=progress)
        runs.append((copy, result))
    return runs


def run_fit(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    config: FitConfig,
    *,
    validation: Batch | None = None,
    objective: Objective = cross_entropy,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 20,
    reuse: Reuse | None = Reuse(),  # noqa: B008
    progress: bool = True,
) -> FitResult:
    """`fit` with its settings in one object."""
    _check(reft, model, data, config, validation)
    device = device_of(model)
    run = Run(reft.to(device), model, data, config, validation, objective, checkpoint, reuse)
    total = config.total_steps(len(data))
    devices = [device] if device.type == "cuda" else []
    with frozen(model), mode(reft, training=True), torch.random.fork_rng(devices):
        run.resume()
        uses = (total - run.done) * config.batch_size * config.accumulate / len(data)
        scorer = Scorer(
            model, data, [Plan(run.bound)], reuse, uses=uses, autocast=run.autocast, narrow=run.narrow,
            progress=progress,
        )  # fmt: skip
        with tqdm(total=total, initial=run.done, desc="fit", unit="step", disable=not progress) as bar:
            while run.done < total and not run.stopped_early:
                (record,) = advance([run], scorer, total)
                bar.update()
                bar.set_postfix(loss=f"{record.loss:.4f}")
                if on_step is not None:
                    on_step(record)
                if run.done % checkpoint_every == 0 and run.done < total:
                    run.save()
        run.finish()
    return run.result(scorer.said)


def _check(reft: ReFT, model: Bridge, data: Batch, config: FitConfig, validation: Batch | None) -> None:
    check_deterministic(model)
    for name, batch in (("data", data), ("validation", validation)):
        if batch is None:
            continue
        empty = (~batch.target_mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"row(s) {empty[:10]} of {name} have no target: nothing to learn or score there")
        if bool(batch.target_mask[:, 0].any()):
            raise ValueError(f"the first token of a row of {name} is a target, and no logits predict it")
        reft.bind(model).require(batch.view)
    if config.patience is not None and validation is None:
        raise ValueError(f"patience={config.patience} needs validation=…, a batch to stop by")
    if config.eval_every is not None and validation is None:
        raise ValueError(f"eval_every={config.eval_every} needs validation=…, a batch to evaluate")
    trainable = [p for p in reft.parameters() if p.requires_grad]
    if not trainable:
        kinds = ", ".join(sorted({m.kind for _, m in reft.items()}))
        raise ValueError(f"nothing to train: {kinds} has no trainable parameter")
    if config.weight_decay and not decayed(reft):
        raise ValueError(f"weight_decay={config.weight_decay} reaches no parameter: all are orthonormal frames")
    preflight(reft, model)
