"""What is to be scored: ways of editing, rows under one of them, and what came out."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
    """A job, its rows as a batch, the logits at their targets, and what was watched at each site, row after row."""

    job: Job
    batch: Batch
    logits: Float[Tensor, "targets vocab"]
    activations: Mapping[str, Float[Tensor, "tokens d"]] = field(default_factory=dict)


class Way(NamedTuple):
    """How a group of rows is computed in the light cone, as far as one way may be wrong where another is right."""

    edited: frozenset[tuple[str, str]]
    """The hooks of the edits, within their blocks, and the kinds of intervention there."""
    entry: str
    """What the captured stream enters: `"embedding"` (nothing was captured), `"block"` or `"norm"`."""
    prefixed: bool
    """Whether stored keys and values stand before the rows."""
    trimmed: bool
    """Whether the last block is computed at the scored tokens only."""
    grouped: bool
    """Whether there are several groups of rows of similar length."""
    joined: bool
    """Whether several jobs share the pass."""
    shared: bool
    """Whether it goes on from a beginning of the cone that was computed once for all its rows."""


class Unsound(Exception):
    """A way of computing does not give what the full computation gives; the message says by how much."""
