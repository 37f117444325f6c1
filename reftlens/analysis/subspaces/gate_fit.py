"""A gate from two sets of prompts: those where an edit should act, and those where it should not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.analysis.subspaces.directions import difference_of_means
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reading import activations
from reftlens.editing.site import Site
from reftlens.errors import check_one_of
from reftlens.interventions.gate_kinds import Rule, Threshold
from reftlens.numbers import seeded
from reftlens.scoring.statistics import Estimate, share_of
from reftlens.text.batch import Batch

_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda x: x[-1],
    "max": lambda x: x.amax(dim=0),
    "mean": lambda x: x.mean(dim=0),
}


@dataclass(frozen=True, eq=False)
class GateFit:
    """A per-prompt gate, and how it does on those prompts that its threshold is from, unlike its direction."""

    gate: Threshold
    site: Site
    true: Estimate
    """Share of the rows that should open in which it does, with the exact interval."""
    false: Estimate
    """Share of the rows that should be shut in which it opens."""
    separation: float
    """Difference of the mean projections of both sorts, in standard deviations within them."""

    def __repr__(self) -> str:
        return (
            f"{self.gate.by} projection at {self.site} over {self.gate.above:.3g}: opens in {self.true:.3f} where it "
            f"should, in {self.false:.3f} where it should not, {self.separation:.2f} standard deviations apart (on the "
            "rows that the threshold was chosen by)"
        )


def threshold_between(
    model: Bridge,
    opens: Batch,
    shut: Batch,
    site: Site,
    *,
    by: Rule = "last",
    false_openings: float = 0.02,
    seed: int = 0,
) -> GateFit:
    """A `Threshold` per prompt that opens for prompts like `opens` and not for prompts like `shut`.

    Half of each sort, drawn by `seed`, gives the direction: the difference of the mean activations at `site`, each
    row's tokens taken by the rule (for `by="max"` their mean). The other half gives the threshold: amid the gap above
    the largest projection that is to stay shut, where no more than `false_openings` of the `shut` rows are over it.
    How often it opens elsewhere is to be measured on other prompts: `strength.openings`.

    Raises:
        ValueError: for fewer than four prompts of a sort, a rule or rate that is none, or where no prompt that should
            open is over that threshold.
    """
    check_one_of("by", by, tuple(_RULES))
    if not 0 <= false_openings < 1:
        raise ValueError(f"false_openings={false_openings}, expected a share from 0, below 1")
    generator, halves = seeded(seed), list[tuple[list[Tensor], list[Tensor]]]()
    for name, data in (("opens", opens), ("shut", shut)):
        if len(data) < 4:
            raise ValueError(f"{name} has {len(data)} prompt(s), expected four or more: half are for the direction")
        rows, order = _rows(model, data, site), torch.randperm(len(data), generator=generator).tolist()
        halves.append(([rows[i] for i in order[::2]], [rows[i] for i in order[1::2]]))
    reduced = _RULES["mean" if by == "max" else by]
    means = [torch.stack([reduced(row) for row in first]) for first, _ in halves]
    labels = torch.tensor([0] * len(means[1]) + [1] * len(means[0]))
    direction = difference_of_means(torch.cat([means[1], means[0]]), labels).basis[:, 0]
    over, under = (torch.stack([_RULES[by](row.double() @ direction) for row in second]) for _, second in halves)
    lowest = under.sort(descending=True).values[int(false_openings * len(under))]
    if not (over > lowest).any():
        raise ValueError(f"no prompt that should open is over {lowest:.3g} at {site}: they are not told apart there")
    above = float((lowest + over[over > lowest].min()) / 2)
    spread = ((over.var() + under.var()) / 2).sqrt().clamp_min(1e-12)
    apart = float((over.mean() - under.mean()) / spread)
    gate = Threshold(direction.float(), above, per="prompt", by=by)
    return GateFit(gate, site, share_of(over > above), share_of(under > above), apart)


def _rows(model: Bridge, data: Batch, site: Site) -> list[Float[Tensor, "tokens d"]]:
    """Activations of the prompt tokens that the site chooses, of each row."""
    chosen = site.positions.mask(data.view)
    keep, x = data.view.prompt[chosen].cpu(), activations(model, data, site, progress=False)
    counts = (chosen & data.view.prompt).sum(dim=1).tolist()
    if not all(counts):
        raise ValueError(f"{site} chooses no token of the prompt in row {counts.index(0)}")
    return list(x[keep].split(counts))
