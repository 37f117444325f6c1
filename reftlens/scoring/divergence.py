"""Log-probability and KL of each target in float64, from logits of any dtype, with no float64 copy of the logits."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_TOGETHER = defaultdict(lambda: 1 << 24, cpu=1 << 17)
"""Logits that are held in float64 at once: a GPU is to be asked few times, a CPU's cache is small."""


class Softmax(NamedTuple):
    """Logits at some targets, with what their softmax divides by."""

    logits: Float[Tensor, "targets vocab"]
    top: Float[Tensor, "targets 1"]
    """The largest logit of each target, in float64."""
    total: Float[Tensor, "targets 1"]
    """Σ exp(logit - top), in float64."""

    def log_prob(self, ids: Int[Tensor, " targets"]) -> Float[Tensor, " targets"]:
        """Of one token for each target, in nats."""
        return (self.logits.gather(1, ids[:, None]) - self.top - self.total.log())[:, 0]


@torch.no_grad()
def softmax_of(logits: Float[Tensor, "targets vocab"]) -> Softmax:
    """The softmax at each target."""
    top, total = _empty(logits)
    for (room, _), x, highest, out in _pieces(logits, top, total):
        torch.sum(room.copy_(x).sub_(highest).exp_(), dim=1, keepdim=True, out=out)
    return Softmax(logits, top, total)


@torch.no_grad()
def softmax_and_divergence(
    logits: Float[Tensor, "targets vocab"], before: Softmax, at: Int[Tensor, " targets"]
) -> tuple[Softmax, Float[Tensor, " targets"]]:
    """The softmax `p` at each target, and `KL(p ‖ q)` from that of `before` at its targets `at`, in nats.

    With `x`, `y` the logits less the largest of each, and `X`, `Y` their totals, it is `Σ eˣ (x - y) / X - log(X / Y)`:
    one exponential for each logit, and a KL of 1e-8 is right to 1e-7. A token that `p` excludes adds nothing.
    """
    (top, total), moved = _empty(logits), torch.empty_like(before.total[at])
    for (p, shift), x, highest, out, here, change in _pieces(logits, top, total, at, moved):
        torch.sub(p.copy_(x).sub_(highest), shift.copy_(before.logits[here]).sub_(before.top[here]), out=shift)
        torch.sum(p.exp_(), dim=1, keepdim=True, out=out)
        torch.nansum(p.mul_(shift), dim=1, keepdim=True, out=change)  # NaN is 0 · ∞, or it is in a total as well
    return Softmax(logits, top, total), (moved / total - (total / before.total[at]).log())[:, 0]


def _empty(logits: Float[Tensor, "targets vocab"]) -> tuple[Float[Tensor, "targets 1"], Float[Tensor, "targets 1"]]:
    """The largest logit of each target, and room for its total."""
    return logits.amax(dim=1, keepdim=True).double(), logits.new_empty((len(logits), 1), dtype=torch.float64)


def _pieces(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Room in float64 for a few targets at a time, twice, and these targets of each."""
    rows = max(1, _TOGETHER[logits.device.type] // logits.shape[1])
    room = logits.new_empty((2, min(rows, len(logits)), logits.shape[1]), dtype=torch.float64)
    for parts in zip(*(x.split(rows) for x in (logits, *others)), strict=True):
        yield room[:, : len(parts[0])], *parts
