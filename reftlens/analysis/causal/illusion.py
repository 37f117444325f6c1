"""Does a subspace carry what it moves, or does an unread direction only steer one that usually lies still?"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.causal.ledger import COMPLETE, Ledger, of_variable
from reftlens.analysis.causal.variable import about_variable, pairs_of
from reftlens.analysis.subspaces.readers import SeenSplit, seen_split
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.interchange import DAS, Interchange
from reftlens.scoring.answers import answers, first_targets
from reftlens.scoring.statistics import Estimate, difference_of, mean_of, ratio_of, share_of
from reftlens.text.batch import Batch

WAYS = ("no edit", "subspace", "seen part", "unseen part", "whole vector")
_ROUNDING = 1e-4  # nats: what an exchange that nothing reads may seem to do in float32


@dataclass(frozen=True, eq=False)
class IllusionMeter:
    """What exchanging a subspace does, beside its seen part, its unseen part and the whole vector; rows as `WAYS`."""

    hits: Bool[Tensor, "way pair"]
    """The most likely answer is the counterfactual one."""
    gained: Float[Tensor, "way pair"]
    """Log-probability of the counterfactual answer, edited less unedited, in nats."""
    splits: tuple[SeenSplit, ...]
    """One for each site."""
    norm_shares: tuple[float, ...]
    """For each site, the share of the subspace's squared norm that is seen."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""
    ledger: Ledger = COMPLETE
    """Pairs that were left out, as they exchange other variables than the one that is looked at."""

    def accuracy(self, way: str) -> Estimate:
        """Interchange accuracy of one of `WAYS`, Clopper-Pearson interval."""
        return share_of(self.hits[self._row(way)])

    def effect(self, way: str) -> Estimate:
        """Mean log-probability gained by one of `WAYS`, in nats, bootstrap interval."""
        return mean_of(self.gained[self._row(way)])

    def retained(self, way: str) -> Estimate:
        """Effect of one of `WAYS` over that of the subspace, pairs resampled together."""
        return ratio_of(self.gained[self._row(way)], self.gained[self._row("subspace")])

    @staticmethod
    def _row(way: str) -> int:
        return index_of(WAYS, way, "way to edit")

    @property
    def has_effect(self) -> bool:
        """Whether exchanging the subspace raises the answer, the interval above 0: else nothing can be retained."""
        return self.effect("subspace").low > _ROUNDING

    @property
    def beyond_whole(self) -> Estimate:
        """Effect of the subspace less that of the whole vector it is part of, in nats, paired bootstrap."""
        return difference_of(self.gained[self._row("subspace")], self.gained[self._row("whole vector")])

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each sign of an illusion, and for what keeps the split from telling."""
        return tuple(self._warnings())

    def _warnings(self) -> Iterator[str]:
        seen, unseen = self.retained("seen part"), self.retained("unseen part")
        if not self.has_effect:
            yield f"exchanging the subspace does not raise the answer ({self.effect('subspace')} nats): no effect"
        elif seen.value < 0.5 and unseen.value < 0.5:
            yield (
                f"neither part alone keeps the effect (seen {seen}, unseen {unseen}): a direction that nothing reads "
                "pushes one that is read and lies still on natural prompts, a subspace illusion"
            )
        elif seen.value < 0.5:
            yield f"the effect runs through directions that are hardly read (unseen {unseen}): raise share"
        if all(split.seen.shape[0] == split.seen.shape[1] for split in self.splits):
            yield "the readers see every direction here, so nothing is split: lower share, or name readers"
        if self.beyond_whole.low > 0:
            yield f"the subspace does more than the whole vector it is part of, by {self.beyond_whole} nats"

    def to_frame(self) -> DataFrame:
        """One row per way to edit."""
        records = []
        for way in WAYS:
            accuracy, effect = self.accuracy(way).as_columns("accuracy"), self.effect(way).as_columns("effect")
            records.append({"edit": way, **accuracy, **effect, **self.retained(way).as_columns("retained")})
        return figures.table(records, "edit")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effect of each way to edit with its interval; dashed: that of the subspace."""
        ax = figures.axes(ax, height=2.6)
        for y, way in enumerate(WAYS[1:]):
            colour = figures.ORANGE if way == "subspace" else figures.BLUE
            figures.interval(ax, y, self.effect(way), color=colour, horizontal=True)
        ax.axvline(0, color=figures.GREY, linewidth=1)
        figures.level(ax, self.effect("subspace").value, horizontal=False)
        ax.set_yticks(range(len(WAYS) - 1), list(WAYS[1:]))
        ax.invert_yaxis()
        ax.set(xlabel=f"log-probability of the counterfactual answer{self.among} gained (nats, 95 % interval)")
        return ax

    def __repr__(self) -> str:
        lines = [
            f"{split}; of the subspace's norm {100 * share:.0f} % is seen"
            for split, share in zip(self.splits, self.norm_shares, strict=True)
        ]
        lines.append(f"{'edit':<12}  {'accuracy':<20}  {'log p gained (nats)':<22}  retained share")
        for way in WAYS:
            retained = self.retained(way) if self.has_effect and way != "no edit" else ""
            lines.append(f"{way:<12}  {self.accuracy(way)!s:<20}  {self.effect(way)!s:<22}  {retained}".rstrip())
        lines.append(f"subspace less whole vector: {self.beyond_whole} nats{self.among}")
        lines += self.ledger.lines
        none = "no sign of a subspace illusion"
        if any(split.share <= 1 - 1e-9 for split in self.splits):
            none += ", as far as a graded split can tell: name the readers that matter with readers=…"
        lines += [f"warning: {w}" for w in self.warnings] or [none]
        return "\n".join(lines)


