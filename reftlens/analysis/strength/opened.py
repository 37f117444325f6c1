"""How often gates open where they should, and what they cost where they should be shut."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from reftlens import figures
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.variant import Variant
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.gates import Gated
from reftlens.scoring.openness import Openness, openness_of
from reftlens.scoring.responses import Responses, responses
from reftlens.scoring.statistics import Estimate, mean_of, share_of
from reftlens.text.batch import Batch

ANY = "any site"


@dataclass(frozen=True, eq=False)
class Openings:
    """What gates do on rows of which it is known whether they should open. Open is `g > ½` at an edited token."""

    expected: Bool[Tensor, " row"]
    gates: tuple[Openness, ...]
    """Of each site with a gate."""
    costs: Responses | None
    """Of the targets of the rows where the gates should be shut; None where there is no such row, or no target."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Those with a gate, and `"any site"` where they are several."""
        return (*(gate.site for gate in self.gates), *([ANY] if len(self.gates) > 1 else []))

    def is_open(self, site: str | None = None) -> Bool[Tensor, " row"]:
        """Whether the gate at a site opens in each row; None: at any site."""
        rows = torch.stack([gate.widest > 0.5 for gate in self.gates])
        if site in (None, ANY):
            return rows.any(dim=0)
        return rows[index_of([gate.site for gate in self.gates], site, "site")]

    def true(self, site: str | None = None) -> Estimate:
        """Share of the rows where it should open in which it does, with the exact (Clopper-Pearson) interval."""
        return share_of(self.is_open(site)[self.expected])

    def false(self, site: str | None = None) -> Estimate:
        """Share of the rows where it should be shut in which it opens, likewise."""
        return share_of(self.is_open(site)[~self.expected])

    def tokens(self, site: str, *, expected: bool) -> Estimate:
        """Mean share of a row's edited tokens at which it is open, over rows where it should open or be shut."""
        shares = self.gates[index_of([gate.site for gate in self.gates], site, "site")].share
        shares = shares[self.expected == expected]
        return mean_of(shares[~shares.isnan()])

    @property
    def cost(self) -> dict[str, Estimate]:
        """On rows where the gates should be shut: `kl`, KL(edited ‖ unedited), and `log_prob`, what the targets gain.

        In nats per target token; empty where there was no target.
        """
        if self.costs is None:
            return {}
        return {"kl": mean_of(self.costs.kl[0]), "log_prob": mean_of(self.costs.effect[0])}

    def to_frame(self) -> DataFrame:
        """One row per site and row of the data."""
        rows = range(len(self.expected))
        return figures.table(
            [
                {"site": gate.site, "row": r, "expected": bool(self.expected[r]), "widest": w, "tokens": t}
                for gate in self.gates
                for r, w, t in zip(rows, gate.widest.tolist(), gate.share.tolist(), strict=True)
            ]
        )

    def by_site(self) -> DataFrame:
        """One row per site: true and false openings with their exact intervals."""
        rates = {"true": self.true, "false": self.false}
        columns = [[rate(site).as_columns(name) for name, rate in rates.items()] for site in self.sites]
        return figures.table([{"site": s} | a | b for s, (a, b) in zip(self.sites, columns, strict=True)], "site")

    def plot(self, ax: Axes | None = None) -> Axes:
        """True openings (blue) and false ones (orange) of each site, with exact 95 % intervals."""
        ax = figures.axes(ax)
        for name, rate, colour in (
            ("should open", self.true, figures.BLUE),
            ("should be shut", self.false, figures.ORANGE),
        ):
            for i, site in enumerate(self.sites):
                figures.interval(ax, i, rate(site), color=colour, label=name if i == 0 else None)
        ax.set_xticks(range(len(self.sites)), self.sites, rotation=15)
        ax.set(ylabel="share of rows in which the gate opens", ylim=(-0.02, 1.02))
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        lines = [
            f"{site}: opens in {self.true(site):.3f} of {int(self.expected.sum())} rows where it should, in "
            f"{self.false(site):.3f} of {int((~self.expected).sum())} where it should not"
            for site in self.sites
        ]
        if self.cost:
            cost = self.cost
            lines.append(
                f"where shut is right: KL {cost['kl']:.2g}, log-probability {cost['log_prob']:.2g} nats per token"
            )
        return figures.screenful(lines)


def openings(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    expected: Sequence[bool] | Tensor,
    *,
    variant: Variant = Variant(),
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Openings:
    """How often each gate of `reft` opens on `data`, and what the edit costs where it should be shut.

    Args:
        expected: for each row, whether the gates should open; some rows of each.
        variant: how the edit acts.

    Raises:
        ValueError: without a gate that acts, for another number of labels than rows, or all of one sort.
    """
    check_types(reft, model, data)
    labels = torch.tensor([bool(label) for label in expected])
    if len(labels) != len(data) or labels.all() or not labels.any():
        raise ValueError(
            f"expected= has {len(labels)} label(s) for {len(data)} row(s), {int(labels.sum())} of them true: give one "
            "for each row, and some rows of each sort"
        )
    gates = openness_of(reft, model, data, variant, batch_size=batch_size)
    if not gates:
        raise ValueError(f"no {Gated.kind} intervention acts at {', '.join(map(str, reft.sites))} under {variant}")
    shut, costs = data[(~labels).nonzero()[:, 0].tolist()], None
    if bool(shut.target_mask.any(dim=1).all()):
        settings = {"batch_size": batch_size, "reuse": Reuse.of(reuse), "progress": progress}
        costs = responses(model, shut, {str(variant): Plan(reft, variant)}, **settings)
    return Openings(labels, tuple(gates), costs)
