"""Where a variable is carried: an exchange trained and scored at every layer, position, rank and seed, in one call."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens import figures
from reftlens.analysis.causal.permutation import shuffled_p
from reftlens.analysis.statistics import Estimate, holm, share_of
from reftlens.bridge.fingerprint import fingerprint
from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.editing.site import Site, resid_post
from reftlens.interventions.interchange import DAS, Interchange
from reftlens.scoring.answers import answers, first_targets
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions, as_positions
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit_together

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True)
class Cell:
    """One place, rank and seed, scored on both halves of the held-out pairs."""

    layer: int
    position: str
    rank: int
    """0 stands for the whole vector."""
    seed: int
    choose: tuple[bool, ...]
    """Hits on the half that places are chosen by."""
    report: tuple[bool, ...]
    """Hits on the other half."""
    p: float
    """Permutation p on the second half, not yet corrected for the number of cells."""


@dataclass(frozen=True)
class InterchangeMap:
    """All cells of a map. Choose by `choose`, report `report`: `best` does."""

    cells: tuple[Cell, ...]
    unedited: float
    """Share of held-out pairs that the unedited model answers so."""

    @property
    def best(self) -> tuple[Cell, Estimate]:
        """The cell that is best on one half of the held-out pairs, and its accuracy on the other."""
        cell = max(self.cells, key=lambda c: sum(c.choose) / len(c.choose))
        return cell, share_of(torch.tensor(cell.report))

    @property
    def corrected(self) -> list[float]:
        """The p of every cell, corrected for their number (Holm)."""
        return holm(torch.tensor([c.p for c in self.cells], dtype=torch.float64)).tolist()

    def to_frame(self) -> "DataFrame":
        """One row per cell; `p_holm` is corrected for the number of cells (Holm)."""
        import pandas as pd

        records = [
            {"layer": c.layer, "position": c.position, "rank": c.rank, "seed": c.seed,
             "chosen_by": sum(c.choose) / len(c.choose), **share_of(torch.tensor(c.report)).as_columns("accuracy"),
             "p": c.p, "p_holm": p}
            for c, p in zip(self.cells, self.corrected, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(records)

    def accuracy(self, rank: int | None = None) -> Float[Tensor, "layer position"]:
        """Mean over seeds of the accuracy on the reporting half; layers and positions in the order of the cells."""
        layers, positions = self.layers, self.positions
        chosen = [c for c in self.cells if rank is None or c.rank == rank]
        if not chosen:
            raise ValueError(f"no cell of rank {rank}, there are: {sorted({c.rank for c in self.cells})}")
        table = torch.full((len(layers), len(positions)), torch.nan)
        for i, layer in enumerate(layers):
            for j, position in enumerate(positions):
                here = [sum(c.report) / len(c.report) for c in chosen if (c.layer, c.position) == (layer, position)]
                table[i, j] = sum(here) / len(here) if here else torch.nan
        return table

    @property
    def layers(self) -> list[int]:
        return sorted({c.layer for c in self.cells})

    @property
    def positions(self) -> list[str]:
        return list(dict.fromkeys(c.position for c in self.cells))

    def plot(self, ax: "Axes | None" = None, *, rank: int | None = None) -> "Axes":
        """Heat map of held-out accuracy; white line in the bar: unedited model.

        A dot: the answers are likelier than shuffled ones (Holm, 5 %), which can be so where few of them change.
        """
        ax = figures.axes(ax, width=1.6 + 0.8 * len(self.positions), height=1.4 + 0.2 * len(self.layers))
        rank = max(c.rank for c in self.cells) if rank is None else rank
        table = self.accuracy(rank)
        image = ax.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
        figure = ax.get_figure(root=True)
        assert figure is not None
        bar = figure.colorbar(image, ax=ax, label="held-out interchange accuracy")
        bar.ax.axhline(self.unedited, color="white", linewidth=1.5)
        for cell, p in zip(self.cells, self.corrected, strict=True):
            if cell.rank == rank and p < 0.05:
                at = self.positions.index(cell.position), self.layers.index(cell.layer)
                ax.plot(*at, ".", color="white", markeredgecolor="black", markersize=7)
        ax.set_xticks(range(len(self.positions)), self.positions)
        ax.set_yticks(range(len(self.layers)), [str(n) for n in self.layers])
        ax.set(xlabel="position", ylabel="layer (residual after the block)")
        ax.grid(visible=False)
        return ax

    def __str__(self) -> str:
        cell, accuracy = self.best
        apart = sum(p < 0.05 for p in self.corrected)
        return (
            f"{len(self.cells)} cells; best on the choosing half: layer {cell.layer}, {cell.position}, rank "
            f"{cell.rank}, seed {cell.seed}; on the other half {accuracy}, unedited {self.unedited:.2f}\n"
            f"{apart} cell(s) differ from shuffled labels (Holm, 5 %)"
        )


@dataclass(frozen=True)
class _Layer:
    """The work of one layer, complete in itself, so that another process can do it."""

    load: Callable[[], Bridge]
    train: Batch
    test: Batch
    """Even rows are to choose by, odd ones to report."""
    sites: tuple[Site, ...]
    labels: tuple[str, ...]
    """What the positions of the sites were called."""
    layer: int
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    config: FitConfig
    shuffles: int
    reuse: bool | Reuse
    model: dict[str, Any]
    """Its fingerprint."""

    @property
    def fingerprint(self) -> str:
        """What the cells depend on."""
        said = [
            *(data.fingerprint for data in (self.train, self.test)), [repr(s) for s in self.sites],
            self.labels, self.ranks, self.seeds, asdict(self.config), self.shuffles, self.model,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def made(self, model: Bridge) -> tuple[list[ReFT], list[FitConfig], list[tuple[str, int, int]]]:
        refts, configs, places = [], [], []
        for site, label in zip(self.sites, self.labels, strict=True):
            for rank in self.ranks:
                for seed in self.seeds if rank else self.seeds[:1]:
                    width = int(model.cfg.d_model)
                    generator = torch.Generator().manual_seed(seed)
                    module = DAS(width, rank, generator=generator) if rank else Interchange(width)
                    refts.append(ReFT({site: module}))
                    configs.append(FitConfig(**{**asdict(self.config), "seed": seed}))
                    places.append((label, rank, seed))
        return refts, configs, places


def run_layers(works: Sequence[_Layer], progress: bool = False) -> list[Cell]:
    """The cells of one or more layers of a map: trained in shared passes, scored in one, the frozen part shared."""
    one = works[0]
    model, reuse = one.load(), Reuse.of(one.reuse)
    refts, configs, places = [], [], []
    for work in works:
        made = work.made(model)
        refts += made[0]
        configs += made[1]
        places += [(work.layer, *place) for place in made[2]]
    learning = [i for i, (_, _, rank, _) in enumerate(places) if rank]
    if learning:
        fit_together([refts[i] for i in learning], model, one.train, [configs[i] for i in learning], reuse=one.reuse,
                     progress=progress)  # fmt: skip
        reuse = reuse and replace(reuse, verify=False)  # the training has compared the same sites
    plans = [(refts[0], Variant(strength=0.0)), *((reft, Variant()) for reft in refts)]
    labels = first_targets(one.test)
    classes = torch.cat([labels, first_targets(one.train)]).unique()
    found = answers(model, one.test, plans, classes.expand(len(labels), -1), reuse=reuse or False, progress=progress)
    column = torch.searchsorted(classes, labels[1::2].contiguous())
    gained = (found.log_probs - found.log_probs[:1])[:, 1::2]
    return [
        Cell(layer, label, rank, seed, tuple(found.hits[n, ::2].tolist()), tuple(found.hits[n, 1::2].tolist()),
             shuffled_p(gained[n], column, None, one.shuffles, seed))
        for n, (layer, label, rank, seed) in enumerate(places, start=1)
    ]  # fmt: skip


def run_layer(work: _Layer) -> list[Cell]:
    """What an executor calls."""
    return run_layers([work])


class _Given:
    """A model that is already here."""

    def __init__(self, model: Bridge) -> None:
        self.model = model

    def __call__(self) -> Bridge:
        return self.model


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
        executor: any `concurrent.futures.Executor`; each layer is one task for it.

    Raises:
        ValueError: with an executor and a model instead of a function that loads it, or too few held-out pairs.
    """
    if not positions:
        raise ValueError("positions is empty: give one or more, such as ['last']")
    if len(test) < 4:
        raise ValueError(f"{len(test)} held-out pair(s), expected 4 or more: they are cut into two halves")
    load = _Given(model) if isinstance(model, Bridge) else model
    if executor is not None and isinstance(load, _Given):
        raise ValueError("an executor needs model=…, a function that loads the model there, e.g. rl.load_model")
    here = load()
    load = load if executor is not None else _Given(here)
    named = positions if isinstance(positions, Mapping) else {str(p): p for p in positions}
    where = [as_positions(p) for p in named.values()]
    known = fingerprint(here).to_dict()
    works = [
        _Layer(load, train, test, tuple(at(layer, p) for p in where), tuple(named), layer,
               tuple(ranks), tuple(seeds), config, shuffles, reuse, known)
        for layer in (range(here.cfg.n_layers) if layers is None else layers)
    ]  # fmt: skip
    count = sum(len(work.labels) * sum(len(work.seeds) if rank else 1 for rank in work.ranks) for work in works)
    if count >= 0.05 * (1 + shuffles):
        warnings.warn(
            f"{count} cells and {shuffles} shuffles: after Holm's correction none can differ from shuffled labels; "
            f"pass shuffles={40 * count} or more",
            stacklevel=2,
        )
    cells = _all_cells(works, None if folder is None else Path(folder), executor, progress)
    unedited = answers(here, test, [(_idle(works[0], here), Variant(strength=0.0))], first_targets(test)[:, None],
                       reuse=reuse, progress=False)  # fmt: skip
    return InterchangeMap(tuple(cells), unedited.hits[0].float().mean().item())


