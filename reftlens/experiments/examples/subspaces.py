"""Skills in directions of their own: each part of the data is taught to some directions of one edit.

PyReFT's examples of composition and negation: at the end the directions of several skills act together, those of an
unwanted one are turned round or left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.cone.plans import Plan
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.numbers import real, whole_numbers
from reftlens.scoring.objectives import Objective, Predictions, cross_entropy
from reftlens.text.batch import Batch


@dataclass(frozen=True)
class Skills:
    """Which directions of the basis hold which skill, such as `Skills({"German": range(4), "terse": range(4, 8)})`.

    Raises:
        ValueError: for directions that two skills have, or that leave some out.
    """

    directions: Mapping[str, Sequence[int]] = field(hash=False)

    def __post_init__(self) -> None:
        named = {name: whole_numbers(numbers, "direction") for name, numbers in self.directions.items()}
        every = sorted(number for numbers in named.values() for number in numbers)
        if not every or every != list(range(len(every))):
            raise ValueError(f"directions {every} of all skills, expected each of 0, 1, 2, … once")
        object.__setattr__(self, "directions", named)

    @property
    def rank(self) -> int:
        return sum(len(numbers) for numbers in self.directions.values())

    def variant(self, strengths: Mapping[str, SupportsFloat] | Sequence[str]) -> Variant:
        """The edit with these skills: names for strength 1, or `{name: strength}`, -1 to negate; the others at 0."""
        wanted = strengths if isinstance(strengths, Mapping) else dict.fromkeys(strengths, 1.0)
        if unknown := [name for name in wanted if name not in self.directions]:
            raise ValueError(f"no skill {unknown[0]!r}, expected of {', '.join(self.directions)}")
        numbers = [0.0] * self.rank
        for name, strength in wanted.items():
            for direction in self.directions[name]:
                numbers[direction] = real(strength, f"strength of {name}")
        return Variant(tuple(numbers))

    def objective(self, skills: Sequence[str]) -> "SkillLoss":
        """Cross-entropy, each row under the directions of its own skill alone; `skills` names that of each row."""
        return SkillLoss(self, skills)


class SkillLoss(Objective):
    """Cross-entropy of rows, each edited by the directions of its own skill; made by `Skills.objective`."""

    per_target = True

    def __init__(self, skills: Skills, of_rows: Sequence[str]) -> None:
        self.skills, self.of_rows = skills, tuple(of_rows)
        names = list(skills.directions)
        if unknown := [name for name in self.of_rows if name not in names]:
            raise ValueError(f"no skill {unknown[0]!r}, expected of {', '.join(names)}")
        self._numbers = [names.index(name) for name in self.of_rows]

    @property
    def name(self) -> str:
        return f"cross_entropy of {self.skills.directions!r} by {self.of_rows!r}"

    def plans(self, reft: ReFT) -> list[Plan]:
        return [Plan(reft, self.skills.variant([name])) for name in self.skills.directions]

    def drawn(self, rows: Sequence[int], generator: torch.Generator) -> dict[int, tuple[int, ...]]:
        parts: dict[int, tuple[int, ...]] = {}
        for row in rows:
            parts[self._numbers[row]] = (*parts.get(self._numbers[row], ()), row)
        return parts

    def losses(self, predictions: Predictions) -> Float[Tensor, " targets"]:
        return cross_entropy(predictions.logits, predictions.batch)

    def check(self, data: Batch, name: str) -> None:
        """Raise `ValueError` where there is not one skill for each row."""
        super().check(data, name)
        if len(data) != len(self.of_rows):
            raise ValueError(f"{len(self.of_rows)} skills for {len(data)} rows of {name}, expected one for each")
