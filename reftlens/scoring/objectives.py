"""What training minimises: a function from the logits at the targets to one loss per target.

Any callable `(logits, batch) -> losses` will do. `logits` is `[targets, vocab]`, one row for each target token in
the order of `batch.target_ids` and `batch.target_rows`; `batch` is a whole micro-batch, its rows in the order of the
step, so that they can be paired; `losses` is one-dimensional, and its mean over the whole optimizer step is what is
minimised, so that accumulation does not change the result.

An objective whose losses each come from their own row of logits alone may say so by an attribute, `per_target = True`:
it is then given a few rows of a micro-batch at a time, and less memory is taken.

One that looks at more than logits, or that scores rows under several variants of the edit, is an `Objective`.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reftlens.cone.plans import Plan
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.text.batch import Batch

Loss = Callable[[Tensor, Batch], Tensor]
"""An objective that needs no more than logits."""


@dataclass(frozen=True)
class Predictions:
    """What an `Objective` sees of some rows."""

    logits: Float[Tensor, "targets vocab"]
    """Of the edited model, one row for each target; of a batch that is scored among answers a column for each."""
    batch: Batch
    plan: int = 0
    """The number of the plan that the rows were edited under, among the objective's `plans`."""
    reference: Float[Tensor, " targets"] | None = None
    """Log-probability of each target under the unedited model, in nats, where the objective asks for it."""
    activations: Mapping[str, Float[Tensor, "tokens d"]] = field(default_factory=dict)
    """Hidden states of the edited model, with gradient, at each of the objective's `sites`: row after row, after any
    edit there."""
    activation_rows: Mapping[str, Int[Tensor, " tokens"]] = field(default_factory=dict)
    """The row of each of them."""
    reft: ReFT | None = None
    """The edit that the rows are scored under."""

    @cached_property
    def log_probs(self) -> Float[Tensor, " targets"]:
        """Of each target, in nats, with gradient."""
        return -cross_entropy(self.logits, self.batch)

    def by_row(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " rows"]:
        """The sum over the targets of each row."""
        sums = torch.zeros(len(self.batch), dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.batch.target_rows, values)


class Objective(ABC):
    """What training minimises, for one that sees more than logits. Its attributes are settings that a record names.

    Cross-entropy close to the unedited model, say, with small hidden states at a layer; one loss for each row:

        class Quiet(rl.training.Objective):
            reference = True

            def __init__(self, weight, layer):
                self.weight, self.sites = weight, {"late": rl.resid_post(layer, "last")}

            def losses(self, predictions):
                moved = (predictions.log_probs - predictions.reference).square()
                size = predictions.activations["late"].square().mean(dim=1)
                return predictions.by_row(self.weight * moved - predictions.log_probs) + size
    """

    sites: Mapping[str, Site] = {}
    """Where hidden states are wanted, by a name. The light cone then holds these blocks and tokens, too."""
    logits: ClassVar[bool] = True
    """Whether logits are wanted. Without them rows need no targets, and the model may be an encoder."""
    per_target: bool = False
    """Whether each loss comes from one target, or one row, alone: then parts of a micro-batch are given, in less memory
    and time."""
    reference: ClassVar[bool] = False
    """Whether the unedited model's log-probabilities are wanted: they are computed once, before the first step."""
    group: ClassVar[int] = 1
    """So many neighbouring rows of the data belong together; `batch_size` and data order are of such groups."""

    @abstractmethod
    def losses(self, predictions: Predictions) -> Float[Tensor, " losses"]:
        """One loss for each target, row or group, in nats; the mean over an optimizer step is minimised."""

    def plans(self, reft: ReFT) -> list[Plan]:
        """The ways of editing that rows are scored under in training."""
        return [Plan(reft)]

    def drawn(self, rows: Sequence[int], generator: torch.Generator) -> dict[int, tuple[int, ...]]:
        """For each plan that a step needs the rows that it scores under it, of the `rows` of a micro-batch.

        A function of its arguments alone, so that a run can be taken up at any step.
        """
        return {0: tuple(rows)}

    def check(self, data: Batch, name: str) -> None:
        """Raise `ValueError` where data of this `name` are not of the form that the objective needs."""
        if len(data) % self.group:
            raise ValueError(f"{name} has {len(data)} rows, expected groups of {self.group}")

    @property
    def name(self) -> str:
        """What a record calls it: with its settings, and where it looks."""
        return "; ".join([repr(self), *(f"{name}: {site}" for name, site in self.sites.items())])

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k != 'sites')})"


def per_target(loss: Loss) -> bool:
    """Whether each of the losses is known to come from its own row of logits alone."""
    return loss is cross_entropy or getattr(loss, "per_target", False) is True


class _OfLogits(Objective):
    """A function of logits as an objective."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.per_target = per_target(loss)

    @property
    def name(self) -> str:
        return getattr(self.loss, "__qualname__", None) or type(self.loss).__qualname__

    def losses(self, predictions: Predictions) -> Tensor:
        return self.loss(predictions.logits, predictions.batch)


def as_objective(objective: Objective | Loss) -> Objective:
    """An objective itself, or a function of logits as one."""
    return objective if isinstance(objective, Objective) else _OfLogits(objective)


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
