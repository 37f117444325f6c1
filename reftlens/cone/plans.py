"""What is to be scored: ways of editing, rows under one of them, and what came out."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from reftlens.editing.reft import Bound, Variant
from reftlens.text.batch import Batch


@dataclass(frozen=True)
class Plan:
    """One way of editing: a bound `ReFT` and how it is applied."""

    bound: Bound
    variant: Variant = field(default_factory=Variant)


@dataclass(frozen=True)
class Job:
    """Rows of the data set to be scored under one plan (its index)."""

    plan: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """A job, its rows as a batch, and the logits at their targets."""

    job: Job
    batch: Batch
    logits: Float[Tensor, "targets vocab"]
