"""Activations of examples, with labels or in pairs, as directions are computed from them."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.errors import check_finite
from reftlens.numbers import tensor_of

Activations = Float[Tensor, "examples d"] | Iterable[Any]
"""Rows of numbers: what `activations` gives, or an array, a table or lists."""
Labels = Int[Tensor, " labels"] | Iterable[Any]
"""The class of each row of the activations: numbers or texts, in a tensor, an array, a Series or a list.

Classes are in the order of numbers, or of the alphabet: a direction points from `"negative"` to `"positive"`.
"""


def class_means(x: Activations, labels: Labels) -> tuple[Int[Tensor, " examples"], Float[Tensor, "classes d"]]:
    """The class of each example, counted from 0 in the order of the labels, and the mean of each class."""
    data = checked(x)
    values: Any = labels
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(listed) != len(data):
        raise ValueError(
            f"{len(listed)} labels for {len(data)} activations: one is needed for each row, which is a token that the "
            "site chooses (positions 'last' choose one in each text)"
        )
    names = sorted(set(listed))
    if len(names) < 2:
        raise ValueError(f"all labels are {names}: two classes or more are needed")
    classes = torch.tensor([names.index(label) for label in listed])
    return classes, torch.stack([data[classes == i].mean(dim=0) for i in range(len(names))])


def paired_differences(positive: Activations, negative: Activations) -> Float[Tensor, "pairs d"]:
    """Positive less negative, pair by pair."""
    more, less = checked(positive), checked(negative)
    if more.shape != less.shape:
        raise ValueError(
            f"positive has shape {list(more.shape)} and negative {list(less.shape)}: row by row they are pairs "
            "(difference_of_means takes classes of different sizes)"
        )
    return more - less


def checked(rows: Activations) -> Float[Tensor, "examples d"]:
    """Activations that a direction can be computed from, float64 on the CPU."""
    x = tensor_of(rows, "the activations")
    if x.ndim != 2 or not len(x):
        raise ValueError(f"activations of shape {list(x.shape)}, expected [examples, d], one example at least")
    check_finite(x, "the activations")
    return x.detach().cpu().double()
