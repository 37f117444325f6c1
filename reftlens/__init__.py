"""Train representation interventions on TransformerLens hook points, and understand what they learned.

The names a user meets first stand here; the rest in namespaces: `positions`, `interventions`, `directions`,
`subspaces`, `strength`, `places`, `causal`, `selection`, `generation`, `training`, `storage`, `tasks`, `experiments`,
`errors`.
"""

from reftlens import errors, experiments, generation, interventions, selection, storage, tasks, training
from reftlens.analysis import causal, places, strength, subspaces
from reftlens.analysis.causal import controls, interchange_map
from reftlens.analysis.places import effects
from reftlens.analysis.strength import dose_response
from reftlens.analysis.subspaces import directions
from reftlens.attachment.attaching import attach
from reftlens.bridge.pretrained import load_model
from reftlens.editing.preflight import hooks
from reftlens.editing.reading import activations
from reftlens.editing.reft import ReFT
from reftlens.editing.site import (
    Site,
    attn_k,
    attn_out,
    attn_q,
    attn_v,
    attn_z,
    embeddings,
    final_norm,
    mlp_out,
    mlp_post,
    resid_mid,
    resid_post,
    resid_pre,
)
from reftlens.editing.variant import Variant
from reftlens.generation import Decoding, generate
from reftlens.interventions import DAS, Ablation, DiReFT, Interchange, Intervention, LoReFT, SteeringVector
from reftlens.reports.page import report
from reftlens.scoring.evaluation import evaluate
from reftlens.selection import search
from reftlens.storage import load, save
from reftlens.text import positions
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode, encode_prompts
from reftlens.text.loading import load_examples
from reftlens.text.template import Example
from reftlens.training import FitConfig, fit, fit_many
from reftlens.widgets.live import slider

__all__ = [
    "DAS",
    "Ablation",
    "Batch",
    "Decoding",
    "DiReFT",
    "Example",
    "FitConfig",
    "Interchange",
    "Intervention",
    "LoReFT",
    "ReFT",
    "Site",
    "SteeringVector",
    "Variant",
    "activations",
    "attach",
    "attn_k",
    "attn_out",
    "attn_q",
    "attn_v",
    "attn_z",
    "causal",
    "controls",
    "directions",
    "dose_response",
    "effects",
    "embeddings",
    "encode",
    "encode_prompts",
    "errors",
    "evaluate",
    "experiments",
    "final_norm",
    "fit",
    "fit_many",
    "generate",
    "generation",
    "hooks",
    "interchange_map",
    "interventions",
    "load",
    "load_examples",
    "load_model",
    "mlp_out",
    "mlp_post",
    "places",
    "positions",
    "report",
    "resid_mid",
    "resid_post",
    "resid_pre",
    "save",
    "search",
    "selection",
    "slider",
    "storage",
    "strength",
    "subspaces",
    "tasks",
    "training",
]
