"""Recipes whose answers are texts: a decoder is trained on prompts with their answers, and writes or scores answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from reftlens.experiments.methods import Method
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.recipes.asking import LIKELIHOOD, TEXT, WRITTEN
from reftlens.experiments.recipes.text_trials import TextTrial
from reftlens.experiments.rows.loading import FAMILIES, Row, Task, check_family, load_rows
from reftlens.experiments.rows.splits import SAMPLE, Division, available
from reftlens.experiments.runs.recipe import Recipe, Scope, Setting
from reftlens.generation.decoding import Decoding
from reftlens.training.config import FitConfig

__all__ = ["LIKELIHOOD", "TEXT", "WRITTEN", "Entry", "TextRecipe"]


@dataclass(frozen=True)
class Entry:
    """A method of a recipe: how it is trained there."""

    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `FitConfig` in place of the recipe's."""
    shuffled: bool = False
    """Whether the answers of each task are dealt out anew among its training rows: only their form is then learned."""
    opening: int | None = None
    """So many words of each answer are taught, and no end; None for all."""


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """Tasks that are trained on together, or each by itself, and tested one by one."""

    name: str
    family: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    entries: Mapping[str, Entry]
    config: FitConfig
    decoding: Decoding
    train_limit: int
    """Training rows of each task, the documented limit."""
    limit: int
    """Test rows of each task, the documented limit."""
    ways: tuple[str, ...] = (WRITTEN, LIKELIHOOD)
    held_out: tuple[tuple[str, str], ...] = ()
    """Tasks with a split of theirs, of whose own completions the log-probability is measured."""
    max_length: int = 512
    """Longest row, in tokens: a longer one is left out of training, and counted as not answered in the test."""
    seeds: tuple[int, ...] = (0, 1, 2)
    together: bool = True
    """Whether all tasks are trained on as one mix; else each is a part of its own."""
    division: Division | None = None
    """Splits that are shares of one file; others have files of their own."""

    @property
    def methods(self) -> Mapping[str, Method]:
        return {name: entry.method for name, entry in self.entries.items()}

    def parts(self, scope: Scope) -> Sequence[str]:
        """The mix; or the tasks, of a local folder those that are there."""
        return ["mix"] if self.together else scope.tasks or self._available(self.train, "train", scope)

    def trial(
        self,
        part: str,
        method: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Setting = MappingProxyType({}),
    ) -> "TextTrial":
        return TextTrial(self, part, method, seed, subject, scope, setting)

    def taught(self, part: str, scope: Scope) -> Sequence[str]:
        """The tasks that a part is trained on."""
        return self._available(self.train, "train", scope) if self.together else [part]

    def tested(self, part: str, scope: Scope) -> Sequence[str]:
        """The tasks that a part is tested on."""
        return [part] if not self.together else scope.tasks or self._available(self.test, "test", scope)

    def _available(self, names: Sequence[str], split: str, scope: Scope) -> Sequence[str]:
        return available(self.name, FAMILIES[self.family], names, self.file_of(split), scope.data)

    def task(self, name: str) -> Task:
        """A task of the family, also one that is known by its file alone."""
        return FAMILIES[self.family].task(name)

    def file_of(self, split: str) -> str:
        """The split in whose file the rows of a split are."""
        return self.division.file if self.division and split in self.division.shares else split

    def rows(self, task: str, split: str, scope: Scope, limit: int | None = None) -> list[Row]:
        """The rows of a split of a task, or so many of them, the same ones each time."""
        check_family(task, self.family)
        if self.division and split in self.division.shares:
            return self.division.rows(task, scope.data)[split][:limit]
        return load_rows(task, split, data=scope.data, limit=limit, seed=SAMPLE)
