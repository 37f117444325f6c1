"""Kinds of intervention, all `h' = h + strength · code(h) @ basisᵀ`; what the store can load is in `KINDS`, `GATES`."""

from reftlens.interventions.base import Intervention, Origin
from reftlens.interventions.diagonal import RED
from reftlens.interventions.family import ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT, OrthoDiReFT
from reftlens.interventions.fixed import Ablation, Noise, SteeringVector
from reftlens.interventions.gate_kinds import Schedule, Sigmoid, Threshold
from reftlens.interventions.gates import Gate, Gated
from reftlens.interventions.hard_concrete import HardConcrete
from reftlens.interventions.heads import Head
from reftlens.interventions.interchange import DAS, Interchange
from reftlens.interventions.learned_rank import BoundlessDAS, MaskedDAS
from reftlens.interventions.masks import SAEMask, SigmoidMask
from reftlens.interventions.pooled import ReFTr1
from reftlens.interventions.subspace import Frame, orthonormal

_FAMILY = (LoReFT, DiReFT, OrthoDiReFT, NoReFT, ConsReFT, LobiReFT, RED)
_EXCHANGES = (DAS, Interchange, BoundlessDAS, MaskedDAS, SigmoidMask, SAEMask)
KINDS: dict[str, type[Intervention]] = {
    c.kind: c for c in (*_FAMILY, *_EXCHANGES, SteeringVector, Ablation, Noise, ReFTr1, Gated, Head)
}
GATES: dict[str, type[Gate]] = {c.kind: c for c in (Threshold, Sigmoid, Schedule, HardConcrete)}

__all__ = [
    "DAS",
    "GATES",
    "KINDS",
    "RED",
    "Ablation",
    "BoundlessDAS",
    "ConsReFT",
    "DiReFT",
    "Frame",
    "Gate",
    "Gated",
    "HardConcrete",
    "Head",
    "Interchange",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "MaskedDAS",
    "NoReFT",
    "Noise",
    "Origin",
    "OrthoDiReFT",
    "ReFTr1",
    "SAEMask",
    "Schedule",
    "Sigmoid",
    "SigmoidMask",
    "SteeringVector",
    "Threshold",
    "orthonormal",
]
