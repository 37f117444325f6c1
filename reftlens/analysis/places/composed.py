"""Several edits at once: what each does to each metric, how far their effects add up, and edits made of edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.places.effect_tables import heat_map, write_cell
from reftlens.analysis.statistics import Estimate, mean_of, sign_flip_tests
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.interventions.base import Intervention
from reftlens.interventions.family import ConsReFT, LobiReFT, LoReFT, OrthoDiReFT
from reftlens.interventions.fixed import SteeringVector
from reftlens.interventions.interchange import DAS
from reftlens.scoring.responses import responses
from reftlens.text.batch import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_FRAMED = (LoReFT, OrthoDiReFT, ConsReFT, LobiReFT, DAS)


@dataclass(frozen=True, eq=False)
class Composition:
    """Effect of each edit on each metric, alone and together: log-probability gained, in nats per target token."""

    edits: tuple[str, ...]
    metrics: tuple[str, ...]
    alone: tuple[Float[Tensor, "edit _"], ...]
    """For each metric its examples."""
    together: tuple[Float[Tensor, " _"], ...]
    """Of all edits at once."""
    seed: int = 0
    """Of the permutation tests."""

    def effect(self, edit: str, metric: str) -> Estimate:
        """Of one edit on one metric."""
        return mean_of(self.alone[self.metrics.index(metric)][self.edits.index(edit)])

    def joint(self, metric: str) -> Estimate:
        """Of all edits at once."""
        return mean_of(self.together[self.metrics.index(metric)])

    def predicted(self, metric: str) -> Estimate:
        """The additive prediction: the sum of the effects of each edit alone."""
        return mean_of(self.alone[self.metrics.index(metric)].sum(dim=0))

    def error(self, metric: str) -> Estimate:
        """What all edits do at once less the additive prediction, paired."""
        return mean_of(self._errors(self.metrics.index(metric)))

    def _errors(self, j: int) -> Float[Tensor, " example"]:
        return self.together[j] - self.alone[j].sum(dim=0)

    def to_frame(self) -> "DataFrame":
        """One row per metric and edit, "together", "sum of effects" and "error".

        `p` by sign flips, `p_holm` corrected: for the number of edits × metrics, and for the number of errors.
        """
        import pandas as pd

        cells = [(j, i) for j in range(len(self.metrics)) for i in range(len(self.edits))]
        effects = sign_flip_tests([self.alone[j][i] for j, i in cells], seed=self.seed)
        errors = sign_flip_tests([self._errors(j) for j in range(len(self.metrics))], seed=self.seed)
        records = []
        for j, metric in enumerate(self.metrics):
            rows = [(edit, self.effect(edit, metric)) for edit in self.edits]
            rows += [("together", self.joint(metric)), ("sum of effects", self.predicted(metric))]
            rows += [("error", self.error(metric))]
            tests = [[p[cells.index((j, i))].item() for p in effects] for i in range(len(self.edits))]
            tests += [[float("nan")] * 2] * 2 + [[p[j].item() for p in errors]]
            for (name, one), (p, corrected) in zip(rows, tests, strict=True):
                columns = one.as_columns("effect")
                records.append({"metric": metric, "edit": name, "n": one.count, **columns, "p": p, "p_holm": corrected})
        return pd.DataFrame(records)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Edits × metrics about 0, and all of them together beside the sum; value and 95 % interval in each cell."""
        rows = ["sum of effects", "together", *reversed(self.edits)]
        ax = figures.axes(ax, width=3.2 + 1.2 * len(self.metrics), height=1.5 + 0.55 * len(rows))
        found = [
            [{"sum of effects": self.predicted, "together": self.joint}[row](m) for m in self.metrics]
            for row in rows[:2]
        ]
        found += [[self.effect(edit, metric) for metric in self.metrics] for edit in rows[2:]]
        table = torch.tensor([[one.value for one in row] for row in found])
        heat_map(ax, table, "log-probability gained\n(nats per target token)")
        for y, row in enumerate(found):
            for x, one in enumerate(row):
                write_cell(ax, x, y, one)
        ax.set_xticks(range(len(self.metrics)), list(self.metrics))
        ax.set_yticks(range(len(rows)), rows)
        ax.set(xlabel="metric", ylabel="edit")
        return ax

    def __str__(self) -> str:
        lines = []
        for metric in self.metrics:
            each = ", ".join(f"{edit} {self.effect(edit, metric)}" for edit in self.edits)
            both = f"together {self.joint(metric)}, sum {self.predicted(metric)}, error {self.error(metric)}"
            lines.append(f"{metric} (nats per target token): {each}; {both}")
        return figures.screenful(lines)


