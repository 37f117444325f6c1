"""Where a variable is carried: an exchange trained and scored at every layer, position, rank and seed, in one call."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from reftlens.analysis.causal.ledger import Ledger, without_exchange
from reftlens.analysis.causal.map_layers import LayerWork, cells_of
from reftlens.analysis.causal.map_results import Cell, InterchangeMap
from reftlens.bridge.fingerprint import fingerprint
from reftlens.bridge.protocol import Bridge, Executor, loader_of
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site, resid_post
from reftlens.editing.variant import Variant
from reftlens.errors import check_each_once
from reftlens.files import located, write_atomically
from reftlens.interventions.interchange import Interchange
from reftlens.scoring.answers import answers, first_targets
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions
from reftlens.text.positions.spelling import as_positions
from reftlens.training.config import FitConfig


def interchange_map(
    model: Bridge | Callable[[], Bridge],
    train: Batch,
    test: Batch,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[Positions | str] | Mapping[str, Positions | str] = ("last",),
    ranks: Sequence[int] = (1,),
    seeds: Sequence[int] = (0,),
    at: Callable[[int, Any], Site] = resid_post,
    config: FitConfig = FitConfig(),
    shuffles: int = 999,
    folder: str | Path | None = None,
    executor: Executor | None = None,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> InterchangeMap:
    """Train and score an exchange at every layer, position, rank and seed.

    All cells share each pass through the model, and what lies outside their cones is computed once; with a `folder` or
    an `executor`, those of each layer do.
    Held-out pairs are cut in two, every other one: places are chosen on the first half and reported on the second.

    Args:
        model: a bridge, or a function without arguments that loads one (needed with an `executor`).
        layers: all, if None. `at` makes the site of a layer and positions.
        positions: a list, or `{label: positions}`.
        ranks: of DAS; 0 stands for vanilla interchange of the whole vector, where nothing is trained.
        folder: one file per layer is written there, and read instead of computed by the next call of equal settings.
        executor: any `concurrent.futures.Executor`, or whatever has a `submit(f, x)` that gives something with a
            `.result()`; each layer is one task for it.

    Raises:
        ValueError: with an executor and a model instead of a function that loads it, too few held-out pairs, or a
            layer, rank or seed that is given twice.
    """
    if not positions:
        raise ValueError("positions is empty: give one or more, such as ['last']")
    if len(test) < 4:
        raise ValueError(f"{len(test)} held-out pair(s), expected 4 or more: they are cut into two halves")
    load = loader_of(model, executor)
    check_each_once({"ranks": ranks, "seeds": seeds} | ({} if layers is None else {"layers": layers}))
    here = load()
    named = positions if isinstance(positions, Mapping) else {str(p): p for p in positions}
    chosen = {label: as_positions(p) for label, p in named.items()}
    known = fingerprint(here).to_dict() | {"source": None}
    settings = tuple(ranks), tuple(seeds), config, shuffles, Reuse.of(reuse), known
    works = [
        LayerWork(load, train, test, layer, {label: at(layer, p) for label, p in chosen.items()}, *settings)
        for layer in (range(here.cfg.n_layers) if layers is None else layers)
    ]
    _warn_of_too_few(shuffles, sum(len(work.places) for work in works))
    cells = _all_cells(works, here, None if folder is None else located(folder), executor, progress)
    idle = ReFT({next(iter(works[0].sites.values())): Interchange(int(here.cfg.d_model))})
    plans = {"unedited": Plan(idle, Variant(strength=0.0))}
    unedited = answers(here, test, plans, first_targets(test)[:, None], reuse=Reuse.of(reuse), progress=False)
    share = unedited.hits[0, 1::2].float().mean().item()
    return InterchangeMap(tuple(cells), share, test.among, _ledger(test, works[0].sites))


def _ledger(test: Batch, sites: Mapping[str, Site]) -> Ledger:
    """Which half each pair is in, and whether something is exchanged in it at each position."""
    to_choose = torch.arange(len(test)) % 2 == 0
    reasons = {"choose": {"kept to report": ~to_choose}, "report": {"kept to choose by": to_choose}}
    for label, site in sites.items():
        reasons[f"exchanged at {label}"] = dict(without_exchange(ReFT({site: Interchange(1)}), test))
    return Ledger.of(len(test), reasons)


def _warn_of_too_few(shuffles: int, cells: int) -> None:
    if cells >= 0.05 * (1 + shuffles):
        warnings.warn(
            f"{cells} cells and {shuffles} shuffles: after Holm's correction none can differ from shuffled labels; "
            f"pass shuffles={40 * cells} or more",
            stacklevel=3,
        )


def _all_cells(
    works: Sequence[LayerWork], model: Bridge, folder: Path | None, executor: Executor | None, progress: bool
) -> list[Cell]:
    """The cells of every layer, from the folder where they are there already."""
    if folder is None and executor is None:
        return cells_of(works, model, progress)
    stored = {work: None if folder is None else read_cells(folder, work.layer, work.fingerprint) for work in works}
    tasks = {w: executor.submit(cells_of, [w]) for w in works if stored[w] is None} if executor is not None else {}
    cells: list[Cell] = []
    with tqdm(works, desc="map", unit="layer", disable=not progress) as bar:
        for work in bar:
            layer = stored[work]
            if layer is None:
                layer = tasks[work].result() if work in tasks else cells_of([work], model)
                if folder is not None:
                    write_cells(folder, work.layer, work.fingerprint, layer)
            cells += layer
    return cells


def read_cells(folder: Path, layer: int, fingerprint: str) -> list[Cell] | None:
    """The cells of a layer, None where there is no file.

    Raises:
        ValueError: where the file has another fingerprint.
    """
    path = _path(folder, layer)
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["fingerprint"] != fingerprint:
        raise ValueError(f"{path} belongs to a map of other data or settings: choose another folder")
    return [Cell(**{**c, "choose": tuple(c["choose"]), "report": tuple(c["report"])}) for c in stored["cells"]]


def write_cells(folder: Path, layer: int, fingerprint: str, cells: Sequence[Cell]) -> None:
    """Write the cells of a layer: the whole file, or none, also where several processes fill one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"fingerprint": fingerprint, "cells": [asdict(c) for c in cells]}
    write_atomically(_path(folder, layer), json.dumps(stored).encode())


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.json"
