"""What a learned subspace is: directions, geometry, and what reads and writes it."""

from reftlens.analysis.subspaces.examples import DirectionExamples, direction_examples
from reftlens.analysis.subspaces.frame import PrincipalFrame, principal_frame
from reftlens.analysis.subspaces.gate_fit import GateFit, threshold_between
from reftlens.analysis.subspaces.geometry import Overlap, overlap
from reftlens.analysis.subspaces.metrics import Metric, causal_metric, metric_of
from reftlens.analysis.subspaces.orthogonal import orthogonalise
from reftlens.analysis.subspaces.projection import Plane, plane
from reftlens.analysis.subspaces.ranks import RankSweep, rank_sweep
from reftlens.analysis.subspaces.readers import SeenSplit, seen_split
from reftlens.analysis.subspaces.seeds import FramePath, Stability, stability
from reftlens.analysis.subspaces.tokens import DirectionTokens, direction_tokens
from reftlens.analysis.subspaces.weights import WeightOverlap, weight_overlap

__all__ = [
    "DirectionExamples",
    "DirectionTokens",
    "FramePath",
    "GateFit",
    "Metric",
    "Overlap",
    "Plane",
    "PrincipalFrame",
    "RankSweep",
    "SeenSplit",
    "Stability",
    "WeightOverlap",
    "causal_metric",
    "direction_examples",
    "direction_tokens",
    "metric_of",
    "orthogonalise",
    "overlap",
    "plane",
    "principal_frame",
    "rank_sweep",
    "seen_split",
    "stability",
    "threshold_between",
    "weight_overlap",
]
