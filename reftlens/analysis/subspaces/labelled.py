"""Activations of examples, with labels or in pairs, as directions are computed from them."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.errors import check_finite

Activations = Float[Tensor, "examples d"]
Labels = Int[Tensor, " labels"] | Iterable[Any]
"""The class of each row of the activations: numbers or texts, in a tensor, an array, a Series or a list."""


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


def paired_differences(positive: Activations, negative: Float[Tensor, "others d"]) -> Float[Tensor, "pairs d"]:
    """Positive less negative, pair by pair."""
    if positive.shape != negative.shape:
        raise ValueError(
            f"positive has shape {list(positive.shape)} and negative {list(negative.shape)}: row by row they are pairs"
        )
    return checked(positive) - checked(negative)


def checked(x: Activations) -> Activations:
    """Activations that a direction can be computed from, float64 on the CPU."""
    if x.ndim != 2 or not len(x):
        raise ValueError(f"activations of shape {list(x.shape)}, expected [examples, d], one example at least")
    check_finite(x, "the activations")
    return x.detach().cpu().double()
