"""Train representation interventions on TransformerLens hook points, and understand what they learned."""

from reftlens.analysis.causal.control_table import Control, Controls
from reftlens.analysis.causal.controls import controls, random_twin
from reftlens.analysis.causal.illusion import IllusionMeter, subspace_illusion
from reftlens.analysis.causal.interchange_map import InterchangeMap, interchange_map
from reftlens.analysis.causal.manifold import ManifoldDistance, manifold_distance
from reftlens.analysis.causal.permutation import permutation_p
from reftlens.analysis.causal.scores import (
    Disentanglement,
    InterchangeScores,
    cause_isolate,
    interchange_scores,
    scores_table,
)
from reftlens.analysis.places.composition import Composition, combined, composition, orthogonalised, vector_sum
from reftlens.analysis.places.effect_map import EffectMap, Interactions, effect_map, interactions
from reftlens.analysis.places.effects import PartEffects, position_effects, site_effects
from reftlens.analysis.places.path import EditPath, edit_path
from reftlens.analysis.statistics import Estimate
from reftlens.analysis.strength.budget import Dose, largest_dose
from reftlens.analysis.strength.dose_response import dose_response
from reftlens.analysis.strength.doses import DoseResponse
from reftlens.analysis.strength.edit_size import edit_size
from reftlens.analysis.strength.equal_kl import EqualKL, compare_at_equal_kl
from reftlens.analysis.subspaces.directions import (
    Direction,
    caa,
    difference_of_means,
    lda,
    linear_probe,
    mean_ablation,
    pca,
    random_subspace,
    repe,
)
from reftlens.analysis.subspaces.examples import DirectionExamples, direction_examples
from reftlens.analysis.subspaces.frame import Canonical, canonical
from reftlens.analysis.subspaces.geometry import SubspaceOverlap, subspace_overlap
from reftlens.analysis.subspaces.plane import Plane, plane
from reftlens.analysis.subspaces.rank_sweep import RankSweep, rank_sweep
from reftlens.analysis.subspaces.readers import SeenSplit, seen_split
from reftlens.analysis.subspaces.reft_r1 import reft_r1
from reftlens.analysis.subspaces.stability import FramePath, Stability, stability
from reftlens.analysis.subspaces.tokens import DirectionTokens, direction_tokens
from reftlens.analysis.subspaces.weights import WeightOverlap, weight_overlap
from reftlens.bridge.pretrained import load_model
from reftlens.cone.reuse import Reuse
from reftlens.editing.activations import activations
from reftlens.editing.preflight import preflight, sites
from reftlens.editing.reft import ReFT, Variant
from reftlens.editing.site import (
    Site,
    attn_k,
    attn_out,
    attn_q,
    attn_v,
    attn_z,
    embed,
    final_norm,
    mlp_out,
    mlp_post,
    resid_mid,
    resid_post,
    resid_pre,
)
from reftlens.errors import CheckpointMismatch, HookNotFound, ModelNotAvailable, SiteNeverFired, TrainingDiverged
from reftlens.generation.generate import generate, stream
from reftlens.generation.prefill import Prefilled, prefill
from reftlens.generation.result import Generation
from reftlens.interventions import (
    DAS,
    Ablation,
    BoundlessDAS,
    ConsReFT,
    DiReFT,
    Interchange,
    Intervention,
    LobiReFT,
    LoReFT,
    Noise,
    NoReFT,
    OrthoDiReFT,
    ReFTr1,
    SAEMask,
    SigmoidMask,
    SteeringVector,
)
from reftlens.interventions.subspace import orthonormal
from reftlens.reports.page import report
from reftlens.scoring.evaluate import Evaluation, evaluate
from reftlens.scoring.objectives import cross_entropy
from reftlens.scoring.sweep import Sweep, sweep
from reftlens.storage.folder import StoreMismatch, load, load_run, save
from reftlens.storage.hub import from_hub, push_to_hub
from reftlens.storage.merge import merged_weights
from reftlens.storage.plain import on_transformers
from reftlens.storage.pyreft import load_pyreft
from reftlens.tasks.causal import CausalModel, Derived, Pairs
from reftlens.text.batch import Batch, Example, Source, join, resampled
from reftlens.text.encode import encode, encode_prompts, load_examples
from reftlens.text.positions import (
    All,
    At,
    First,
    Generated,
    Last,
    Nth,
    Positions,
    Prompt,
    Response,
    Tokens,
    parse_positions,
)
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit, fit_seeds, fit_together
from reftlens.training.result import FitResult
from reftlens.training.run import Step
from reftlens.widgets.slider import slider