def subspace_illusion(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    variable: str | None = None,
    readers: str = "*",
    share: float | None = None,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> IllusionMeter:
    """Split an exchanged subspace by what the weights downstream see of it, and exchange each part by itself.

    With `B` the basis at a site and `P` the projector on what its readers see (`seen_split`), the seen part is the span
    of `P B`, the unseen part that of `(1 - P) B`. Each is exchanged as a subspace of its own, `h' = h + (source - h) S
    Sᵀ`. A subspace that carries the variable keeps its effect in the seen part. An illusory one needs both: the unseen
    part differs between prompts and moves nothing, the seen part moves the answer and lies still on natural prompts;
    only exchanged together does the one push the other (Makelov et al. 2023, arXiv 2311.17030). Projecting the change
    itself, `P B Bᵀ (source - h)`, could not tell: readers cannot notice what it leaves out. A second sign is that the
    subspace does more than the whole vector.

    Args:
        data: held-out pairs, targets the answers after the exchange, with sources (`pairs.encode(model)`).
        variable: which of several variables the question is about; its own columns and pairs are then looked at.
        readers: see `seen_split`.
        share: likewise.

    Raises:
        ValueError: for an intervention other than DAS, a site without known readers, or pairs without a source.
    """
    about, pairs = about_variable(reft, variable), pairs_of(data, variable)
    bases = {site: module.frame().detach() for site, module in about.items() if isinstance(module, DAS)}
    for site, module in about.items():
        if site not in bases:
            raise ValueError(
                f"{module.kind} at {site} is no plain subspace: give a DAS with its open directions, "
                "ReFT({site: module.as_das()})"
            )
    splits = {site: seen_split(model, site, readers=readers, share=share) for site in bases}
    parts = {site: splits[site].parts(basis) for site, basis in bases.items()}
    whole = ReFT({site: Interchange(len(basis)) for site, basis in bases.items()})
    refts = [None, about, *(_exchange({site: both[i] for site, both in parts.items()}) for i in (0, 1)), whole]
    unedited = Plan(about, Variant(strength=0.0))
    plans = {way: unedited if reft is None else Plan(reft) for way, reft in zip(WAYS, refts, strict=True)}
    tokens, reused = first_targets(pairs)[:, None], Reuse.of(reuse)
    scores = answers(
        model, pairs, plans, tokens, batch_size=batch_size, reuse=reused, progress=progress, describe="illusion"
    )
    log_probs = scores.log_probs[:, :, 0]
    ledger = of_variable({"held out": data}, variable)
    norms = tuple(splits[site].norm_share(basis) for site, basis in bases.items())
    return IllusionMeter(scores.hits, log_probs - log_probs[:1], tuple(splits.values()), norms, data.among, ledger)


def _exchange(bases: dict[Site, Float[Tensor, "d _"]]) -> ReFT | None:
    """An exchange in these subspaces; None where all of them are empty."""
    filled = {site: basis for site, basis in bases.items() if basis.shape[1]}
    return ReFT({site: DAS(len(basis), basis=basis) for site, basis in filled.items()}) if filled else None
