"""Where an edit does its work: positions, sites, cells, paths, several edits together."""

from reftlens.analysis.places.composed import Composition, combined, composition, orthogonalise, vector_sum
from reftlens.analysis.places.effect_map import EffectMap, Interactions, effect_map, interactions
from reftlens.analysis.places.parts import PartEffects, position_effects, site_effects
from reftlens.analysis.places.path import EditPath, edit_path

__all__ = [
    "Composition",
    "EditPath",
    "EffectMap",
    "Interactions",
    "PartEffects",
    "combined",
    "composition",
    "edit_path",
    "effect_map",
    "interactions",
    "orthogonalise",
    "position_effects",
    "site_effects",
    "vector_sum",
]
