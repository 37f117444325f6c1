"""What `effects` measured, as tables: of each hook at each position alone; and how the effects of two sites add up."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.places.effect_results import GAINED, name_ticks
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, mean_of, sign_flip_table, sign_flip_tests


def heat_map(ax: Axes, table: Float[Tensor, "rows columns"], label: str) -> None:
    """A heat map whose middle colour is 0, rows from below, with its colour bar."""
    most = table.abs().nan_to_num().max().item() or 1.0
    image = ax.imshow(table.tolist(), origin="lower", aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    figures.colour_bar(ax, image, label)
    ax.grid(visible=False)


def write_cell(ax: Axes, x: int, y: int, estimate: Estimate) -> None:
    """A value with its interval in a cell of `heat_map`, light on its dark ends."""
    dark = abs(estimate.value) > 0.6 * ax.images[0].get_clim()[1]
    text = str(estimate).replace(" ", "\n", 1)
    ax.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


@dataclass(frozen=True, eq=False)
class CellEffects:
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
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    def effect(self, hook: str, position: str) -> Estimate:
        """Of one cell, over the rows that are edited there."""
        i, j = index_of(self.hooks, hook, "hook"), index_of(self.positions, position, "position")
        return mean_of(self.gained[i, j, self.edited[i, j]])

    @property
    def mean(self) -> Float[Tensor, "hook position"]:
        """NaN where nothing is edited."""
        return torch.where(self.edited, self.gained, torch.nan).nanmean(dim=-1)

    @cached_property
    def tests(self) -> tuple[Float[Tensor, "hook position"], Float[Tensor, "hook position"]]:
        """Sign-flip p of each cell, and the same corrected for their number (Holm); NaN where nothing is edited."""
        return sign_flip_table(self.gained, self.edited, seed=self.seed)

    def _cells(self) -> list[tuple[int, int]]:
        """Those in which something is edited."""
        return [(i, j) for i, j in self.edited.any(dim=-1).nonzero().tolist()]

    def to_frame(self) -> DataFrame:
        """One row per cell in which something is edited."""
        p, corrected = self.tests
        records = []
        for i, j in self._cells():
            effect = self.effect(self.hooks[i], self.positions[j])
            record = {"hook": self.hooks[i], "position": self.positions[j], "n": effect.count}
            record |= effect.as_columns("effect") | {"accuracy": self.accuracy[i, j, self.edited[i, j]].mean().item()}
            records.append(record | {"p": p[i, j].item(), "p_holm": corrected[i, j].item()})
        return figures.table(records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Heat map about 0; a cell that differs from 0 (sign flips, Holm, 5 %) carries a dot."""
        ax = figures.axes(ax, width=3.4 + 0.5 * len(self.positions), height=1.6 + 0.35 * len(self.hooks))
        heat_map(ax, self.mean, GAINED + self.among)
        for i, j in (self.tests[1] < 0.05).nonzero().tolist():
            ax.plot(j, i, ".", color="white", markeredgecolor="black", markersize=7)
        name_ticks(ax, self.positions, turned=False)
        ax.set_yticks(range(len(self.hooks)), list(map(figures.short, self.hooks)))
        ax.set(xlabel="position", ylabel="edited at")
        return ax

    def __repr__(self) -> str:
        cells = sorted(self._cells(), key=lambda cell: -abs(self.mean[cell].item()))
        names = [(self.hooks[i], self.positions[j]) for i, j in cells]
        lines = [f"{hook} at {position}: {self.effect(hook, position)}" for hook, position in names]
        return figures.screenful(
            [f"log-probability gained alone, nats per target token{self.among}, the largest first", *lines]
        )


@dataclass(frozen=True, eq=False)
class PairEffects:
    """Effect of two sites together less the sum of each alone: log-probability gained, in nats per target token.

    Above 0 the sites need each other, below 0 they do the same work.
    """

    sites: tuple[str, ...]
    alone: Float[Tensor, "site example"]
    together: Float[Tensor, "site other example"]
    """Symmetric; NaN on the diagonal."""
    seed: int = 0
    """Of the permutation tests."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    @property
    def excess(self) -> Float[Tensor, "site other example"]:
        """`effect(i and j) - effect(i) - effect(j)`; NaN on the diagonal."""
        return self.together - self.alone[:, None] - self.alone

    def interaction(self, site: str, other: str) -> Estimate:
        """Of two different sites.

        Raises:
            ValueError: if they are one, or one is not there.
        """
        i, j = (index_of(self.sites, name, "site") for name in (site, other))
        if i == j:
            raise ValueError(f"site {site!r} was given twice: an interaction is of two sites")
        return mean_of(self.excess[i, j])

    def to_frame(self) -> DataFrame:
        """One row per pair: the interaction with its interval, sign-flip p, and the same corrected (Holm)."""
        pairs = list(combinations(range(len(self.sites)), 2))
        tests = sign_flip_tests([self.excess[i, j] for i, j in pairs], seed=self.seed)
        records = []
        for (i, j), p, corrected in zip(pairs, *map(torch.Tensor.tolist, tests), strict=True):
            record = {"site": self.sites[i], "other": self.sites[j], "effect": self.alone[i].mean().item()}
            record |= {"other_effect": self.alone[j].mean().item(), "together": self.together[i, j].mean().item()}
            record |= mean_of(self.excess[i, j]).as_columns("interaction")
            records.append(record | {"p": p, "p_holm": corrected})
        return figures.table(records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The interactions about 0, each with its value and 95 % interval."""
        count = len(self.sites)
        ax = figures.axes(ax, width=3.2 + 1.1 * count, height=1.8 + 0.7 * count)
        heat_map(ax, self.excess.mean(dim=-1), "interaction\n(nats per target token)" + self.among)
        for i, site in enumerate(self.sites):
            for j, other in enumerate(self.sites):
                if i != j:
                    write_cell(ax, j, i, self.interaction(site, other))
        name_ticks(ax, self.sites, turned=True)
        ax.set_yticks(range(count), list(map(figures.short, self.sites)))
        ax.set(xlabel="edited at", ylabel="edited at")
        return ax

    def __repr__(self) -> str:
        lines = [f"{site} and {other}: {self.interaction(site, other)}" for site, other in combinations(self.sites, 2)]
        return figures.screenful([f"effect together less the sum of both, nats per target token{self.among}", *lines])
