"""Worked tasks: data, settings and scores that belong together, one module each.

`causal` is for models of your own, `Pairs.from_frame` for counterfactual pairs out of a table."""

from reftlens.tasks import (
    addition,
    causal,
    emoji,
    gendered_pronoun,
    hierarchical_equality,
    indirect_object,
    multiple_choice,
    price_tagging,
    ravel,
)
from reftlens.tasks.pairs import Pairs

__all__ = [
    "Pairs",
    "addition",
    "causal",
    "emoji",
    "gendered_pronoun",
    "hierarchical_equality",
    "indirect_object",
    "multiple_choice",
    "price_tagging",
    "ravel",
]