__all__ = [
    "DAS",
    "Ablation",
    "All",
    "At",
    "Batch",
    "BoundlessDAS",
    "Canonical",
    "CausalModel",
    "CheckpointMismatch",
    "Composition",
    "ConsReFT",
    "Control",
    "Controls",
    "Derived",
    "DiReFT",
    "Direction",
    "DirectionExamples",
    "DirectionTokens",
    "Disentanglement",
    "Dose",
    "DoseResponse",
    "EditPath",
    "EffectMap",
    "EqualKL",
    "Estimate",
    "Evaluation",
    "Example",
    "First",
    "FitConfig",
    "FitResult",
    "FramePath",
    "Generated",
    "Generation",
    "HookNotFound",
    "IllusionMeter",
    "Interactions",
    "Interchange",
    "InterchangeMap",
    "InterchangeScores",
    "Intervention",
    "Last",
    "LoReFT",
    "LobiReFT",
    "ManifoldDistance",
    "ModelNotAvailable",
    "NoReFT",
    "Noise",
    "Nth",
    "OrthoDiReFT",
    "Pairs",
    "PartEffects",
    "Plane",
    "Positions",
    "Prefilled",
    "Prompt",
    "RankSweep",
    "ReFT",
    "ReFTr1",
    "Response",
    "Reuse",
    "SAEMask",
    "SeenSplit",
    "SigmoidMask",
    "Site",
    "SiteNeverFired",
    "Source",
    "Stability",
    "SteeringVector",
    "Step",
    "StoreMismatch",
    "SubspaceOverlap",
    "Sweep",
    "Tokens",
    "TrainingDiverged",
    "Variant",
    "WeightOverlap",
    "activations",
    "attn_k",
    "attn_out",
    "attn_q",
    "attn_v",
    "attn_z",
    "caa",
    "canonical",
    "cause_isolate",
    "combined",
    "compare_at_equal_kl",
    "composition",
    "controls",
    "cross_entropy",
    "difference_of_means",
    "direction_examples",
    "direction_tokens",
    "dose_response",
    "edit_path",
    "edit_size",
    "effect_map",
    "embed",
    "encode",
    "encode_prompts",
    "evaluate",
    "final_norm",
    "fit",
    "fit_seeds",
    "fit_together",
    "from_hub",
    "generate",
    "interactions",
    "interchange_map",
    "interchange_scores",
    "join",
    "largest_dose",
    "lda",
    "linear_probe",
    "load",
    "load_examples",
    "load_model",
    "load_pyreft",
    "load_run",
    "manifold_distance",
    "mean_ablation",
    "merged_weights",
    "mlp_out",
    "mlp_post",
    "on_transformers",
    "orthogonalised",
    "orthonormal",
    "parse_positions",
    "pca",
    "permutation_p",
    "plane",
    "position_effects",
    "prefill",
    "preflight",
    "push_to_hub",
    "random_subspace",
    "random_twin",
    "rank_sweep",
    "reft_r1",
    "repe",
    "report",
    "resampled",
    "resid_mid",
    "resid_post",
    "resid_pre",
    "save",
    "scores_table",
    "seen_split",
    "site_effects",
    "sites",
    "slider",
    "stability",
    "stream",
    "subspace_illusion",
    "subspace_overlap",
    "sweep",
    "vector_sum",
    "weight_overlap",
]
