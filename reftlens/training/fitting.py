"""The one training loop: AdamW on the parameters of a `ReFT`, the model frozen for as long as it runs."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of, frozen
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.preflight import preflight
from reftlens.editing.reft import ReFT, check_asked, mode
from reftlens.scoring.objectives import Objective, cross_entropy
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig, Schedule
from reftlens.training.result import FitResult
from reftlens.training.run import Run, Step, advance, decayed


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

    Training starts from the weights that `reft` has: `reft.reset(seed)` draws a start that repeats, `seed` here is of
    data order and dropout.

    Args:
        objective: `(logits at the targets, batch) -> losses`, see `reftlens.scoring.objectives`.
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
    seeds: Sequence[int],
    config: FitConfig = FitConfig(),
    *,
    validation: Batch | None = None,
    objective: Objective = cross_entropy,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> list[tuple[ReFT, FitResult]]:
    """One run per seed, each from its own initialisation and data order; `reft` itself stays as it is.

    `seeds` takes the place of `config.seed`. The runs share each pass through the model (see `fit_together`), unless
    there is dropout to draw for each.
    """
    if isinstance(seeds, int):
        raise TypeError(f"seeds={seeds}, expected a list of seeds, such as [0, 1, 2]")
    copies = [reft.clone() for _ in seeds]
    for copy, seed in zip(copies, seeds, strict=True):
        copy.reset(seed)
    configs = [replace(config, seed=seed) for seed in seeds]
    if _dropout(copies):
        results = [
            run_fit(c, model, data, s, validation=validation, objective=objective, reuse=Reuse.of(reuse),
                    progress=progress)
            for c, s in zip(copies, configs, strict=True)
        ]  # fmt: skip
    else:
        results = fit_together(
            copies, model, data, configs, validation=validation, objective=objective, reuse=reuse, progress=progress
        )
    return list(zip(copies, results, strict=True))


def fit_together(
    refts: Sequence[ReFT],
    model: Bridge,
    data: Batch,
    configs: FitConfig | Sequence[FitConfig] = FitConfig(),
    *,
    validation: Batch | None = None,
    objective: Objective = cross_entropy,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> list[FitResult]:
    """Train several interventions in place, each as `fit` would train it alone, in shared passes through the model.

    Seeds, ranks, kinds, sites and settings may all differ. What is frozen is captured once for all of them, and the
    steps of all are computed side by side: many small cones in the time of a few.

    Args:
        configs: one for each of `refts`, or one for all.

    Raises:
        ValueError: as `fit`; and where an intervention has dropout, whose draws would not be those of its own run.
    """
    settings = [configs] * len(refts) if isinstance(configs, FitConfig) else list(configs)
    if len(settings) != len(refts) or not refts:
        raise ValueError(f"{len(refts)} interventions and {len(settings)} configs: one config each, or one for all")
    if _dropout(refts):
        raise ValueError("dropout would be drawn otherwise than in a run of its own: use fit, or dropout=0")
    owners = [id(p) for reft in refts for p in reft.parameters()]
    if len(set(owners)) < len(owners):
        raise ValueError("two of the interventions share parameters, and each would train the other: use .clone()")
    if len({config.precision for config in settings}) > 1:
        raise ValueError("interventions that train together compute in one precision")
    return _train(refts, model, data, settings, validation, objective, Reuse.of(reuse), progress)


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
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
) -> FitResult:
    """`fit` with its settings in one object."""
    (result,) = _train(
        [reft], model, data, [config], validation, objective, reuse, progress, on_step, checkpoint, checkpoint_every
    )
    return result


def _train(
    refts: Sequence[ReFT],
    model: Bridge,
    data: Batch,
    configs: Sequence[FitConfig],
    validation: Batch | None,
    objective: Objective,
    reuse: Reuse | None,
    progress: bool,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 20,
) -> list[FitResult]:
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every}, expected 1 or more")
    for reft, config in zip(refts, configs, strict=True):
        check_asked(reft, model, data)
        if validation is not None:
            check_asked(reft, model, validation)
        _check(reft, model, data, config, validation)
    device = device_of(model)
    runs = [
        Run(reft.to(device), model, data, config, validation, objective, checkpoint, number)
        for number, (reft, config) in enumerate(zip(refts, configs, strict=True))
    ]
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for run in runs:
            stack.enter_context(mode(run.reft, training=True))
            run.resume()
        plans = [Plan(run.bound) for run in runs]
        scorer = Scorer(
            model, data, plans, reuse, uses=sum(run.uses for run in runs), autocast=runs[0].autocast,
            narrow=runs[0].narrow, progress=progress,
        )  # fmt: skip
        validator = None if validation is None else Scorer(
            model, validation, plans, reuse, autocast=runs[0].autocast, narrow=runs[0].narrow, progress=progress
        )  # fmt: skip
        longest = max(run.total for run in runs)
        done = min(longest, min(run.done for run in runs))
        bar = stack.enter_context(tqdm(total=longest, initial=done, desc="fit", unit="step", disable=not progress))
        while going := [run for run in runs if not run.finished]:
            records = advance(going, scorer, validator)
            bar.update()
            bar.set_postfix(loss=f"{sum(record.loss for record in records) / len(records):.4f}")
            if on_step is not None:
                on_step(records[0])
            if runs[0].done % checkpoint_every == 0 and not runs[0].finished:
                runs[0].save()
        for run in runs:
            run.finish()
    return [run.result(scorer.said) for run in runs]


def _dropout(refts: Sequence[ReFT]) -> bool:
    return any(module.dropout.p > 0 for reft in refts for _, module in reft.items())


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
