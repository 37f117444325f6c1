"""How strongly an edit should act: effect, divergence, size and fluency over its strength."""

from reftlens.analysis.strength.budgets import at_kl
from reftlens.analysis.strength.doses import DoseResponse
from reftlens.analysis.strength.equal_kl import Dose, EqualKL
from reftlens.analysis.strength.opened import Openings, openings
from reftlens.analysis.strength.pooled import PooledDoses
from reftlens.analysis.strength.sizes import edit_size
from reftlens.analysis.strength.sweeps import dose_response

__all__ = [
    "Dose",
    "DoseResponse",
    "EqualKL",
    "Openings",
    "PooledDoses",
    "at_kl",
    "dose_response",
    "edit_size",
    "openings",
]
