"""Train representation interventions on TransformerLens hook points, and understand what they learned."""

from reftlens.activations import activations
from reftlens.analysis.budget import Dose, largest_dose
from reftlens.analysis.composition import Composition, combined, composition, orthogonalised, vector_sum
from reftlens.analysis.control_table import Control, Controls
from reftlens.analysis.controls import controls, random_twin
from reftlens.analysis.directions import (
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
from reftlens.analysis.doses import DoseResponse
from reftlens.analysis.edit_size import edit_size
from reftlens.analysis.effect_map import EffectMap, Interactions, effect_map, interactions
from reftlens.analysis.effects import PartEffects, position_effects, site_effects
from reftlens.analysis.equal_kl import EqualKL, compare_at_equal_kl
from reftlens.analysis.estimates import Estimate
from reftlens.analysis.examples import DirectionExamples, direction_examples
from reftlens.analysis.frame import Canonical, canonical
from reftlens.analysis.geometry import SubspaceOverlap, subspace_overlap
from reftlens.analysis.illusion import IllusionMeter, subspace_illusion
from reftlens.analysis.interchange_map import InterchangeMap, interchange_map
from reftlens.analysis.manifold import ManifoldDistance, manifold_distance
from reftlens.analysis.path import EditPath, edit_path
from reftlens.analysis.permutation import permutation_p
from reftlens.analysis.plane import Plane, plane
from reftlens.analysis.rank_sweep import RankSweep, rank_sweep
from reftlens.analysis.readers import SeenSplit, seen_split
from reftlens.analysis.reft_r1 import reft_r1
from reftlens.analysis.scores import Disentanglement, InterchangeScores, cause_isolate, interchange_scores, scores_table
from reftlens.analysis.stability import FramePath, Stability, stability
from reftlens.analysis.strength import dose_response
from reftlens.analysis.tokens import DirectionTokens, direction_tokens
from reftlens.analysis.weights import WeightOverlap, weight_overlap
from reftlens.batch import Batch, Example, Source, join, resampled
from reftlens.causal import CausalModel, Derived, Pairs
from reftlens.checkpoint import CheckpointMismatch
from reftlens.config import FitConfig
from reftlens.data import encode, encode_prompts, load_examples
from reftlens.engine import SiteNeverFired
from reftlens.evaluate import Evaluation, evaluate
from reftlens.fit import fit, fit_seeds, fit_together
from reftlens.generate import generate, stream
from reftlens.generation import Generation
from reftlens.hub import from_hub, push_to_hub
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
from reftlens.merge import merged_weights
from reftlens.model import HookNotFound
from reftlens.objectives import cross_entropy
from reftlens.plain import on_transformers
from reftlens.positions import (
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
from reftlens.prefill import Prefilled, prefill
from reftlens.preflight import preflight, sites
from reftlens.pretrained import ModelNotAvailable, load_model
from reftlens.pyreft import load_pyreft
from reftlens.reft import ReFT, Variant
from reftlens.report.page import report
from reftlens.result import FitResult
from reftlens.reuse import Reuse
from reftlens.site import (
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
from reftlens.slider import slider
from reftlens.store import StoreMismatch, load, load_run, save
from reftlens.subspace import orthonormal
from reftlens.sweep import Sweep, sweep
from reftlens.training import Step, TrainingDiverged

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
