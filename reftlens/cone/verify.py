"""The claim of the light cone is checked: losses, logits and gradients beside those of the full computation.

Gradients only where they are asked for, in training.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reftlens.cone.plans import Job, Plan, Scored
from reftlens.editing.reft import Variant, mode

_SAMPLES = {True: 8, False: 4}  # plans whose cones are compared with the full computation, in training and elsewhere
_TOKENS = {True: 1024, False: 512}  # about so many are computed in full


def difference(
    job: Job,
    plans: Sequence[Plan],
    firsts: Sequence[int],
    lengths: Sequence[int],
    whole: Callable[[Job], AbstractContextManager[Scored]],
    cone: Callable[[Sequence[Job]], Iterable[list[Scored]]],
    *,
    narrow: bool,
) -> str:
    """What is wrong with `cone` on some rows of `job`, or "", measured against `whole`.

    One plan is taken of every set of sites and tokens, the strongest, and their cones are computed together.

    Args:
        firsts: the first block of each plan.
        lengths: of each row, up to the last token of its cone.
        narrow: whether 16 bits are computed with, or kept.
    """
    strongest: dict[Any, int] = {}
    for i, plan in enumerate(plans):
        key = (plan.reft.sites, plan.variant.sites, plan.variant.among)
        if key not in strongest or _dose(plan.variant) > _dose(plans[strongest[key]].variant):
            strongest[key] = i
    chosen = sorted(strongest.values(), key=lambda i: firsts[i])
    training = torch.is_grad_enabled()
    chosen = chosen[:: -(-len(chosen) // _SAMPLES[training])]
    rows = _within(job.rows, lengths, most=_TOKENS[training] // len(chosen))
    samples = [Job(i, rows) for i in chosen]
    parameters = _parameters(plans) if training else []
    with ExitStack() as stack:
        for i in chosen:
            stack.enter_context(mode(plans[i].reft, training=False))
        sums = _Sums(parameters)
        for sample in samples:
            with whole(sample) as scored:
                sums.add([scored])
        expected, sums = sums.all, _Sums(parameters)
        try:
            for group in cone(samples):
                sums.add(group)
        except Exception as error:  # whatever a model's own code says to a stored cache: it cannot be reused
            return f"computing with stored keys and values failed: {type(error).__name__}: {error}"
    return _compared(sums.all, expected, narrow=narrow)


class _Sums:
    """Logits of all jobs one after the other, the sum of their losses, and its gradients."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # None is 0: an edit after the last target is left out of the cone, and changes nothing in the full pass
        self.parameters, self.grads = list(parameters), [torch.zeros_like(p) for p in parameters]
        self.logits: list[Tensor] = []
        self.total = torch.zeros(())

    def add(self, scored: Sequence[Scored]) -> None:
        losses = [F.cross_entropy(one.logits.float(), one.batch.target_ids) for one in scored]
        self.logits += [one.logits.detach() for one in scored]
        loss = torch.stack(losses).sum()
        self.total = self.total + loss.detach().cpu()
        if self.parameters and loss.requires_grad:
            known = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            self.grads = [g if k is None else g + k for g, k in zip(self.grads, known, strict=True)]

    @property
    def all(self) -> list[Tensor]:
        return [torch.cat(self.logits), self.total, *self.grads]


def _compared(found: Sequence[Tensor], expected: Sequence[Tensor], *, narrow: bool) -> str:
    if not all(torch.isfinite(t).all() for t in expected):
        return ""  # nothing to compare with; training will say what overflowed
    narrow = narrow or expected[0].dtype.itemsize < 4
    limit = 0.25 if narrow else 1e-3 if expected[0].dtype == torch.float32 else 1e-8
    largest = max(g.abs().max().item() for g in expected[1:])
    floors = [0.0, *(1e-3 * largest for _ in expected[1:])]  # a gradient that is 0 in theory is mere rounding
    worst = max(relative_error(a, b, floor) for a, b, floor in zip(found, expected, floors, strict=True))
    if not worst <= limit:
        return f"on the first batch, loss, logits or gradients differ from the full computation by {worst:.2g}"
    return ""


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over largest absolute value, or over `floor` where that is larger."""
    largest = max(expected.abs().max().item(), floor)
    difference = (found.to(expected.dtype) - expected).abs().max().item()
    return difference / largest if largest > 0 else difference


def _parameters(plans: Sequence[Plan]) -> list[Tensor]:
    """What is trained, each once."""
    modules = {id(plan.reft): plan.reft for plan in plans}
    return list({id(p): p for m in modules.values() for p in m.parameters() if p.requires_grad}.values())


def _dose(variant: Variant) -> float:
    return max(map(abs, variant.strength)) if isinstance(variant.strength, tuple) else abs(variant.strength)


def _within(rows: Sequence[int], lengths: Sequence[int], *, most: int) -> tuple[int, ...]:
    """The longest row, and of the others as many as fit into `most` tokens, the shortest first."""
    by_length = sorted(rows, key=lambda r: lengths[r])
    chosen, room = {by_length[-1]}, most - lengths[by_length[-1]]
    for row in by_length[:-1]:
        room -= lengths[row]
        if room < 0:
            break
        chosen.add(row)
    return tuple(r for r in rows if r in chosen)
