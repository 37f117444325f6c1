"""Where an edit does its work: positions, sites, cells, paths, several edits together."""

from reftlens.analysis.places.composed import Composition, composition
from reftlens.analysis.places.effect_results import PartEffects, VariantEffects
from reftlens.analysis.places.effect_tables import CellEffects, PairEffects
from reftlens.analysis.places.measuring import effects
from reftlens.analysis.places.path import EditPath, edit_path

__all__ = [
    "CellEffects",
    "Composition",
    "EditPath",
    "PairEffects",
    "PartEffects",
    "VariantEffects",
    "composition",
    "edit_path",
    "effects",
]
