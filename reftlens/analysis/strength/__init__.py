"""How strongly an edit should act: effect, divergence, size and fluency over its strength."""

from reftlens.analysis.strength.budget import Dose, largest_dose
from reftlens.analysis.strength.dose_results import DoseResponse
from reftlens.analysis.strength.doses import dose_response
from reftlens.analysis.strength.equal_kl import EqualKL, compare_at_equal_kl
from reftlens.analysis.strength.sizes import edit_size

__all__ = ["Dose", "DoseResponse", "EqualKL", "compare_at_equal_kl", "dose_response", "edit_size", "largest_dose"]
