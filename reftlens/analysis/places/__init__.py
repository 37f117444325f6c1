"""Where an edit does its work: positions, sites, cells, paths, several edits together."""

from reftlens.analysis.places.composed import Composition, composition
from reftlens.analysis.places.effect_results import PartEffects, VariantEffects
from reftlens.analysis.places.effect_tables import CellEffects, PairEffects
from reftlens.analysis.places.measuring import effects
from reftlens.analysis.places.path import EditPath, edit_path
from reftlens.analysis.places.site_gates import every_head, gated_sites, open_sites, pruned
from reftlens.analysis.places.sparsity_curve import Sparsity, SparsityPoint, sparsity
from reftlens.analysis.places.stream_results import StreamEffects
from reftlens.analysis.places.streams import stream_effects
from reftlens.analysis.places.units import RankedUnits, Unit, ranked_units

__all__ = [
    "CellEffects",
    "Composition",
    "EditPath",
    "PairEffects",
    "PartEffects",
    "RankedUnits",
    "Sparsity",
    "SparsityPoint",
    "StreamEffects",
    "Unit",
    "VariantEffects",
    "composition",
    "edit_path",
    "effects",
    "every_head",
    "gated_sites",
    "open_sites",
    "pruned",
    "ranked_units",
    "sparsity",
    "stream_effects",
]
