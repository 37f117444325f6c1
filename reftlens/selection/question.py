"""What a search is asked: model, rows, space, and how candidates are trained and compared."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from reftlens.bridge.fingerprint import fingerprint
from reftlens.bridge.protocol import Bridge, Executor
from reftlens.cone.reuse import Reuse
from reftlens.editing.preflight import Sites, hooks
from reftlens.editing.variant import Variant
from reftlens.files import digest
from reftlens.scoring.objectives import Objective
from reftlens.selection.metrics import Metric
from reftlens.selection.space import Candidate, Space
from reftlens.selection.splitting import Split, groups_of, split_groups
from reftlens.text.batch import Batch
from reftlens.training.checkpoint import frozen_tensors
from reftlens.training.config import FitConfig


@dataclass(eq=False)
class Question:
    """What a search is asked, and what follows from it without any computation."""

    model: Bridge
    load: Callable[[], Bridge]
    train: Batch
    dev: Batch
    test: Batch
    split: Split | None
    metric: Metric
    space: Space
    """Filled."""
    config: FitConfig
    seeds: int
    seed: int
    objective: Objective
    batch_size: int
    reuse: Reuse | None
    executor: Executor | None

    def __post_init__(self) -> None:
        """Raise `ValueError` for an objective on pairs: half of their rows are not to be learned."""
        if (group := self.objective.group) > 1:
            raise ValueError(
                f"{self.objective.name} is of rows in groups of {group}, and candidates are compared by how likely the "
                "targets of every row are, the rejected ones too: search with the preferred completions "
                "alone, then fit what is recommended with it"
            )

    @property
    def strengths(self) -> tuple[float, ...]:
        """All that are scored at the end."""
        return self.space.strengths or (1.0,)

    @cached_property
    def hooks(self) -> Sites:
        return hooks(self.model)

    @cached_property
    def halves(self) -> tuple[Batch, Batch]:
        """Dev rows that decide who goes on, and those that decide at the end."""
        first, second = split_groups(groups_of(self.dev), (0.5, 0.5), self.seed)
        return self.dev[first], self.dev[second]

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All of the space.

        Raises:
            ValueError: where a site chooses no token.
        """
        for place in self.space.places():
            for batch in (self.train, *self.halves, self.test):
                Variant().require(place, batch.view)
        return self.space.candidates(self.hooks)

    @property
    def settings(self) -> dict[str, Any]:
        """How candidates are scored."""
        return {"batch_size": self.batch_size, "reuse": self.reuse}

    @property
    def identity(self) -> dict[str, Any]:
        """What the outcomes of the search depend on."""
        model = fingerprint(self.model)
        kinds = {(c.kind, c.rank): c for c in self.candidates}.values()
        made = [self.space.reft(c, self.hooks, self.seed) for c in kinds]
        return {
            "model": [model.name, model.config, model.weights],
            "data": [batch.fingerprint for batch in (self.train, self.dev, self.test)],
            "candidates": [[[s.to_dict() for s in c.sites], c.kind, c.rank, c.lr] for c in self.candidates],
            "kinds": [[r[0].kind, repr(r[0].settings()), digest(frozen_tensors(r))] for r in made],
            "strengths": self.strengths,
            "settings": asdict(self.config),
            "metric": [self.metric.name, dict(self.metric.within)],
            "seeds": [self.seed, self.seeds],
            "objective": self.objective.name,
        }
