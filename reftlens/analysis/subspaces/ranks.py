"""How wide a subspace has to be: ranks and seeds trained together, held-out loss over rank, and its elbow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.preflight import hooks
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.errors import check_each_once
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.base import Intervention
from reftlens.interventions.family import LoReFT
from reftlens.scoring.evaluation import losses_of
from reftlens.scoring.objectives import Loss, Objective, cross_entropy
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit_many


@dataclass(frozen=True, eq=False)
class RankSweep:
    """Held-out loss of each rank and seed; `refts[rank]` are the trained interventions, seed by seed."""

    site: Site
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    losses: Float[Tensor, "ranks seeds examples"]
    """Mean per target of each held-out example (nats, for cross-entropy)."""
    unedited: Float[Tensor, " examples"]
    refts: dict[int, tuple[ReFT, ...]]

    @property
    def means(self) -> Float[Tensor, " ranks"]:
        """Over examples and seeds."""
        return self.losses.mean(dim=(1, 2))

    @property
    def errors(self) -> Float[Tensor, " ranks"]:
        """Standard error of each mean: examples and seeds, as two independent samples."""
        parts = [self.losses.mean(dim=1), self.losses.mean(dim=2)]
        squares = [p.var(dim=1) / p.shape[1] if p.shape[1] > 1 else torch.zeros(len(p)).double() for p in parts]
        return (squares[0] + squares[1]).sqrt()

    @property
    def best(self) -> int:
        """The rank with the lowest mean."""
        return self.ranks[int(self.means.argmin())]

    @property
    def elbow(self) -> int:
        """The smallest rank within one standard error of the best (Breiman et al. 1984, the 1-SE rule)."""
        best = int(self.means.argmin())
        within = self.means <= self.means[best] + self.errors[best]
        return min(rank for rank, ok in zip(self.ranks, within.tolist(), strict=True) if ok)

    def to_frame(self) -> DataFrame:
        """One row per rank and seed."""
        table = self.losses.mean(dim=2)
        records = []
        for i, rank in enumerate(self.ranks):
            of_rank = {"mean": self.means[i].item(), "standard_error": self.errors[i].item()}
            of_rank |= {"unedited": self.unedited.mean().item(), "elbow": rank == self.elbow}
            for seed, loss in zip(self.seeds, table[i].tolist(), strict=True):
                records.append({"rank": rank, "seed": seed, "loss": loss, **of_rank})
        return figures.table(records)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """Held-out loss over rank, ± one standard error, seeds as dots; dashed: the unedited model; ring: the elbow."""
        ax = figures.axes(ax)
        for seed in range(len(self.seeds)):
            ax.scatter(self.ranks, self.losses[:, seed].mean(dim=1).tolist(), s=10, color=figures.GREY)
        means, errors = self.means.tolist(), self.errors.tolist()
        style = {"color": color, "marker": "o", "markersize": 4, "label": figures.entry(ax, label or "mean over seeds")}
        line = ax.errorbar(self.ranks, means, yerr=errors, **style).lines[0]
        ring = {"color": line.get_color(), "markersize": 11, "fillstyle": "none"}
        name = figures.entry(ax, label, f"elbow: rank {self.elbow}")
        ax.plot(self.elbow, means[self.ranks.index(self.elbow)], "o", **ring, label=name)
        figures.level(ax, self.unedited.mean().item(), "unedited model")
        ax.set_xscale("log", base=2)
        ax.set_xticks(self.ranks, [str(r) for r in self.ranks])
        ax.set(xlabel="rank", ylabel="held-out loss per target token (nats)", ylim=(0, None))
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        losses = ", ".join(f"{r}: {m:.3f}" for r, m in zip(self.ranks, self.means.tolist(), strict=True))
        return f"{self.site}: held-out loss by rank {losses}; unedited {self.unedited.mean():.3f}; elbow {self.elbow}"


def rank_sweep(
    model: Bridge,
    data: Batch,
    site: Site,
    ranks: Sequence[int],
    *,
    validation: Batch,
    kind: Callable[[int, int], Intervention] = LoReFT,
    seeds: Sequence[int] = (0, 1, 2),
    config: FitConfig = FitConfig(),
    objective: Objective | Loss = cross_entropy,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> RankSweep:
    """Train every rank with every seed, in shared passes through the model, and score each on held-out examples.

    Args:
        kind: called as `kind(d, rank)`: `LoReFT`, `DAS`, or a function of yours with other settings.
        validation: not used for training, unless `config.patience` says when to stop by it.
        config: of each run; `seeds` take the place of its seed.

    Raises:
        ValueError: without ranks or seeds, or where one is given twice; and as `fit_many`.
    """
    check_each_once({"ranks": ranks, "seeds": seeds})
    d = hooks(model).width(site)
    copies = {rank: ReFT({site: kind(d, rank)}).seeds(seeds) for rank in sorted(ranks)}
    refts = {f"rank {rank}, {seed}": reft for rank in copies for seed, reft in copies[rank].items()}
    watched = None if config.patience is None else validation
    fit_many(refts, model, data, config, validation=watched, objective=objective, reuse=reuse, progress=progress)
    every = list(refts.values())
    plans = [Plan(every[0], Variant(strength=0.0)), *map(Plan, every)]
    losses, *_ = losses_of(
        model, validation, plans, objective, Reuse.of(reuse), batch_size=batch_size, describe="ranks", progress=progress
    )
    table = losses[1:].reshape(len(copies), len(seeds), -1)
    trained = {rank: tuple(seeded.values()) for rank, seeded in copies.items()}
    return RankSweep(site, tuple(copies), tuple(seeds), table, losses[0], trained)
