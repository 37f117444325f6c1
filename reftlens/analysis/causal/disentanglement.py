"""RAVEL's scores: does an exchange change the attribute it is of, and leave the others?"""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from reftlens import figures
from reftlens.analysis.causal.scores import InterchangeScores
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.statistics import Estimate, average_of, share_of


def cause_isolate(cause: InterchangeScores, isolate: InterchangeScores) -> "Disentanglement":
    """RAVEL's scores from pairs that should change (`cause`) and pairs that should stay (`isolate`)."""
    return Disentanglement(cause.hits, isolate.hits)


@dataclass(frozen=True, eq=False)
class Disentanglement:
    """Cause, Isolate and their mean, Disentangle (Huang et al. 2024, RAVEL, arXiv 2402.17700)."""

    cause_hits: Bool[Tensor, " pair"]
    isolate_hits: Bool[Tensor, " pair"]

    @property
    def cause(self) -> Estimate:
        """Share of pairs on which the exchanged attribute takes the source's value."""
        return share_of(self.cause_hits)

    @property
    def isolate(self) -> Estimate:
        """Share of pairs on which another attribute keeps the base's value."""
        return share_of(self.isolate_hits)

    @property
    def disentangle(self) -> Estimate:
        """Mean of the two, bootstrapped over both kinds of pairs."""
        return average_of(self.cause_hits, self.isolate_hits)

    def _scores(self) -> dict[str, Estimate]:
        return {"cause": self.cause, "isolate": self.isolate, "disentangle": self.disentangle}

    def to_frame(self) -> DataFrame:
        """One row per score, with the number of pairs behind it."""
        records = [{"score": s, "n": e.count, **e.as_columns("value")} for s, e in self._scores().items()]
        return figures.table(records, "score")

    def plot(self, ax: Axes | None = None) -> Axes:
        """The three scores with their 95 % intervals."""
        ax = figures.axes(ax)
        for x, estimate in enumerate(self._scores().values()):
            figures.interval(ax, x, estimate)
        ax.set_xticks(range(3), list(self._scores()))
        ax.set(ylabel="share of pairs", ylim=(-0.02, 1.02))
        return ax

    def __repr__(self) -> str:
        return ", ".join(f"{score} {estimate}" for score, estimate in self._scores().items())
