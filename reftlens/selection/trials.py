"""What became of each candidate at each rung and of each setting at the end; what each axis matters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reftlens import figures
from reftlens.figures import DataFrame
from reftlens.selection.space import Candidate


@dataclass(frozen=True)
class Trial:
    """A candidate at a rung, at the strength where it scores most within the budget."""

    candidate: Candidate
    look: str
    """`"first"`, or `"second"` at the best places."""
    steps: int
    """That it was trained so far."""
    strength: float
    score: float
    """Mean over the first half of the dev rows."""
    log_prob: float
    """Of the targets; decides between equal scores."""
    kl: float
    within: bool
    """Whether the budget is kept."""

    def order(self) -> tuple[float, ...]:
        """To compare by: farther rungs first, then what keeps the budget, then the score."""
        return self.steps, self.within, *((self.score, self.log_prob) if self.within else (-self.kl, 0.0))

    def to_row(self) -> dict[str, Any]:
        scores = {"strength": self.strength, "score": self.score, "kl": self.kl, "within": self.within}
        return {"stage": f"{self.look} look", **self.candidate.axes, "steps": self.steps, **scores, "chosen": False}


@dataclass(frozen=True)
class Setting:
    """A candidate that was trained to the end with every seed, at one strength."""

    candidate: Candidate
    strength: float
    score: float
    """Mean over the second half of the dev rows and the seeds."""
    cost: float
    """What the budget is spent on: KL in nats per token, or the logarithm of the perplexity."""
    seeds: tuple[float, ...]
    """The score of each seed."""
    kl: float
    within: bool
    chosen: bool
    steps: int

    def to_row(self) -> dict[str, Any]:
        scores = {"strength": self.strength, "score": self.score, "kl": self.kl, "within": self.within}
        return {"stage": "final", **self.candidate.axes, "steps": self.steps, **scores, "chosen": self.chosen}

    def __str__(self) -> str:
        mark = "→ " * self.chosen + "over the budget: " * (not self.within)
        return f"{mark}{self.score:.3f} at KL {self.kl:.3g}: {self.candidate}, strength {self.strength:g}"


def importance(trials: Sequence[Trial], chosen: Candidate) -> DataFrame:
    """One row per axis that has several values, from candidates at equal steps."""
    own, rows = [trial for trial in trials if trial.within], []
    scores = torch.tensor([trial.score for trial in own], dtype=torch.float64)
    for axis, value in chosen.axes.items():
        levels = [trial.candidate.axes[axis] for trial in own]
        values = list(dict.fromkeys(levels))
        if len(values) < 2:
            continue
        index = torch.tensor([values.index(level) for level in levels])
        others = scores[torch.tensor([level != value for level in levels])]
        numbers = {
            "explained": _explained(scores, index, len(values)),
            "by_chance": (len(values) - 1) / max(1, len(own) - 1),
            "lost": (scores.max() - others.max()).item() if len(others) else torch.nan,
        }
        rows.append({"axis": axis, "values": len(values), "chosen": str(value), **numbers})
    return figures.table(rows, "axis")


def _explained(scores: torch.Tensor, index: torch.Tensor, count: int) -> float:
    """Between-group sum of squares over the total; 0 where all scores are equal."""
    off = scores - scores.mean()
    total = off.square().sum()
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, off)
    sizes = torch.bincount(index, minlength=count).clamp(min=1)
    return (sums.square() / sizes).sum().div(total).item() if total > 0 else 0.0
