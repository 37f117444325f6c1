"""What an exchange of hidden states shows: scores with controls, maps, illusions."""

from reftlens.analysis.causal.baselines import untrained_copy
from reftlens.analysis.causal.battery import controls
from reftlens.analysis.causal.control_table import Control, Controls
from reftlens.analysis.causal.disentanglement import Disentanglement, cause_isolate
from reftlens.analysis.causal.illusion import IllusionMeter, subspace_illusion
from reftlens.analysis.causal.ledger import Ledger
from reftlens.analysis.causal.manifold import ManifoldDistance, manifold_distance
from reftlens.analysis.causal.map_results import InterchangeMap
from reftlens.analysis.causal.maps import interchange_map
from reftlens.analysis.causal.permutation import permutation_p
from reftlens.analysis.causal.scores import InterchangeScores, interchange_scores, scores_table

__all__ = [
    "Control",
    "Controls",
    "Disentanglement",
    "IllusionMeter",
    "InterchangeMap",
    "InterchangeScores",
    "Ledger",
    "ManifoldDistance",
    "cause_isolate",
    "controls",
    "interchange_map",
    "interchange_scores",
    "manifold_distance",
    "permutation_p",
    "scores_table",
    "subspace_illusion",
    "untrained_copy",
]
