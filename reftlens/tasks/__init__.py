"""Worked tasks: data, settings and scores that belong together, one module each; `causal` for models of your own."""

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

__all__ = [
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
