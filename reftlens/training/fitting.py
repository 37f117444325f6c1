"""`fit` and `fit_many`: AdamW on the parameters of a `ReFT`, the model frozen for as long as it runs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of, frozen, gradients_on
from reftlens.bridge.trial import check_agrees, check_predicts
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.preflight import preflight
from reftlens.editing.reft import ReFT, check_types, training_mode
from reftlens.editing.sources import check_differs
from reftlens.editing.variant import Variant
from reftlens.files import destination
from reftlens.numbers import whole
from reftlens.scoring.objectives import Loss, Objective, as_objective, cross_entropy
from reftlens.text.batch import Batch
from reftlens.training.checkpoint import Checkpoint
from reftlens.training.config import FitConfig, replaced
from reftlens.training.processes import Processes
from reftlens.training.result import FitResult
from reftlens.training.run import Run, Step, advance, decayed


def fit(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    config: FitConfig = FitConfig(),
    *,
    validation: Batch | None = None,
    objective: Objective | Loss = cross_entropy,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    reuse: bool | Reuse = True,
    together: bool = True,
    progress: bool = True,
    **settings: Any,
) -> FitResult:
    """Train `reft` in place on `data` and return the record of the run.

    Training starts from the weights that `reft` has: `reft.reset(seed)` draws a start that repeats, the setting `seed`
    is of data order and dropout.

    Args:
        validation: rows whose loss is measured every `eval_every` steps, by default once per epoch.
        objective: `(logits at the targets, batch) -> losses`. Each call gets a whole micro-batch of `batch_size` rows,
            never a part of one, in the order of the step, so that rows may be compared. An `rl.training.Objective` sees
            more than logits: see there, and `DPO`, `SimPO`, `BiPO` and `RePS` for pairs of completions.
        on_step: called after every optimizer step.
        checkpoint: a file, written every `checkpoint_every` steps and at the end. If it exists, the run goes on
            from it, and ends with the weights of a run that was never interrupted (bit-identical on a CPU).
        reuse: compute at each step only what the edits can change, and take the rest from what was captured once;
            False computes everything. `FitResult.computation` tells what was done.
        together: train in all processes of the default group of `torch.distributed`, where there is one, as under
            `torchrun` or `accelerate launch`: `batch_size` is that of all, each computes its share of the rows of a
            step, and gradients are summed over targets. Without dropout the losses are those of one process. Every
            process starts from the weights of the first, which alone writes the checkpoint. False trains a run of its
            own in each.
        settings: fields of `FitConfig` by name, in place of those of `config`: `fit(…, epochs=100, lr=4e-3)`.

    Raises:
        ProcessLost: where another process of the run has ended.
        TrainingDiverged: on the first loss or gradient that is not finite.
        CheckpointMismatch: if the file belongs to other settings, data, model or sites.
        TypeError: for a setting that does not exist.
        ValueError: if a row has no target, nothing can be trained, a site is unusable, dropout of the model is active,
            or rows and sources are equal up to what is exchanged, as at a BOS token; or where processes differ in what
            they train, or are more than the micro-batches of a step whose rows are compared.
    """
    checkpoint_every = whole(checkpoint_every, "checkpoint_every", 1)
    path = None if checkpoint is None else destination(checkpoint)
    processes = Processes.here(together)
    run = _run(reft, model, data, replaced(config, settings), validation, as_objective(objective), processes)
    preflight(reft, model)
    if all(module.variables for _, module in reft.items()):
        check_differs(reft.sites, data)
    saved = Checkpoint(run, path, checkpoint_every)
    saved.resume()
    processes.check_same({"steps done (is the checkpoint where all can read it?)": run.done})

    def after(step: Step) -> None:
        if on_step is not None:
            on_step(step)
        saved.after_step()

    (result,) = _train([run], Reuse.of(reuse), progress, after)
    return result


def fit_many(
    refts: Mapping[str, ReFT],
    model: Bridge,
    data: Batch,
    config: FitConfig | Mapping[str, FitConfig] = FitConfig(),
    *,
    validation: Batch | None = None,
    objective: Objective | Loss = cross_entropy,
    reuse: bool | Reuse = True,
    together: bool = True,
    progress: bool = True,
    **settings: Any,
) -> dict[str, FitResult]:
    """Train several interventions in place, each as `fit` would train it alone, in shared passes through the model.

    Seeds, ranks, kinds, sites and settings may all differ: `fit_many(reft.seeds([0, 1, 2]), model, data)`. What is
    frozen is captured once for all of them, and the steps of all are computed side by side: many small cones in the
    time of a few. Where an intervention has dropout, whose draws must be those of its own run, they train one by one.

    Args:
        config: one for all, or `{name: FitConfig}`. A copy that `reft.seeds` made has its own seed in place of the
            config's.
        together: as in `fit`.
        settings: fields of `FitConfig` by name, for all.

    Raises:
        ValueError: as `fit`; and where two interventions share parameters, or differ in precision.
    """
    if not isinstance(refts, Mapping) or not refts:
        raise TypeError(f"expected {{name: ReFT, …}} with one or more, such as reft.seeds([0, 1, 2]), got {refts!r}")
    judge, processes = as_objective(objective), Processes.here(together)
    runs = [
        _run(refts[name], model, data, each, validation, judge, processes)
        for name, each in _configs(refts, config, settings).items()
    ]
    preflight(runs[0].reft, model, *(run.reft for run in runs[1:]))
    owners = [id(p) for run in runs for p in run.reft.parameters()]
    if len(set(owners)) < len(owners):
        raise ValueError("two of the interventions share parameters, and each would train the other: use .clone()")
    if len({run.config.precision for run in runs}) > 1:
        raise ValueError("interventions that train together compute in one precision")
    alone = any(module.dropout.p > 0 for run in runs for module in run.modules)
    groups = [[run] for run in runs] if alone else [runs]
    results = [result for group in groups for result in _train(group, Reuse.of(reuse), progress)]
    return dict(zip(refts, results, strict=True))


def _configs(
    refts: Mapping[str, ReFT], config: FitConfig | Mapping[str, FitConfig], settings: Mapping[str, Any]
) -> dict[str, FitConfig]:
    """Of each intervention, in their order."""
    configs = config if isinstance(config, Mapping) else dict.fromkeys(refts, config)
    if configs.keys() != refts.keys():
        raise ValueError(f"interventions {list(refts)} and configs {list(configs)}: one config each, or one for all")
    if "seed" in settings and any(reft.seed is not None for reft in refts.values()):
        raise ValueError(f"seed={settings['seed']}: copies of reft.seeds(…) have seeds of their own, leave it out")
    own = {name: {} if reft.seed is None else {"seed": reft.seed} for name, reft in refts.items()}
    return {name: replaced(configs[name], {**settings, **own[name]}) for name in refts}


def _run(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    config: FitConfig,
    validation: Batch | None,
    objective: Objective,
    processes: Processes,
) -> Run:
    """A run that can start, or an error."""
    batches = {"data": data} if validation is None else {"data": data, "validation": validation}
    for name, batch in batches.items():
        check_types(reft, model, batch)
        if objective.logits:
            batch.require_targets(name)
        Variant().require(reft.sites, batch.view)
        objective.check(batch, name)
    check_deterministic(model)
    (check_predicts if objective.logits else check_agrees)(model)
    for name in ("patience", "eval_every"):
        if getattr(config, name) is not None and validation is None:
            raise ValueError(f"{name}={getattr(config, name)} needs validation=…, a batch to evaluate")
    if any(p.is_inference() for p in reft.parameters()):
        raise ValueError("the ReFT was made inside torch.inference_mode(), and cannot be trained: make it outside")
    if not any(p.requires_grad for p in reft.parameters()):
        kinds = ", ".join(sorted({m.label for _, m in reft.items()}))
        raise ValueError(f"nothing to train: {kinds} has no trainable parameter")
    if config.weight_decay and not decayed(reft):
        raise ValueError(f"weight_decay={config.weight_decay} reaches no parameter: all are orthonormal frames")
    run = Run(reft.to(device_of(model)), model, data, config, validation, objective, processes=processes)
    _join(run)
    return run


def _join(run: Run) -> None:
    """Make sure that all processes train one run, from one start."""
    processes, accumulate = run.processes, run.config.accumulate
    if not run.objective.per_target and accumulate < processes.count:
        raise ValueError(
            f"{run.objective.name} compares the rows of a micro-batch, which stays in one process: accumulate="
            f"{accumulate}, expected a micro-batch for each of {processes.count} processes, or together=False"
        )
    sites = [f"{site}: {module!r}" for site, module in run.reft.items()]
    batches = {"rows": run.data.fingerprint, "validation": run.validation and run.validation.fingerprint}
    processes.check_same({**asdict(run.config), **batches, "objective": run.objective.name, "sites": sites})
    processes.start_alike(run.reft)


def _train(
    runs: Sequence[Run], reuse: Reuse | None, progress: bool, after: Callable[[Step], None] = lambda step: None
) -> list[FitResult]:
    """Take all runs to their end side by side; `after` is called with each step of the first."""
    first = runs[0]
    progress = progress and not first.processes.number
    with ExitStack() as stack:
        stack.enter_context(gradients_on())
        stack.enter_context(frozen(first.model))
        stack.enter_context(torch.random.fork_rng([first.device] if first.device.type == "cuda" else []))
        for run in runs:
            stack.enter_context(training_mode(run.reft, training=True))
        scorer = _scorer(runs, reuse, progress)
        validator = None if first.validation is None else scorer.over(first.validation)
        for run in runs:
            run.judge_by(scorer, validator, None if run is first else first)
        total = max(run.total for run in runs)
        done = min(total, min(run.done for run in runs))
        bar = stack.enter_context(tqdm(total=total, initial=done, desc="fit", unit="step", disable=not progress))
        while going := [run for run in runs if not run.finished]:
            steps = advance(going, scorer, validator)
            bar.update()
            bar.set_postfix(loss=f"{sum(step.loss for step in steps) / len(steps):.4f}")
            after(steps[0])
        for run in runs:
            run.finish()
    return [run.result(scorer.computation) for run in runs]


def _scorer(runs: Sequence[Run], reuse: Reuse | None, progress: bool) -> Scorer:
    """Of the data of all runs, under the plans of each, which are numbered one run after the other."""
    first, plans = runs[0], list[Plan]()
    uses = sum(run.config.uses(run.units) / run.processes.count for run in runs)
    for run in runs:
        run.number, own = len(plans), run.objective.plans(run.reft)
        plans += own
    settings: dict[str, Any] = {"progress": progress, "watched": first.objective.sites}
    return Scorer(first.model, first.data, plans, reuse, uses=uses, autocast=first.autocast, **settings)
