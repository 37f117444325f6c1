"""The result of a map: its cells, the best of them, their table and their heat map."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.causal.ledger import COMPLETE, Ledger
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, holm, share_of


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
    """Share of the second half of the pairs, on which cells are reported, that the unedited model answers so."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""
    ledger: Ledger = COMPLETE
    """Which held-out pairs each half leaves to the other, and in which nothing is exchanged at a position."""

    @property
    def best(self) -> tuple[Cell, Estimate]:
        """The cell that is best on one half of the held-out pairs, and its accuracy on the other; see `ties`."""
        cell = self.ties[0]
        return cell, share_of(torch.tensor(cell.report))

    @property
    def ties(self) -> list[Cell]:
        """All cells that are as good as the best on the choosing half; `best` is the first of them."""
        most = max(_share(c.choose) for c in self.cells)
        return [c for c in self.cells if _share(c.choose) == most]

    @property
    def corrected(self) -> list[float]:
        """The p of every cell, corrected for their number (Holm)."""
        return holm(torch.tensor([c.p for c in self.cells], dtype=torch.float64)).tolist()

    def to_frame(self) -> DataFrame:
        """One row per cell; `p_holm` is corrected for the number of cells (Holm)."""
        records = []
        for cell, p in zip(self.cells, self.corrected, strict=True):
            place = {name: getattr(cell, name) for name in ("layer", "position", "rank", "seed")}
            accuracy = share_of(torch.tensor(cell.report)).as_columns("accuracy")
            records.append({**place, "chosen_by": _share(cell.choose), **accuracy, "p": cell.p, "p_holm": p})
        return figures.table(records)

    def accuracy(self, rank: int | None = None) -> Float[Tensor, "layer position"]:
        """Mean over seeds of the accuracy on the reporting half; layers and positions in the order of the cells."""
        cells = [c for c in self.cells if rank is None or c.rank == rank]
        if not cells:
            raise ValueError(f"no cell of rank {rank}, there are: {sorted({c.rank for c in self.cells})}")
        rows = figures.table([{"layer": c.layer, "position": c.position, "share": _share(c.report)} for c in cells])
        means = rows.pivot_table("share", "layer", "position").reindex(index=self.layers, columns=self.positions)
        return torch.tensor(means.to_numpy().tolist(), dtype=torch.float32)

    @property
    def layers(self) -> list[int]:
        return sorted({c.layer for c in self.cells})

    @property
    def positions(self) -> list[str]:
        return list(dict.fromkeys(c.position for c in self.cells))

    def plot(self, ax: Axes | None = None, *, rank: int | None = None) -> Axes:
        """Heat map of held-out accuracy; white line in the bar: unedited model.

        A mark: better than shuffled answers (Holm, 5 %). It is a dot where most answers are also right, a ring where
        they are not: there the subspace moves the answers, and does not make them those of the source.
        """
        ax = figures.axes(ax, width=1.6 + 0.8 * len(self.positions), height=1.4 + 0.2 * len(self.layers))
        rank = max(c.rank for c in self.cells) if rank is None else rank
        table = self.accuracy(rank)
        image = ax.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
        bar = figures.colour_bar(ax, image, f"held-out interchange accuracy{self.among}")
        bar.axhline(self.unedited, color="white", linewidth=1.5)
        for cell, p in zip(self.cells, self.corrected, strict=True):
            if cell.rank == rank and p < 0.05:
                at = self.positions.index(cell.position), self.layers.index(cell.layer)
                right = _share(cell.report) > 0.5
                ax.plot(
                    *at, "o", color="white" if right else "none", markeredgecolor="black" if right else "white", ms=4
                )
        ax.set_xticks(range(len(self.positions)), self.positions)
        ax.set_yticks(range(len(self.layers)), [str(n) for n in self.layers])
        ax.set(xlabel="position", ylabel="layer (residual after the block)")
        ax.grid(visible=False)
        return ax

    def __repr__(self) -> str:
        cell, accuracy = self.best
        apart = [c for c, p in zip(self.cells, self.corrected, strict=True) if p < 0.05]
        right = sum(_share(c.report) > 0.5 for c in apart)
        among = f", scored{self.among}" if self.among else ""
        others = f" ({len(self.ties) - 1} other cell(s) are as good there)" if len(self.ties) > 1 else ""
        text = (
            f"{len(self.cells)} cells{among}; best on the choosing half: layer {cell.layer}, {cell.position}, rank "
            f"{cell.rank}, seed {cell.seed}{others}; on the other half {accuracy}, unedited {self.unedited:.2f}\n"
            f"{len(apart)} cell(s) differ from shuffled labels (Holm, 5 %); {right} of them answer most pairs right"
        )
        return "\n".join([text, *self.ledger.lines])


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
