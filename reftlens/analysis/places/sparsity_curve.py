"""Score against the number of edited sites: gates at several prices, and the best sites of a map at equal numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reftlens import figures
from reftlens.analysis.places.site_gates import gated_sites, open_sites, pruned
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.errors import check_each_once
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.base import Intervention
from reftlens.scoring.evaluation import losses_of
from reftlens.scoring.objectives import cross_entropy
from reftlens.scoring.statistics import Estimate, accuracy_of, mean_of
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit_many

WAYS = ("gates", "map")


@dataclass(frozen=True)
class SparsityPoint:
    """One choice of sites, scored on held-out rows with the edits of these sites alone."""

    way: str
    """One of `WAYS`."""
    price: float | None
    """Of an open site in nats, for gates."""
    sites: tuple[Site, ...]
    loss: Estimate
    """Per target token, in nats."""
    accuracy: Estimate


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Held-out scores over the number of edited sites: of gates at each price, and of a map at equal numbers."""

    points: tuple[SparsityPoint, ...]
    unedited: SparsityPoint
    refts: Mapping[float, ReFT]
    """What was trained at each price, with its gates: `pruned(refts[price])` is what is scored."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    def to_frame(self) -> DataFrame:
        """One row per choice of sites."""
        records = []
        for p in (self.unedited, *self.points):
            scores = p.loss.as_columns("loss") | p.accuracy.as_columns("accuracy")
            names = "; ".join(site.vectors for site in p.sites)
            records.append({"way": p.way, "price": p.price, "open": len(p.sites), **scores, "sites": names})
        return figures.table(records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss over the number of edited sites with its interval; dashed: the unedited model."""
        ax = figures.axes(ax)
        for way, colour in zip(WAYS, (figures.ORANGE, figures.BLUE), strict=True):
            best = {len(p.sites): p.loss for p in sorted(self.points, key=lambda p: -p.loss.value) if p.way == way}
            counts = sorted(best)
            if counts:
                figures.curve(ax, counts, [best[n] for n in counts], way, colour)
        figures.level(ax, self.unedited.loss.value, "unedited model")
        ax.set_xticks(sorted({0, *(len(p.sites) for p in self.points)}))
        ax.set(xlabel="edited sites", ylabel=f"held-out loss per target token{self.among} (nats)")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        lines = [f"unedited: loss {self.unedited.loss}, accuracy {self.unedited.accuracy}{self.among}"]
        for p in self.points:
            price = "" if p.price is None else f" at {p.price:g} nats"
            lines.append(f"{p.way}{price}: {len(p.sites)} sites, loss {p.loss}, accuracy {p.accuracy}")
        return figures.screenful(lines)

    __repr__ = __str__


def sparsity(
    sites: Sequence[Site],
    make: Callable[[], Intervention],
    model: Bridge,
    train: Batch,
    test: Batch,
    prices: Sequence[float] = (0.2, 0.5, 1.0, 2.0),
    config: FitConfig = FitConfig(),
    *,
    seed: int = 0,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Sparsity:
    """Learn which of many sites to edit at each price, and score the edits of the open sites on held-out rows.

    All prices train together, in shared passes. Beside them a map: the edit of each site is trained alone, sites are
    ranked by their loss on the training rows, and as many of the best as gates were open are trained together anew.
    A gate that training left in between is rounded before it is scored.

    Args:
        sites: such as `every_head(model, "last")`.
        make: makes the edit of one site, such as `lambda: DAS(d_head, rank=1)`.
        train: as `fit` takes it, with sources where an exchange is trained.
        prices: of an open site, in nats.

    Raises:
        ValueError: for a price given twice, or what `fit` refuses.
    """
    check_each_once({"prices": prices})
    work = _Work(make, model, train, config, seed, Reuse.of(reuse), progress)
    gated = {price: gated_sites(sites, make, price) for price in prices}
    work.fit(gated)
    chosen = {price: open_sites(reft) for price, reft in gated.items()}
    plans = {"unedited": Plan(next(iter(gated.values())), Variant(strength=0.0))}
    choices: dict[str, tuple[str, float | None, tuple[Site, ...]]] = {"unedited": ("unedited", None, ())}
    for price, some in chosen.items():
        choices[f"gates {price}"] = "gates", price, some
        plans[f"gates {price}"] = Plan(pruned(gated[price], tolerance=0.5)) if some else plans["unedited"]
    for n, reft in work.best(sites, sorted({len(some) for some in chosen.values()} - {0})).items():
        choices[f"map {n}"] = "map", None, reft.sites
        plans[f"map {n}"] = Plan(reft)
    loss, accuracy = work.scores(test, list(plans.values()))
    unedited, *points = (
        SparsityPoint(*choice, mean_of(losses), accuracy_of(rights))
        for choice, losses, rights in zip(choices.values(), loss, accuracy, strict=True)
    )
    return Sparsity(tuple(points), unedited, gated, test.among)


@dataclass(frozen=True)
class _Work:
    """What all trainings share."""

    make: Callable[[], Intervention]
    model: Bridge
    train: Batch
    config: FitConfig
    seed: int
    reuse: Reuse | None
    progress: bool

    def fit(self, refts: Mapping[Any, ReFT]) -> None:
        """Train those in place that have something to train, from a start that the seed draws."""
        learning: dict[str, ReFT] = {}
        for name, reft in refts.items():
            reft.reset(self.seed)
            if any(p.requires_grad for p in reft.parameters()):
                learning[str(name)] = reft
        if learning:
            fit_many(learning, self.model, self.train, self.config, reuse=self.reuse or False, progress=self.progress)

    def best(self, sites: Sequence[Site], counts: Sequence[int]) -> dict[int, ReFT]:
        """For each count so many of the sites that are best alone, on the training rows, edited together."""
        if not counts:
            return {}
        alone = {site: ReFT({site: self.make()}) for site in sites}
        self.fit(alone)
        losses = self.scores(self.train, [Plan(reft) for reft in alone.values()])[0].mean(dim=1)
        ranked = [sites[i] for i in losses.argsort().tolist()]
        together = {n: ReFT({site: self.make() for site in ranked[:n]}) for n in counts}
        self.fit(together)
        return together

    def scores(self, data: Batch, plans: Sequence[Plan]) -> Any:
        """Loss and accuracy of every row under each plan."""
        settings: dict[str, Any] = {"batch_size": 16, "describe": "sparsity", "progress": self.progress}
        return losses_of(self.model, data, plans, cross_entropy, self.reuse, **settings)[:2]
