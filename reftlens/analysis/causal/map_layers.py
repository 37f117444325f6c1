"""The work of a map: the exchanges of some layers, trained in shared passes and scored in one."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from reftlens.analysis.causal.map_results import Cell
from reftlens.analysis.causal.permutation import shuffled_p
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.interventions.interchange import DAS, Interchange
from reftlens.scoring.answers import answers, first_targets
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit_many


class Place(NamedTuple):
    """What tells the cells of a map apart."""

    layer: int
    position: str
    rank: int
    seed: int


@dataclass(frozen=True, eq=False)
class LayerWork:
    """The work of one layer, complete in itself, so that another process can do it."""

    load: Callable[[], Bridge]
    train: Batch
    test: Batch
    """Even rows are to choose by, odd ones to report."""
    layer: int
    sites: Mapping[str, Site]
    """By what their positions are called."""
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    config: FitConfig
    shuffles: int
    reuse: Reuse | None
    model: dict[str, Any]
    """Its fingerprint."""

    @property
    def fingerprint(self) -> str:
        """What the cells depend on."""
        data = (self.train.fingerprint, self.test.fingerprint)
        settings = (self.ranks, self.seeds, asdict(self.config), self.shuffles, self.model)
        sites = ([repr(site) for site in self.sites.values()], tuple(self.sites))
        return hashlib.sha256(json.dumps([*data, *sites, *settings]).encode()).hexdigest()

    @property
    def places(self) -> list[Place]:
        """One for each position, rank and seed; the whole vector is not trained, and has the first seed alone."""
        return [
            Place(self.layer, position, rank, seed)
            for position in self.sites
            for rank in self.ranks
            for seed in (self.seeds if rank else self.seeds[:1])
        ]

    def exchange(self, place: Place, d: int) -> ReFT:
        """What is trained and scored at one place, not trained yet."""
        module = DAS(d, place.rank) if place.rank else Interchange(d)
        (reft,) = ReFT({self.sites[place.position]: module}).seeds([place.seed]).values()
        return reft


def cells_of(works: Sequence[LayerWork], model: Bridge | None = None, progress: bool = False) -> list[Cell]:
    """The cells of one or more layers of a map: trained in shared passes, scored in one, the frozen part shared.

    The model is loaded where it is not given, in another process.
    """
    train, test, config, reuse = works[0].train, works[0].test, works[0].config, works[0].reuse
    model = works[0].load() if model is None else model
    exchanges = {place: work.exchange(place, int(model.cfg.d_model)) for work in works for place in work.places}
    learning = {str(place): reft for place, reft in exchanges.items() if place.rank}
    if learning:
        fit_many(learning, model, train, config, reuse=reuse or False, progress=progress)
        reuse = reuse and replace(reuse, verify=False)  # the training has compared the same sites
    plans = {"unedited": Plan(next(iter(exchanges.values())), Variant(strength=0.0))}
    plans |= {str(place): Plan(reft) for place, reft in exchanges.items()}
    labels = first_targets(test)
    classes = torch.cat([labels, first_targets(train)]).unique()
    scored = answers(model, test, plans, classes.expand(len(labels), -1), reuse=reuse, progress=progress)
    gains = (scored.log_probs[1:] - scored.log_probs[:1])[:, 1::2]
    column = torch.searchsorted(classes, labels[1::2].contiguous())
    cells = []
    for place, hits, gained in zip(exchanges, scored.hits[1:], gains, strict=True):
        p = shuffled_p(gained, column, None, works[0].shuffles, place.seed)
        cells.append(Cell(*place, choose=tuple(hits[::2].tolist()), report=tuple(hits[1::2].tolist()), p=p))
    return cells
