"""A data set scored under many ways of editing."""

from reftlens.scoring.evaluation import Evaluation
from reftlens.scoring.sweep import Sweep, sweep

__all__ = ["Evaluation", "Sweep", "sweep"]
