"""Kinds of intervention, all `h' = h + strength · code(h) @ basisᵀ`; `KINDS` is what the store can load."""

from reftlens.interventions.base import Intervention
from reftlens.interventions.family import ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT, OrthoDiReFT
from reftlens.interventions.fixed import Ablation, SteeringVector

KINDS: dict[str, type[Intervention]] = {
    c.kind: c for c in (LoReFT, DiReFT, OrthoDiReFT, NoReFT, ConsReFT, LobiReFT, SteeringVector, Ablation)
}

__all__ = [
    "KINDS",
    "Ablation",
    "ConsReFT",
    "DiReFT",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "OrthoDiReFT",
    "SteeringVector",
]
