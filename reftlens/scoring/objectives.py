"""What training minimises: a function from the logits at the targets to one loss per target.

Any callable `(logits, batch) -> losses` will do. `logits` is `[targets, vocab]`, one row for each target token in
the order of `batch.target_ids` and `batch.target_rows`; `batch` is a whole micro-batch, its rows in the order of the
step, so that they can be paired; `losses` is one-dimensional, and its mean over the whole optimizer step is what is
minimised, so that accumulation does not change the result.

An objective whose losses each come from their own row of logits alone may say so by an attribute, `per_target = True`:
it is then given a few rows of a micro-batch at a time, and less memory is taken.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reftlens.text.batch import Batch

Objective = Callable[[Tensor, Batch], Tensor]


def is_per_target(objective: Objective) -> bool:
    """Whether it may be given a part of the targets."""
    return objective is cross_entropy or getattr(objective, "per_target", False) is True


_ROWS = defaultdict(lambda: 256, cpu=16)
"""Rows of the logits whose exponentials are held at once: a GPU is to be asked few times, a CPU's cache is small."""


def cross_entropy(logits: Float[Tensor, "targets vocab"], batch: Batch) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each target token, in nats.

    Raises:
        ValueError: where there is not one row of logits for each target.
    """
    if len(logits) != len(batch.target_ids):
        raise ValueError(f"{len(logits)} rows of logits for {len(batch.target_ids)} targets: expected one for each")
    return _NegativeLogLikelihood.apply(logits.float() if logits.dtype.itemsize < 4 else logits, batch.target_ids)


class _NegativeLogLikelihood(torch.autograd.Function):
    """-log softmax(logits)[target], a few rows at a time.

    torch's own writes four tensors as large as the logits, this one only their gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "targets vocab"], targets: Int[Tensor, " targets"]
    ) -> Float[Tensor, " targets"]:
        top, sums = logits.amax(dim=1, keepdim=True), logits.new_empty(len(logits), 1)
        for part, highest, total in _some_rows(logits, top, sums):
            torch.sum((part - highest).exp_(), dim=1, keepdim=True, out=total)
        ctx.save_for_backward(logits, targets, top, sums)
        return (sums.log() - (logits.gather(1, targets[:, None]) - top)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " targets"]) -> tuple[Float[Tensor, "targets vocab"], None]:
        logits, targets, top, sums = ctx.saved_tensors
        out, scale = torch.empty_like(logits), grad[:, None]
        for part, values, highest, share in _some_rows(out, logits, top, scale / sums):
            torch.sub(values, highest, out=part).exp_().mul_(share)
        return out.scatter_add_(1, targets[:, None], -scale), None


def _some_rows(*every: Tensor) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(x.split(_ROWS[x.device.type]) for x in every), strict=True)
