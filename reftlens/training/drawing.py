"""Which rows an optimizer step scores, and under which plans: a function of the settings and the step alone."""

import torch

from reftlens.cone.plans import Job
from reftlens.scoring.objectives import Objective
from reftlens.training.config import FitConfig, derived_seed


def step_jobs(config: FitConfig, objective: Objective, step: int, rows: int, first: int = 0) -> list[list[Job]]:
    """The jobs of optimizer step `step` (from 0) on `rows` rows, by micro-batch; plans are numbered from `first`."""
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "plans", step))
    group, result = objective.group, list[list[Job]]()
    for units in config.micro_batches(step, rows // group):
        some = [unit * group + i for unit in units for i in range(group)]
        result.append([Job(first + plan, own) for plan, own in objective.drawn(some, generator).items()])
    return result
