"""Train representation interventions on TransformerLens hook points, and understand what they learned."""

from reftlens.activations import activations
from reftlens.checkpoint import CheckpointMismatch
from reftlens.config import FitConfig
from reftlens.data import Batch, Example, Source, encode, encode_prompts, load_examples
from reftlens.engine import SiteNeverFired
from reftlens.evaluate import Evaluation, evaluate
from reftlens.fit import fit, fit_seeds, fit_together
from reftlens.generate import generate, stream
from reftlens.generation import Generation
from reftlens.hub import from_hub, push_to_hub
from reftlens.interventions import (
    DAS,
    Ablation,
    ConsReFT,
    DiReFT,
    Interchange,
    Intervention,
    LobiReFT,
    LoReFT,
    NoReFT,
    OrthoDiReFT,
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
    "CheckpointMismatch",
    "ConsReFT",
    "DiReFT",
    "Evaluation",
    "Example",
    "First",
    "FitConfig",
    "FitResult",
    "Generated",
    "Generation",
    "HookNotFound",
    "Interchange",
    "Intervention",
    "Last",
    "LoReFT",
    "LobiReFT",
    "ModelNotAvailable",
    "NoReFT",
    "Nth",
    "OrthoDiReFT",
    "Positions",
    "Prefilled",
    "Prompt",
    "ReFT",
    "Response",
    "Reuse",
    "Site",
    "SiteNeverFired",
    "Source",
    "SteeringVector",
    "Step",
    "StoreMismatch",
    "Sweep",
    "Tokens",
    "TrainingDiverged",
    "Variant",
    "activations",
    "attn_k",
    "attn_out",
    "attn_q",
    "attn_v",
    "attn_z",
    "cross_entropy",
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
    "load",
    "load_examples",
    "load_model",
    "load_pyreft",
    "load_run",
    "merged_weights",
    "mlp_out",
    "mlp_post",
    "on_transformers",
    "orthonormal",
    "parse_positions",
    "prefill",
    "preflight",
    "push_to_hub",
    "resid_mid",
    "resid_post",
    "resid_pre",
    "save",
    "sites",
    "stream",
    "sweep",
]
