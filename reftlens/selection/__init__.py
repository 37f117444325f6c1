"""Which edit to take: a search over places, kinds, ranks, rates and strengths, and what its answer is worth."""

from reftlens.selection.choice import Optimism, Options, optimism
from reftlens.selection.ranked import Critical, critical, critical_sites
from reftlens.selection.result import SearchResult
from reftlens.selection.searching import search
from reftlens.selection.space import Candidate, Space
from reftlens.selection.splitting import Split, split
from reftlens.selection.trials import Setting, Trial

__all__ = [
    "Candidate",
    "Critical",
    "Optimism",
    "Options",
    "SearchResult",
    "Setting",
    "Space",
    "Split",
    "Trial",
    "critical",
    "critical_sites",
    "optimism",
    "search",
    "split",
]
