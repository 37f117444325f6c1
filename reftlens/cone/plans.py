"""What is to be scored: ways of editing, rows under one of them, and what came out."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.text.batch import Batch

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass."""


class Plan(NamedTuple):
    """One way of editing: a `ReFT` and how it is applied."""

    reft: ReFT
    variant: Variant = Variant()


def plans_of(reft: ReFT, variants: Mapping[str, Variant]) -> dict[str, Plan]:
    """One plan for each variant of `reft`, under the same labels."""
    return {label: Plan(reft, variant) for label, variant in variants.items()}


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
