"""Positions and sites from an analysis: those that do the work on one half of the rows, tested on the other half."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, Literal, SupportsIndex

import torch

from reftlens import figures
from reftlens.analysis.causal.map_results import Cell, InterchangeMap
from reftlens.analysis.places.effect_results import PartEffects, VariantEffects
from reftlens.analysis.places.measuring import answered, effects
from reftlens.analysis.places.questions import edited_positions, edited_rows, questions_of, site_labels
from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.site import Site, Where, resid_post
from reftlens.editing.variant import Variant
from reftlens.errors import check_one_of, index_of
from reftlens.figures import Axes, DataFrame
from reftlens.numbers import seeded, whole
from reftlens.scoring.statistics import Estimate, share_of
from reftlens.selection.splitting import groups_of, split_groups
from reftlens.text.batch import Batch
from reftlens.text.positions import All, Positions
from reftlens.text.positions.spelling import as_positions

_OTHERS = 5


@dataclass(frozen=True, eq=False)
class Critical:
    """The parts of an edit that do its work."""

    parts: tuple[str, ...]
    """Positions or sites, the most important first."""
    reft: ReFT
    """A copy that edits there alone, to be used as it is or trained on."""
    ranking: PartEffects
    """On the half of the rows that the parts were chosen by."""
    test: VariantEffects
    """On the other half: `"whole edit"`, `"critical"`, and as many parts drawn from the others, up to five times."""

    @property
    def others(self) -> list[str]:
        """Labels of what was drawn from the other parts."""
        return [label for label in self.test.labels if label.startswith("others")]

    def to_frame(self) -> DataFrame:
        """One row per variant, on the half that nothing was chosen by."""
        return self.test.to_frame()

    def plot(self, ax: Axes | None = None) -> Axes:
        """The effects on the half that nothing was chosen by, with 95 % intervals."""
        return self.test.plot(ax)

    def __repr__(self) -> str:
        share = _in_all(self.test.effect("critical")) / _in_all(self.test.effect("whole edit"))
        lines = [
            f"critical {self.ranking.kind}s: {', '.join(self.parts)} of {len(self.ranking.parts)}",
            f"on the half that they were not chosen by, {share:.0%} of the effect of the whole edit",
            *str(self.test).split("\n"),
        ]
        return figures.screenful(lines)


def critical(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    of: Literal["positions", "sites"] = "positions",
    *,
    count: SupportsIndex = 2,
    by: Literal["alone", "lost"] = "alone",
    positions: Mapping[str, Where] | None = None,
    strength: float = 1.0,
    seed: SupportsIndex = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Critical:
    """The positions or sites of an edit that `effects` ranks highest, as a ReFT of their own.

    Critical positions in the sense of CRFT (Huang et al. 2025, arXiv 2507.10085), found by what an edit does there:
    train at many tokens, keep those that matter, train again. Chosen on one half of the rows, tested on the other,
    beside the whole edit and as many of the other parts; rows that share a prompt are in one half. A part that some
    rows do not have, such as the ninth token from the end, counts as nothing there.

    Args:
        count: how many parts are kept.
        by: the effect of a part alone, or what the edit loses without it.
        positions: `{label: positions}` to choose from, by default every edited token by its place from the end.

    Raises:
        ValueError: where there are not more parts than are to be kept, or too few rows for two halves.
    """
    check_types(reft, model, data)
    check_one_of("of", of, ("positions", "sites"))
    check_one_of("by", by, ("alone", "lost"))
    number, keep = whole(seed, "seed"), whole(count, "count", 1)
    halves = [data[rows] for rows in split_groups(groups_of(data), (0.5, 0.5), number)]
    if min(map(len, halves)) < 2:
        raise ValueError(
            f"{len(data)} row(s), expected 4 or more, of which no half shares a prompt: chosen by one half"
        )
    own = _named(reft, data, positions) if of == "positions" else None
    named: Mapping[str, Any] = dict(zip(site_labels(reft), reft.sites, strict=True)) if own is None else own
    if len(named) <= keep:
        raise ValueError(f"{len(named)} {of}, and count={keep} are to be kept: there is nothing to choose")
    settings: dict[str, Any] = {"seed": number, "batch_size": batch_size, "progress": progress}
    question = questions_of(reft, halves[0], [of], positions=own, strength=strength)
    ranked, _ = answered(reft, model, halves[0], question, {}, reuse=Reuse.of(reuse), **settings)
    ranking = ranked[of]
    assert isinstance(ranking, PartEffects)
    value = ranking.effect if by == "alone" else ranking.lost_without
    order = sorted(ranking.parts, key=lambda part: -_in_all(value(part)))
    parts = tuple(order[:keep])
    whole_edit = Variant(strength)
    alone = {part: _at(named, (part,), whole_edit) for part in order[keep:]}
    met = zip(alone, edited_rows(reft, halves[1], alone), strict=True)
    variants = _variants(named, parts, [part for part, rows in met if rows.any()], whole_edit, number)
    test = effects(reft, model, halves[1], variants, reuse=reuse, **settings)
    assert isinstance(test, VariantEffects)
    return Critical(parts, _only(reft, data, named, parts), ranking, test)


def _in_all(effect: Estimate) -> float:
    """The sum over the rows that have the part; in the others it does nothing."""
    return effect.value * effect.count


def _named(reft: ReFT, data: Batch, positions: Mapping[str, Where] | None) -> dict[str, Positions]:
    if positions is None:
        return edited_positions(reft, data)
    return {label: as_positions(where) for label, where in positions.items()}


def _variants(
    named: Mapping[str, Any], parts: tuple[str, ...], others: list[str], whole_edit: Variant, seed: int
) -> dict[str, Variant]:
    """The whole edit, some parts, and as many of the others, drawn anew each time."""
    generator, sets = seeded(seed), dict[tuple[str, ...], None]()
    for _ in range(_OTHERS if len(others) >= len(parts) else 0):
        drawn = torch.randperm(len(others), generator=generator)[: len(parts)].sort().values.tolist()
        sets.setdefault(tuple(others[i] for i in drawn))
    every = {"critical": parts} | {f"others: {', '.join(some)}": some for some in sets}
    return {"whole edit": whole_edit} | {label: _at(named, some, whole_edit) for label, some in every.items()}


def _at(named: Mapping[str, Any], parts: tuple[str, ...], variant: Variant) -> Variant:
    if isinstance(named[parts[0]], Site):
        return replace(variant, sites=[list(named).index(part) for part in parts])
    return replace(variant, among=reduce(or_, (named[part] for part in parts)))


def _only(reft: ReFT, data: Batch, named: Mapping[str, Any], parts: tuple[str, ...]) -> ReFT:
    """A copy that edits at some parts alone; where a site chose all their tokens, its positions are just these."""
    copy = reft.clone()
    if isinstance(named[parts[0]], Site):
        return ReFT({site: module for site, module in copy.items() if site in [named[part] for part in parts]})
    wanted: Positions = reduce(or_, (named[part] for part in parts))
    mask, modules = wanted.mask(data.view), {}
    for site, module in copy.items():
        both = site.positions.mask(data.view) & mask
        if both.any():
            where = wanted if bool((both == mask).all()) else site.positions - (All() - wanted)
            modules[Site(site.hook, where, site.heads)] = module
    return ReFT(modules)


def critical_sites(
    grid: InterchangeMap,
    count: SupportsIndex = 1,
    *,
    positions: Mapping[str, Where] | None = None,
    at: Callable[[int, Any], Site] = resid_post,
) -> dict[Site, Estimate]:
    """The best places of a map as sites, each with its accuracy on the half of the pairs that it was not chosen by.

    Of each layer and position the cell that is best on the choosing half counts, of whatever rank and seed.

    Args:
        positions: what the labels of the map's positions stand for, where they do not spell it.
        at: makes the site of a layer and positions, as in `interchange_map`.

    Raises:
        TypeError: for another result, such as an `EditPath`, which says what an edit passes through, not where to edit.
    """
    if not isinstance(grid, InterchangeMap):
        raise TypeError(
            f"got a {type(grid).__name__}, expected an InterchangeMap; for the places of an edit that is trained, use "
            "critical(reft, model, data), which ranks them by their effects"
        )
    best: dict[tuple[int, str], Cell] = {}
    for cell in sorted(grid.cells, key=lambda c: -sum(c.choose)):
        best.setdefault((cell.layer, cell.position), cell)
    keep = whole(count, "count", 1)
    if keep > len(best):
        raise ValueError(f"count={keep}, and the map has {len(best)} places")
    sites = {}
    for (layer, label), cell in list(best.items())[:keep]:
        if positions is not None:
            index_of(list(positions), label, "position")
        where = as_positions(label if positions is None else positions[label])
        sites[at(layer, where)] = share_of(torch.tensor(cell.report))
    return sites
