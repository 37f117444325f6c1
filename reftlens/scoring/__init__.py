"""A data set scored under many ways of editing."""

from reftlens.scoring.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
