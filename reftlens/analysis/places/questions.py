"""The questions that `effects` asks: which variants of an edit, and what is made of the responses to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from reftlens.analysis.places.effect_results import PartEffects, VariantEffects
from reftlens.analysis.places.effect_tables import CellEffects, PairEffects
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Where
from reftlens.editing.variant import Variant
from reftlens.errors import check_each_once
from reftlens.scoring.responses import Responses
from reftlens.text.batch import Batch
from reftlens.text.positions import All, Nth, Positions, Response
from reftlens.text.positions.spelling import as_positions

Effects = PartEffects | CellEffects | PairEffects | VariantEffects
Kind = Literal["positions", "sites", "cells", "pairs"]
Variants = Mapping[str, Variant]
Edited = Bool[Tensor, "variant example"]
Question = tuple[Variants, Callable[[Responses, Edited, int], Effects]]
"""What to score, and what to make of the responses, the rows that each variant edits, and a seed."""


def questions_of(
    reft: ReFT,
    data: Batch,
    kinds: Sequence[str],
    *,
    positions: Mapping[str, Where] | None = None,
    strength: float = 1.0,
) -> dict[str, Question]:
    """What is to be scored for each kind of parts."""
    whole = Variant(strength)
    makers: dict[str, Callable[[], Question]] = {
        "positions": lambda: _of_positions(whole, _places(reft, data, positions)),
        "sites": lambda: _of_sites(site_labels(reft), whole),
        "cells": lambda: _of_cells(reft, whole, _places(reft, data, positions)),
        "pairs": lambda: _of_pairs(site_labels(reft), whole),
    }
    check_each_once({"of": kinds})
    if wrong := [kind for kind in kinds if kind not in makers]:
        raise TypeError(f"of={wrong[0]!r}, expected {', '.join(map(repr, makers))}, or {{label: Variant}}")
    if positions is not None and not {"positions", "cells"} & set(kinds):
        raise ValueError(f"positions= is for of='positions' and of='cells', not for of={', '.join(map(repr, kinds))}")
    return {kind: makers[kind]() for kind in kinds}


def of_variants(reft: ReFT, data: Batch, variants: Variants) -> Question:
    wrong = [f"{label!r}: {variant!r}" for label, variant in variants.items() if not isinstance(variant, Variant)]
    if wrong or not variants:
        raise TypeError(f"of={{{', '.join(wrong)}}}, expected {{label: Variant}}, one or more")
    for label, rows in zip(variants, edited_rows(reft, data, variants), strict=True):
        if not rows.any():
            raise ValueError(f"variant {label!r} edits no token in any of {len(data)} row(s)")
    return variants, lambda r, edited, seed: VariantEffects(
        tuple(variants), edited, r.effect, r.accuracy, seed, r.among
    )


def _of_positions(whole: Variant, places: Mapping[str, Positions]) -> Question:
    alone = {label: replace(whole, among=where) for label, where in places.items()}
    left_out = {label: replace(whole, among=All() - where) for label, where in places.items()}
    return _of_parts("position", whole, alone, left_out)


def _of_sites(labels: tuple[str, ...], whole: Variant) -> Question:
    alone = {label: replace(whole, sites=(i,)) for i, label in enumerate(labels)}
    others = [[j for j in range(len(labels)) if j != i] for i in range(len(labels))]
    rest = [replace(whole, sites=sites) if sites else replace(whole, strength=0.0) for sites in others]
    return _of_parts("site", whole, alone, dict(zip(labels, rest, strict=True)))


def _of_parts(kind: str, whole: Variant, alone: Variants, left_out: Variants) -> Question:
    """The whole edit, then a block of each part alone, then a block of the edit without it."""
    variants = {"whole edit": whole} | {f"{label} alone": variant for label, variant in alone.items()}
    variants |= {f"{label} left out": variant for label, variant in left_out.items()}
    blocks = [1, len(alone), len(left_out)]

    def result(r: Responses, edited: Edited, seed: int) -> PartEffects:
        (e0, e1, e2), (a0, a1, a2) = (table.split(blocks) for table in (r.effect, r.accuracy))
        rows, before = edited.split(blocks)[1], r.unedited_accuracy
        return PartEffects(kind, tuple(alone), rows, e0[0], e1, e2, before, a0[0], a1, a2, seed, r.among)

    return variants, result


def _of_cells(reft: ReFT, whole: Variant, places: Mapping[str, Positions]) -> Question:
    hooks: dict[str, list[int]] = {}
    for i, site in enumerate(reft.sites):
        hooks.setdefault(site.vectors, []).append(i)
    variants = {
        f"{hook} at {label}": replace(whole, sites=sites, among=where)
        for hook, sites in hooks.items()
        for label, where in places.items()
    }

    def result(r: Responses, edited: Edited, seed: int) -> CellEffects:
        tables = (table.unflatten(0, (len(hooks), len(places))) for table in (edited, r.effect, r.accuracy))
        return CellEffects(tuple(hooks), tuple(places), *tables, seed=seed, among=r.among)

    return variants, result


def _of_pairs(labels: tuple[str, ...], whole: Variant) -> Question:
    count = len(labels)
    if count < 2:
        raise ValueError("this ReFT has one site, and an interaction is of two")
    pairs = list(combinations(range(count), 2))
    variants = {label: replace(whole, sites=(i,)) for i, label in enumerate(labels)}
    variants |= {f"{labels[i]} and {labels[j]}": replace(whole, sites=(i, j)) for i, j in pairs}

    def result(r: Responses, edited: Edited, seed: int) -> PairEffects:
        together = torch.full((count, count, r.effect.shape[1]), torch.nan, dtype=torch.float64)
        for (i, j), effect in zip(pairs, r.effect[count:], strict=True):
            together[i, j] = together[j, i] = effect
        return PairEffects(labels, r.effect[:count], together, seed, r.among)

    return variants, result


def site_labels(reft: ReFT) -> tuple[str, ...]:
    """The hook of each site; with its positions and heads where sites share a hook; numbered where they share these."""
    hooks = [site.hook for site in reft.sites]
    labels = [site.hook if hooks.count(site.hook) == 1 else str(site) for site in reft.sites]
    return tuple(name if labels.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(labels))


def edited_positions(reft: ReFT, data: Batch) -> dict[str, Positions]:
    """Every prompt token that a site edits in some row, by its place from the end; and what is edited after it.

    One part, where a gate decides by the prompt what is done after it: neither is there without the other.
    """
    edited, prompt = _edited_tokens(reft, data), data.prompt_mask
    deciding = [site.positions.mask(data.view) for site, module in reft.items() if module.remembers]
    if any(bool((mask & ~prompt).any()) for mask in deciding):
        return {"prompt and response": All()}
    place = prompt.long().flip(1).cumsum(dim=1).flip(1)  # 1 for the last token of a prompt
    places = place[edited & prompt].unique().flip(0).tolist()
    positions: dict[str, Positions] = {str(-k): Nth(-k, missing="skip") for k in places}
    if (edited & ~prompt).any():
        positions["response"] = Response()
    if not positions:
        raise ValueError(f"no site chooses a token in any of {len(data)} row(s)")
    return positions


def _places(reft: ReFT, data: Batch, positions: Mapping[str, Where] | None) -> dict[str, Positions]:
    """Those that are given by label, or every edited one."""
    if positions is None:
        return edited_positions(reft, data)
    if not isinstance(positions, Mapping):
        raise TypeError(f"positions={positions!r}, expected {{label: positions}}")
    if not positions:
        raise ValueError("positions={}, expected {label: positions}, or None for every edited token")
    edited, places = _edited_tokens(reft, data), {label: as_positions(where) for label, where in positions.items()}
    for label, where in places.items():
        if not (edited & where.mask(data.view)).any():
            raise ValueError(f"position {label!r} ({where}) holds no edited token in any of {len(data)} row(s)")
    return places


def _edited_tokens(reft: ReFT, data: Batch) -> Bool[Tensor, "example seq"]:
    """Those that a site chooses."""
    return torch.stack([site.positions.mask(data.view) for site in reft.sites]).any(dim=0)


def edited_rows(reft: ReFT, data: Batch, variants: Variants) -> Edited:
    """Rows in which each variant edits a token."""
    rows = torch.zeros(len(variants), len(data), dtype=torch.bool)
    for edited, variant in zip(rows, variants.values(), strict=True):
        for i in variant.active(reft.sites):
            edited |= variant.mask(reft.sites[i], data.view).any(dim=1).cpu()
    return rows


def narrowed(reft: ReFT, data: Batch, variant: Variant) -> Variant:
    """`variant` at those of its sites that have a token among its positions; strength 0 where none has."""
    if variant.among is None:
        return variant
    active = [i for i in variant.active(reft.sites) if variant.mask(reft.sites[i], data.view).any()]
    return replace(variant, sites=active) if active else replace(variant, among=None, strength=0.0)