def composition(
    edits: Mapping[str, ReFT],
    model: Bridge,
    metrics: Mapping[str, Batch],
    *,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Composition:
    """What each of `edits` gains on the targets of each of `metrics`, what all do at once, and how far they add up.

    At one hook the edits act in the order given (`combined`). A metric needs the sources that any edit exchanges.

    Args:
        seed: of the permutation tests.

    Raises:
        ValueError: for fewer than two edits, no metric, a row without a target, or an edit that acts on no token of
            a metric.
    """
    if not isinstance(edits, Mapping) or not isinstance(metrics, Mapping):
        raise TypeError("expected {name: edit} and {name: batch}, so that the table can name them")
    if len(edits) < 2 or not metrics:
        raise ValueError(f"{len(edits)} edit(s) and {len(metrics)} metric(s), expected two edits and a metric or more")
    plans = {str(i): Plan(reft) for i, reft in enumerate((*edits.values(), combined(*edits.values())))}
    alone, together = [], []
    for name, data in metrics.items():
        found = responses(
            model, data, plans, batch_size=batch_size, reuse=Reuse.of(reuse), progress=progress, describe=name
        ).effect
        alone.append(found[:-1])
        together.append(found[-1])
    return Composition(tuple(edits), tuple(metrics), tuple(alone), tuple(together), seed)


def combined(*refts: ReFT) -> ReFT:
    """All sites of several ReFTs in one; at one hook they act in the order given.

    The interventions are the same objects: `.clone()` makes the result independent. A site that is there already gets
    its positions written as `p | p`, which choose the same tokens, so that both act.
    """
    if not refts:
        raise ValueError("nothing to combine: give one ReFT or more")
    joined: dict[Site, Intervention] = {}
    for reft in refts:
        for site, module in reft.items():
            while site in joined:
                site = Site(site.hook, site.positions | site.positions, site.heads)
            joined[site] = module
    return ReFT(joined)


@torch.no_grad()
def orthogonalise(refts: Sequence[ReFT]) -> list[ReFT]:
    """Copies whose bases at equal sites are orthogonal to each other: none reads or writes what another does there.

    The bases `B₁ … Bₙ` of a site are replaced by the nearest jointly orthonormal columns (symmetric, after Löwdin
    1950: `[B₁ … Bₙ] = U S Vᵀ` becomes `U Vᵀ`), so that no edit comes first; orthogonal ones stay as they are. `W` and
    `b` are kept: a LoReFT still sets the coordinates along its basis to `f(W h + b)`. What that does to the effects
    is for `composition` to say.

    Raises:
        ValueError: where a kind without an orthonormal basis of its own shares a site (LoReFT, OrthoDiReFT, ConsReFT,
            LobiReFT and DAS have one), or the bases are linearly dependent.
    """
    copies = [reft.clone() for reft in refts]
    for sites, modules in _shared(copies):
        where = ", ".join(map(str, sites))
        frames = [m.frame for m in modules if isinstance(m, _FRAMED) and m.frame is not None]
        if len(frames) < len(modules):
            kinds = ", ".join(m.kind for m in modules)
            raise ValueError(f"{kinds} meet at {where}: only LoReFT, OrthoDiReFT, ConsReFT, LobiReFT and DAS can turn")
        bases = torch.cat([frame().double() for frame in frames], dim=1)
        left, size, right = torch.linalg.svd(bases, full_matrices=False)
        if bases.shape[1] > bases.shape[0] or size[-1] < 1e-4:
            raise ValueError(
                f"the {bases.shape[1]} directions at {where} are linearly dependent (smallest singular value "
                f"{size[-1].item():.2g}): no orthogonal ones are near them; use edits of smaller rank, or other sites"
            )
        if (size - 1).abs().max() > 1e-6:  # not orthogonal already, up to rounding
            turned = (left @ right).split([frame.matrix.shape[1] for frame in frames], dim=1)
            for frame, basis in zip(frames, turned, strict=True):
                frame.set(basis)
    return copies


def _shared(refts: Sequence[ReFT]) -> list[tuple[list[Site], list[Intervention]]]:
    """Sites at which several interventions meet, with these; sites that tied interventions link are one entry."""
    groups: list[tuple[list[Site], dict[int, Intervention]]] = []
    for site in dict.fromkeys(site for reft in refts for site in reft.sites):
        sites, here = [site], {id(reft[site]): reft[site] for reft in refts if site in reft.sites}
        linked = [group for group in groups if group[1].keys() & here.keys()]
        for group in linked:
            groups.remove(group)
            sites, here = [*group[0], *sites], group[1] | here
        groups.append((sites, here))
    return [(sites, list(here.values())) for sites, here in groups if len(here) > 1]


def vector_sum(refts: Sequence[ReFT], weights: Sequence[float]) -> ReFT:
    """Steering vectors added site by site, `Σ weightᵢ vectorᵢ`; a site that a ReFT lacks counts as zero.

    `(1, -1)` subtracts, `(-1,)` negates. (Any edit is negated, doubled, … by `Variant(strength=…)`, too.)

    Raises:
        ValueError: for another kind of intervention, which is not one vector, or weights of another number.
    """
    if not refts or len(weights) != len(refts):
        raise ValueError(f"{len(refts)} ReFT(s) and {len(weights)} weight(s), expected one weight for each")
    sums: dict[Site, Tensor] = {}
    for reft, weight in zip(refts, weights, strict=True):
        for site, module in reft.items():
            if not isinstance(module, SteeringVector):
                raise ValueError(f"{module.kind} at {site} is not one vector: only a SteeringVector can be added up")
            vector = weight * module.vector.detach()
            sums[site] = sums[site] + vector if site in sums else vector
    return ReFT({site: SteeringVector(len(vector), vector) for site, vector in sums.items()})