def _idle(work: _Layer, model: Bridge) -> ReFT:
    return ReFT({work.sites[0]: Interchange(int(model.cfg.d_model))})


def _all_cells(works: Sequence[_Layer], folder: Path | None, executor: Executor | None, progress: bool) -> list[Cell]:
    """The cells of every layer, from the folder where they are there already."""
    known = {work.layer: _read(folder, work) for work in works}
    waiting: Mapping[int, Future[list[Cell]]] = {}
    if executor is not None:
        waiting = {w.layer: executor.submit(run_layer, w) for w in works if known[w.layer] is None}
    if folder is None and executor is None:
        return run_layers(works, progress)
    cells: list[Cell] = []
    with tqdm(works, desc="map", unit="layer", disable=not progress) as bar:
        for work in bar:
            found = known[work.layer]
            if found is None:
                found = waiting[work.layer].result() if executor is not None else run_layers([work])
                _write(folder, work, found)
            cells += found
    return cells


def _file(folder: Path, work: _Layer) -> Path:
    return folder / f"layer_{work.layer:03d}.json"


def _read(folder: Path | None, work: _Layer) -> list[Cell] | None:
    if folder is None or not _file(folder, work).exists():
        return None
    stored = json.loads(_file(folder, work).read_text(encoding="utf-8"))
    if stored["fingerprint"] != work.fingerprint:
        raise ValueError(f"{_file(folder, work)} belongs to a map of other data or settings: choose another folder")
    return [Cell(**{**c, "choose": tuple(c["choose"]), "report": tuple(c["report"])}) for c in stored["cells"]]


def _write(folder: Path | None, work: _Layer, cells: Sequence[Cell]) -> None:
    """One file per layer, whole or not there at all."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, work)
    stored = {"fingerprint": work.fingerprint, "cells": [asdict(c) for c in cells]}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(stored), encoding="utf-8")
    unfinished.replace(path)
