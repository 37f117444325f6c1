"""Positions × layers: the effect of each cell of an edit alone; and how the effects of its sites interact."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.places.parts import as_labelled, edited_positions, narrowed, site_labels, touched
from reftlens.analysis.statistics import Estimate, mean_of, sign_flip_tests
from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.editing.site import Where
from reftlens.scoring.responses import responses
from reftlens.text.batch import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class EffectMap:
    """Effect of the edit at each hook and position alone: log-probability gained, in nats per target token."""

    hooks: tuple[str, ...]
    positions: tuple[str, ...]
    edited: Bool[Tensor, "hook position example"]
    """Rows in which a token is edited there; the others are not counted."""
    gained: Float[Tensor, "hook position example"]
    accuracy: Float[Tensor, "hook position example"]
    """Share of an example's targets that are the most likely token."""
    seed: int = 0
    """Of the permutation tests."""

    def effect(self, hook: str, position: str) -> Estimate:
        """Of one cell, over the rows that are edited there."""
        i, j = self.hooks.index(hook), self.positions.index(position)
        return mean_of(self.gained[i, j, self.edited[i, j]])

    @property
    def mean(self) -> Float[Tensor, "hook position"]:
        """NaN where nothing is edited."""
        return torch.where(self.edited, self.gained, torch.nan).nanmean(dim=-1)

    @cached_property
    def tests(self) -> tuple[Float[Tensor, "hook position"], Float[Tensor, "hook position"]]:
        """Sign-flip p of each cell, and the same corrected for their number (Holm); NaN where nothing is edited."""
        some = self.edited.any(dim=-1)
        rows = [self.gained[i, j, self.edited[i, j]] for i, j in some.nonzero().tolist()]
        tables = [torch.full(some.shape, torch.nan, dtype=torch.float64) for _ in range(2)]
        for table, values in zip(tables, sign_flip_tests(rows, seed=self.seed), strict=True):
            table[some] = values
        return tables[0], tables[1]

    def to_frame(self) -> "DataFrame":
        """One row per cell in which something is edited."""
        import pandas as pd

        p, corrected = self.tests
        records = [
            {"hook": self.hooks[i], "position": self.positions[j], "n": int(self.edited[i, j].sum()),
             **self.effect(self.hooks[i], self.positions[j]).as_columns("effect"),
             "accuracy": self.accuracy[i, j, self.edited[i, j]].mean().item(),
             "p": p[i, j].item(), "p_holm": corrected[i, j].item()}
            for i, j in self.edited.any(dim=-1).nonzero().tolist()
        ]  # fmt: skip
        return pd.DataFrame(records)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Heat map about 0; a cell that differs from 0 (sign flips, Holm, 5 %) carries a dot."""
        ax = figures.axes(ax, width=3.4 + 0.5 * len(self.positions), height=1.6 + 0.35 * len(self.hooks))
        diverging(ax, self.mean, "log-probability gained\n(nats per target token)")
        for i, j in (self.tests[1] < 0.05).nonzero().tolist():
            ax.plot(j, i, ".", color="white", markeredgecolor="black", markersize=7)
        ax.set_xticks(range(len(self.positions)), list(self.positions))
        ax.set_yticks(range(len(self.hooks)), list(map(figures.short, self.hooks)))
        ax.set(xlabel="position", ylabel="edited at")
        return ax

    def __str__(self) -> str:
        lines = [
            f"{self.hooks[i]} at {self.positions[j]}: {self.effect(self.hooks[i], self.positions[j])}"
            for i, j in self.edited.any(dim=-1).nonzero().tolist()
        ]
        return "\n".join(["log-probability gained alone, nats per target token", *lines])


def diverging(ax: "Axes", table: Float[Tensor, "rows columns"], label: str) -> None:
    """A heat map whose middle colour is 0, rows from below, with its colour bar."""
    most = table.abs().nan_to_num().max().item() or 1.0
    image = ax.imshow(table.tolist(), origin="lower", aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=ax, label=label)
    ax.grid(visible=False)


def written(ax: "Axes", x: int, y: int, one: Estimate) -> None:
    """A value with its interval in a cell of `diverging`, light on its dark ends."""
    dark = abs(one.value) > 0.6 * ax.images[0].get_clim()[1]
    text, colour = f"{one.value:.2f}\n[{one.low:.2f}, {one.high:.2f}]", "white" if dark else "black"
    ax.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)


def effect_map(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    positions: Mapping[str, Where] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> EffectMap:
    """The effect of the edit at each hook (all its sites) and position alone.

    Args:
        positions: `{label: positions}`; None: as for `position_effects`, every edited token.
        seed: of the permutation tests.

    Raises:
        ValueError: if a row has no target, or nothing is edited at a position in any row.
    """
    chosen = edited_positions(reft, data) if positions is None else as_labelled(positions)
    hooks: dict[str, list[int]] = {}
    for i, site in enumerate(reft.sites):
        heads = "" if site.heads is None else f" heads {list(site.heads)}"
        hooks.setdefault(site.hook + heads, []).append(i)
    cells = [Variant(strength, sites=sites) for sites in hooks.values()]
    variants = [narrowed(reft, data, cell, among) for cell in cells for among in chosen.values()]
    rows = [touched(reft, data, Variant(among=a, sites=cell.sites)) for cell in cells for a in chosen.values()]
    edited = torch.stack(rows).view(len(hooks), len(chosen), len(data))
    for j in (~edited.any(dim=-1).any(dim=0)).nonzero().flatten().tolist():
        label = list(chosen)[j]
        raise ValueError(f"position {label!r} ({chosen[label]}) holds no edited token in any of {len(data)} row(s)")
    plans = [(reft, variant) for variant in variants]
    found = responses(model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe="map")
    gained, accuracy = found.effect.view(edited.shape), found.accuracy.view(edited.shape)
    return EffectMap(tuple(hooks), tuple(chosen), edited, gained, accuracy, seed)


@dataclass(frozen=True, eq=False)
class Interactions:
    """Effect of two sites together less the sum of each alone: log-probability gained, in nats per target token.

    Above 0 the sites need each other, below 0 they do the same work.
    """

    sites: tuple[str, ...]
    alone: Float[Tensor, "site example"]
    together: Float[Tensor, "site other example"]
    """Symmetric; NaN on the diagonal."""
    seed: int = 0
    """Of the permutation tests."""

    @property
    def excess(self) -> Float[Tensor, "site other example"]:
        """`effect(i and j) - effect(i) - effect(j)`; NaN on the diagonal."""
        return self.together - self.alone[:, None] - self.alone

    def interaction(self, i: int, j: int) -> Estimate:
        """Of two different sites, given by their indices."""
        if i == j:
            raise ValueError(f"site {i} was given twice: an interaction is of two sites")
        return mean_of(self.excess[i, j])

    def to_frame(self) -> "DataFrame":
        """One row per pair: the interaction with its interval, sign-flip p, and the same corrected (Holm)."""
        import pandas as pd

        pairs = list(combinations(range(len(self.sites)), 2))
        p, corrected = sign_flip_tests([self.excess[i, j] for i, j in pairs], seed=self.seed)
        records = [
            {"site": self.sites[i], "other": self.sites[j], "effect": self.alone[i].mean().item(),
             "other_effect": self.alone[j].mean().item(), "together": self.together[i, j].mean().item(),
             **self.interaction(i, j).as_columns("interaction"), "p": p[n].item(), "p_holm": corrected[n].item()}
            for n, (i, j) in enumerate(pairs)
        ]  # fmt: skip
        return pd.DataFrame(records)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The interactions about 0, each with its value and 95 % interval."""
        count = len(self.sites)
        ax = figures.axes(ax, width=3.2 + 1.1 * count, height=1.8 + 0.7 * count)
        diverging(ax, self.excess.mean(dim=-1), "interaction\n(nats per target token)")
        for i in range(count):
            for j in range(count):
                if i != j:
                    written(ax, j, i, self.interaction(i, j))
        ax.set_xticks(range(count), list(map(figures.short, self.sites)), rotation=20, ha="right")
        ax.set_yticks(range(count), list(map(figures.short, self.sites)))
        return ax

    def __str__(self) -> str:
        lines = [
            f"{self.sites[i]} and {self.sites[j]}: {self.interaction(i, j)}"
            for i, j in combinations(range(len(self.sites)), 2)
        ]
        return "\n".join(["effect together less the sum of both, nats per target token", *lines])


def interactions(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Interactions:
    """How the effects of each two sites add up. `seed`: of the permutation tests.

    Raises:
        ValueError: for fewer than two sites, a row without a target, or a site that chooses no token in any row.
    """
    count = len(reft)
    if count < 2:
        raise ValueError("this ReFT has one site, and an interaction is of two")
    chosen = [(i,) for i in range(count)] + list(combinations(range(count), 2))
    plans = [(reft, Variant(strength, sites=sites)) for sites in chosen]
    found = responses(
        model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe="interactions"
    )
    together = torch.full((count, count, len(data)), torch.nan, dtype=torch.float64)
    for (i, j), gained in zip(combinations(range(count), 2), found.effect[count:], strict=True):
        together[i, j] = together[j, i] = gained
    return Interactions(site_labels(reft), found.effect[:count], together, seed)
