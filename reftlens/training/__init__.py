"""Training of a `ReFT` on a frozen model."""

from reftlens.cone.memory import forget
from reftlens.cone.reuse import Reuse
from reftlens.editing.preflight import preflight
from reftlens.scoring.heads import HeadLoss, head_scores
from reftlens.scoring.objectives import Objective, Predictions, cross_entropy
from reftlens.text.labelled import encode_labelled
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit, fit_many
from reftlens.training.forecast import Forecast
from reftlens.training.planning import plan
from reftlens.training.preference import DPO, BiPO, RePS, SimPO, nulled, preference_pairs
from reftlens.training.result import FitResult
from reftlens.training.run import Step

__all__ = [
    "DPO",
    "BiPO",
    "FitConfig",
    "FitResult",
    "Forecast",
    "HeadLoss",
    "Objective",
    "Predictions",
    "RePS",
    "Reuse",
    "SimPO",
    "Step",
    "cross_entropy",
    "encode_labelled",
    "fit",
    "fit_many",
    "forget",
    "head_scores",
    "nulled",
    "plan",
    "preference_pairs",
    "preflight",
]
