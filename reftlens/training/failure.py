"""What is to be said of a step whose loss, or whose gradient, is not finite."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from reftlens.cone.plans import Job
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import ReFT
from reftlens.errors import TrainingDiverged


def diverged(reft: ReFT, loss: float, scorer: Scorer, jobs: Sequence[Job], step: int) -> TrainingDiverged:
    """The error of a step with this loss and these jobs, which are scored once more where the loss is not finite."""
    if isfinite(loss):
        cause = "its gradient is not finite: an activation or a frame is degenerate; try another seed or a smaller lr"
        return TrainingDiverged(f"step {step}: the loss is {loss:.4g}, and {cause}")
    with torch.no_grad():
        logits = torch.cat([scored.logits for group in scorer.score(jobs) for scored in group])
    return TrainingDiverged(f"step {step}: the loss is {loss}: {_cause(reft, logits)}")


def _cause(reft: ReFT, logits: Tensor) -> str:
    broken = [name for name, parameter in reft.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        return f"{broken[0]} is not finite after the step before; lower lr, or set clip"
    if not torch.isfinite(logits).all():
        largest = max(p.abs().max().item() for p in reft.parameters() if p.requires_grad)
        return (
            f"the edited model's logits overflow in {str(logits.dtype).removeprefix('torch.')} (largest parameter "
            f"{largest:.3g}); lower lr, or load the model in float32 or bfloat16"
        )
    return "the logits are finite, so it is the objective that is not"
