"""A `ReFT` on a model: the hooks of its sites, and what its edits are made of for a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge
from reftlens.editing.edits import Edit, Observer, Part, TokenIndex
from reftlens.editing.engine import attached
from reftlens.editing.reading import Editing
from reftlens.editing.site import Site
from reftlens.editing.sources import Donor, Exchanged, check_sources, read_donors
from reftlens.editing.variant import Variant
from reftlens.interventions.base import Intervention, Origin, Strength
from reftlens.text.batch import Batch
from reftlens.text.view import TokenView


@dataclass(frozen=True)
class Place:
    """A site on a model, and the intervention that acts there."""

    site: Site
    intervention: Intervention
    point: HookPoint
    carry: HookPoint | None = None
    """See `Edit.carry`."""

    @property
    def spot(self) -> tuple[Any, ...]:
        """Equal for two places where the same would be edited."""
        return self.point.name, self.carry is None, self.site.positions, self.site.heads

    @property
    def looks_around(self) -> bool:
        """Whether the edit of a token depends on where in the text it stands."""
        return self.intervention.pools or self.intervention.counts

    def strength(self, variant: Variant) -> Strength:
        """The variant's strength here: a float, or a `[rank]` vector."""
        if not isinstance(variant.strength, tuple):
            return variant.strength
        module = self.intervention
        if len(variant.strength) != module.rank:
            raise ValueError(
                f"strength has {len(variant.strength)} values, and {module.kind} at {self.site} has rank {module.rank}"
            )
        return torch.tensor(variant.strength, dtype=torch.float32)

    def edit(
        self,
        tokens: TokenIndex,
        strength: Strength,
        *,
        steps: Tensor | None = None,
        decided: Tensor | None = None,
        basis: Tensor | None = None,
        source: Tensor | None = None,
        observer: Observer | None = None,
    ) -> Edit:
        """What acts here on `tokens` in one forward pass. Every edit is made by this function, whole.

        Args:
            steps: as `Origin` has them, for an intervention that looks around.
            decided: likewise.
        """
        origin = Origin(tokens.rows, steps, decided) if self.looks_around else None
        part = Part(self.intervention, len(tokens.rows), strength, basis, source, origin)
        return Edit(self.point, [part], tokens, self.site.heads, self.carry, observer)


def skip_of(hook: str, point: HookPoint, hooks: Mapping[str, HookPoint]) -> HookPoint | None:
    """Where an edit of the residual stream in mid-block has to be added again, None for any other hook.

    The bridge's `hook_resid_mid` is the input of the norm before the MLP. The skip connection around the MLP has
    left the stream by then, so the change made there is added once more where the block ends.
    """
    if not hook.endswith(".hook_resid_mid") or (point.name or "").endswith(".hook_resid_mid"):
        return None
    return hooks[hook.removesuffix("hook_resid_mid") + "hook_resid_post"]


Places = tuple[Place, ...]
"""One for each site of a `ReFT`."""


@dataclass(frozen=True)
class Bound:
    """A `ReFT` under one variant on a data set: its hooks found, its sources read."""

    places: Places
    variant: Variant
    donors: Mapping[int, Donor]
    """What the sources of the data hold, for each active place that exchanges something."""

    @property
    def active(self) -> list[int]:
        """Indices of the places that act."""
        return self.variant.active(self.places)

    def edit(
        self, i: int, view: TokenView, rows: Sequence[int] | None = None, observer: Observer | None = None
    ) -> Edit | None:
        """What to attach for a forward pass over `view` at place `i`; None where it chooses no token there.

        `rows` of the data set are those that `view` holds, None for all.
        """
        mask = self.variant.mask(self.places[i].site, view)
        if not mask.any():
            return None
        tokens = TokenIndex.of(mask)
        owners = tokens.rows if rows is None else torch.tensor(rows, device=mask.device)[tokens.rows]
        at = tokens.rows, tokens.columns
        return self.edit_on(i, tokens, owners, view.index[at], view.steps[at], observer)

    def edit_on(
        self,
        i: int,
        tokens: TokenIndex,
        rows: Tensor,
        numbers: Tensor,
        steps: Tensor,
        observer: Observer | None = None,
    ) -> Edit:
        """The edit at place `i` on `tokens`; of each its row in the data, its number there, padding not counted, and
        its step after the prompt."""
        place = self.places[i]
        source = self.donors[i].of(rows, numbers) if i in self.donors else None
        steps = steps.to(tokens.rows.device)
        return place.edit(tokens, place.strength(self.variant), steps=steps, source=source, observer=observer)

    def edits(
        self, view: TokenView, rows: Sequence[int] | None = None, observers: Mapping[int, Observer] = {}
    ) -> list[Edit]:
        """`edit` of every active place that chooses a token in `view`."""
        edits = [self.edit(i, view, rows, observers.get(i)) for i in self.active]
        return [edit for edit in edits if edit is not None]


def bound_to(model: Bridge, data: Batch, plans: Sequence[tuple[Places, Variant]]) -> list[Bound]:
    """Each plan on `data`; sources without sources of their own are read in one pass for all of them.

    Each plan takes those sources of `data` that its sites exchange.

    Raises:
        ValueError: where a plan exchanges what the data has no source for, or the data has one that no plan exchanges.
    """
    exchanged = [exchanges_of(places, variant) for places, variant in plans]
    every = list(dict.fromkeys(exchange for exchanges in exchanged for exchange in exchanges.values()))
    if any(data.sources[name].batch.sources for name in (check_sources(data, every) if every else ())):
        taken = [{name for exchange in exchanges.values() for name in exchange.variables} for exchanges in exchanged]
        own = [replace(data, sources={k: v for k, v in data.sources.items() if k in names}) for names in taken]
        return [Bound(*plan, _donors(model, part, *plan)) for part, plan in zip(own, plans, strict=True)]
    donors = read_donors(model, data, dict(enumerate(every)))
    by_exchange = {exchange: donors[i] for i, exchange in enumerate(every) if i in donors}
    return [
        Bound(*plan, {i: by_exchange[exchange] for i, exchange in exchanges.items()})
        for plan, exchanges in zip(plans, exchanged, strict=True)
    ]


def exchanges_of(places: Places, variant: Variant) -> dict[int, Exchanged]:
    """What is exchanged, at the active places that exchange something."""
    if variant.strength == 0.0:  # the unedited model takes nothing from a source
        return {}
    active = {i: places[i] for i in variant.active(places) if places[i].intervention.variables}
    return {i: Exchanged(place.site, place.point, place.intervention.variables) for i, place in active.items()}


def _donors(model: Bridge, data: Batch, places: Places, variant: Variant, *, nested: bool = False) -> dict[int, Donor]:
    """What the sources of `data` hold, by the index of the place that takes it.

    A source may have sources itself: they are exchanged in it, at full strength, before it is read.
    """

    def editing(source: Batch) -> Editing:
        donors = _donors(model, source, places, variant, nested=True)
        inner = Bound(places, Variant(sites=tuple(donors)), donors)
        return lambda batch, rows: attached(model, inner.edits(batch.view, rows))

    return read_donors(model, data, exchanges_of(places, variant), editing, nested=nested)
