"""AxBench's steering scores, given a judge: is the concept there, is the instruction followed, is the text fluent?

Each is rated 0, 1 or 2, and a text counts by the harmonic mean of the three, which is 0 where one of them is (Wu et al.
2025, AxBench). How strongly to steer is chosen on one half of the instructions and reported on the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.experiments.judges.judging import Judge, filled, replies_to
from reftlens.experiments.judges.marks import rating_in
from reftlens.numbers import whole
from reftlens.scoring.statistics import Estimate, mean_of
from reftlens.selection.splitting import split_groups

_SCALE = "End with one mark, Rating: [[0]], Rating: [[1]] or Rating: [[2]]."
QUESTIONS = {
    "concept": "Is the concept present in the text? 0: not at all; 1: somewhat; 2: clearly.\n\n"
    "[Concept]\n{concept}\n\n[Text]\n{text}\n\n" + _SCALE,
    "instruct": "Does the text have to do with the instruction, whatever else it is about? 0: not at all; 1: "
    "somewhat; 2: clearly.\n\n[Instruction]\n{instruction}\n\n[Text]\n{text}\n\n" + _SCALE,
    "fluency": "Is the text fluent? 0: hard to read, broken or repetitive; 1: somewhat; 2: fluent.\n\n"
    "[Text]\n{text}\n\n" + _SCALE,
}
"""What a judge is asked of each text."""


@dataclass(frozen=True)
class Steered:
    """A text that was written to an instruction while a concept was steered for."""

    concept: str
    instruction: str
    text: str


@dataclass(frozen=True)
class Ratings:
    """Ratings of texts, in their order."""

    values: Float[Tensor, "text 3"]
    """Concept, instruction and fluency, 0 to 2; NaN where no rating was read in the reply."""
    replies: tuple[tuple[str, str, str], ...]

    @property
    def overall(self) -> Float[Tensor, " text"]:
        """The harmonic mean of the three; NaN where one is missing."""
        return harmonic_mean(self.values)

    @property
    def failures(self) -> int:
        """Replies in which no rating was read."""
        return int(self.values.isnan().sum())


@dataclass(frozen=True)
class SteeringScore:
    """The scores at the factor that was best on one half of the instructions, on the other half."""

    factor: float
    concept: Estimate
    instruct: Estimate
    fluency: Estimate
    overall: Estimate
    failures: int
    """Replies that were not read, over all factors and both halves."""

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name)}" for name in ("concept", "instruct", "fluency"))
        return f"overall {self.overall} at factor {self.factor:g}: {parts}; {self.failures} replies not read"


def harmonic_mean(ratings: Float[Tensor, "text 3"]) -> Float[Tensor, " text"]:
    """`3 / (1/a + 1/b + 1/c)`, 0 where one of them is 0."""
    return torch.where((ratings == 0).any(dim=1) & ~ratings.isnan().any(dim=1), 0.0, 3 / (1 / ratings).sum(dim=1))


def rate(judge: Judge, texts: Sequence[Steered], *, workers: int = 1) -> Ratings:
    """What a judge makes of each text, three questions each."""
    if not texts:
        raise ValueError("no texts to rate")
    asked = [
        filled(template, {"concept": t.concept, "instruction": t.instruction, "text": t.text})
        for t in texts
        for template in QUESTIONS.values()
    ]
    replies = replies_to(judge, asked, workers)
    read = [rating_in(reply) for reply in replies]
    values = torch.tensor([float("nan") if r is None else float(r) for r in read]).reshape(-1, 3)
    return Ratings(values, tuple(zip(replies[::3], replies[1::3], replies[2::3], strict=True)))


def steering_score(
    rated: Mapping[float, Ratings], texts: Sequence[Steered], *, seed: SupportsIndex = 0
) -> SteeringScore:
    """The factor with the highest mean on half of the instructions of each concept, scored on the other half.

    Args:
        rated: of each factor the ratings of its texts, to the same concepts and instructions in the same order.
        texts: those of any factor: whose concept and instruction each row has.

    Raises:
        ValueError: for ratings that are not one for each text, or a half without a text that was rated.
    """
    if not rated or any(len(ratings.values) != len(texts) for ratings in rated.values()):
        counts = {factor: len(ratings.values) for factor, ratings in rated.items()}
        raise ValueError(f"ratings of {counts} texts, expected {len(texts)} for each factor")
    choose, report = _halves(texts, whole(seed, "seed"))
    means = {factor: ratings.overall[choose].nanmean().item() for factor, ratings in rated.items()}
    known = {factor: mean for factor, mean in means.items() if mean == mean}
    if not known:
        raise ValueError("no text of the half to choose on has all three ratings: look at the judge's replies")
    best = max(known, key=lambda factor: known[factor])
    if rated[best].overall[report].isnan().all():
        raise ValueError(
            f"no text of the half to report has all three ratings at factor {best:g}, the best on the other half: look "
            "at the judge's replies"
        )
    columns = [*rated[best].values[report].unbind(dim=1), rated[best].overall[report]]
    concept, instruct, fluency, overall = (mean_of(column[~column.isnan()]) for column in columns)
    return SteeringScore(best, concept, instruct, fluency, overall, sum(ratings.failures for ratings in rated.values()))


def _halves(texts: Sequence[Steered], seed: int) -> tuple[list[int], list[int]]:
    """Rows to choose on and to report on: of each concept half of its instructions, none in both."""
    halves: tuple[list[int], list[int]] = ([], [])
    for concept in dict.fromkeys(text.concept for text in texts):
        rows = [i for i, text in enumerate(texts) if text.concept == concept]
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(texts[i].instruction, len(numbers)) for i in rows]
        if len(numbers) < 2:
            raise ValueError(f"concept {concept!r} has one instruction, expected two or more: one half chooses")
        for half, part in zip(halves, split_groups(groups, (0.5, 0.5), seed), strict=True):
            half += [rows[i] for i in part]
    return halves
