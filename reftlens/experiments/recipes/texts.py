"""Recipes whose answers are texts: a decoder is trained on prompts with their answers, and writes or scores answers."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reftlens.experiments.methods import Method
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.recipes.asking import LIKELIHOOD, TEXT, WRITTEN
from reftlens.experiments.recipes.text_trials import TextTrial
from reftlens.experiments.rows.loading import FAMILIES, Task
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
    """Tasks that are trained on together, and tested one by one."""

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
    divided: bool = False
    """Whether test rows are a tenth of the training file, as there is no other: questions there are not trained on."""

    @property
    def methods(self) -> Mapping[str, Method]:
        return {name: entry.method for name, entry in self.entries.items()}

    def parts(self, scope: Scope) -> Sequence[str]:
        return ["mix"]

    def trial(
        self,
        part: str,
        method: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Setting = MappingProxyType({}),
    ) -> "TextTrial":
        return TextTrial(self, method, seed, subject, scope, setting)

    def task(self, name: str) -> Task:
        """A task of the family, also one that is known by its file alone."""
        family = FAMILIES[self.family]
        return family.tasks.get(name) or family.other(name)

    def holds(self, data: Path, name: str, split: str) -> bool:
        """Whether a file of a task is in a folder."""
        family = FAMILIES[self.family]
        files = family.files(self.task(name), "train" if self.divided else split)
        return any((data / folder / file).is_file() for folder in ("", family.name) for file in files)

    def available(self, names: Sequence[str], split: str, data: Path | None) -> tuple[str, ...]:
        """Those of these tasks that are in the folder of a family, with a warning of the others; all, without one."""
        if data is None:
            return tuple(names)
        split = "train" if self.divided else split
        files = {name: FAMILIES[self.family].files(self.task(name), split) for name in names}
        there = [name for name in names if self.holds(data, name, split)]
        if not there:
            looked = ", ".join(files[name][0] for name in names)
            raise ValueError(f"{data} holds none of the {split} files of {self.name}: looked for {looked}")
        if missing := [files[name][0] for name in names if name not in there]:
            warnings.warn(f"{self.name} goes without {', '.join(missing)}, not in {data}", stacklevel=3)
        return tuple(there)
