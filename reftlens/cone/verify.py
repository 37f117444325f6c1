"""The claim of the light cone is checked: losses, logits and gradients beside those of the full computation.

Gradients only where they are asked for, in training.
"""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional as F

from reftlens.cone.full import Full
from reftlens.cone.light_cone import Cone
from reftlens.cone.plans import Job, Scored
from reftlens.editing.reft import training_mode
from reftlens.editing.variant import Variant

_SAMPLES = {True: 8, False: 4}  # plans whose cones are compared with the full computation, in training and elsewhere
_TOKENS = {True: 1024, False: 512}  # about so many are computed in full


def difference(job: Job, full: Full, cone: Cone) -> str:
    """What is wrong with `cone` on some rows of `job`, or "", measured against `full`.

    One plan is taken of every set of sites and tokens, the strongest, and their cones are computed together.
    """
    training = torch.is_grad_enabled()
    plans = _strongest(cone)
    plans = plans[:: -(-len(plans) // _SAMPLES[training])]
    rows = _within(job.rows, [span.stop for span in cone.spans], most=_TOKENS[training] // len(plans))
    samples = [Job(plan, rows) for plan in plans]
    modules = {id(p.intervention): p.intervention for bound in full.bounds for p in bound.places}.values()
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad and training}
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(training_mode(module, training=False))
        expected = _Sums(list(parameters.values()))
        for group in full.score(samples):
            expected.add(group)
        measured = _Sums(expected.parameters)
        try:
            for group in cone.score(samples):
                measured.add(group)
        except Exception as error:  # whatever a model's own code says to a stored cache: it cannot be reused
            return f"computing with stored keys and values failed: {type(error).__name__}: {error}"
        finally:
            cone.store.forget()
    with full.autocast():
        narrow = cone.reuse.half or torch.is_autocast_enabled(cone.device.type)
    return _problem(measured.all, expected.all, narrow=narrow)


def _strongest(cone: Cone) -> list[int]:
    """Of every set of sites and tokens the strongest plan, those whose cones begin lowest first."""
    strongest: dict[Hashable, int] = {}
    for i, plan in enumerate(cone.plans):
        places, variant = plan.bound.places, plan.bound.variant
        key = tuple(place.site for place in places), variant.sites, variant.among
        if key not in strongest or _dose(variant) > _dose(cone.plans[strongest[key]].bound.variant):
            strongest[key] = i
    return sorted(strongest.values(), key=lambda i: cone.plans[i].first)


class _Sums:
    """Logits of all jobs one after the other, the sum of their losses, and its gradients."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # None is 0: an edit after the last target is left out of the cone, and changes nothing in the full pass
        self.parameters, self.grads = list(parameters), [torch.zeros_like(p) for p in parameters]
        self.logits: list[Tensor] = []
        self.total = torch.zeros(())

    def add(self, group: Sequence[Scored]) -> None:
        losses = [F.cross_entropy(scored.logits.float(), scored.batch.target_ids) for scored in group]
        self.logits += [scored.logits.detach() for scored in group]
        loss = torch.stack(losses).sum()
        self.total = self.total + loss.detach().cpu()
        if self.parameters and loss.requires_grad:
            grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            self.grads = [
                total if grad is None else total + grad for total, grad in zip(self.grads, grads, strict=True)
            ]

    @property
    def all(self) -> list[Tensor]:
        return [torch.cat(self.logits), self.total, *self.grads]


def _problem(measured: Sequence[Tensor], expected: Sequence[Tensor], *, narrow: bool) -> str:
    if not all(torch.isfinite(t).all() for t in expected):
        return ""  # nothing to compare with; training will say what overflowed
    narrow = narrow or expected[0].dtype.itemsize < 4
    limit = 0.25 if narrow else 1e-3 if expected[0].dtype == torch.float32 else 1e-8
    largest = max(g.abs().max().item() for g in expected[1:])
    floors = [0.0, *(1e-3 * largest for _ in expected[1:])]  # a gradient that is 0 in theory is mere rounding
    worst = max(relative_error(a, b, floor) for a, b, floor in zip(measured, expected, floors, strict=True))
    if not worst <= limit:
        return f"on the first batch, loss, logits or gradients differ from the full computation by {worst:.2g}"
    return ""


def relative_error(measured: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over largest absolute value, or over `floor` where that is larger."""
    largest = max(expected.abs().max().item(), floor)
    error = (measured.to(expected.dtype) - expected).abs().max().item()
    return error / largest if largest > 0 else error


def _dose(variant: Variant) -> float:
    return max(map(abs, variant.strength)) if isinstance(variant.strength, tuple) else abs(variant.strength)


def _within(rows: Sequence[int], lengths: Sequence[int], *, most: int) -> tuple[int, ...]:
    """The longest row, and of the others as many as fit into `most` tokens, the shortest first."""
    by_length = sorted(rows, key=lambda r: lengths[r])
    sample, room = {by_length[-1]}, most - lengths[by_length[-1]]
    for row in by_length[:-1]:
        room -= lengths[row]
        if room < 0:
            break
        sample.add(row)
    return tuple(r for r in rows if r in sample)
