"""One method with one seed on texts: trained on a part of a recipe, it writes answers and scores them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reftlens.errors import index_of
from reftlens.experiments.methods import Trained, load
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.recipes.asking import TEXT, Asking
from reftlens.experiments.recipes.trials import FittedTrial
from reftlens.experiments.rows.families.arithmetic import truncated
from reftlens.experiments.rows.loading import FAMILIES, Row, warn_of_leaks
from reftlens.experiments.rows.splits import holds
from reftlens.experiments.rows.task import digest_of
from reftlens.experiments.runs.recipe import Scope
from reftlens.experiments.runs.records import Prediction
from reftlens.numbers import seeded
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode
from reftlens.text.template import Example

if TYPE_CHECKING:
    from reftlens.experiments.recipes.texts import TextRecipe

GOLD = "log-probability of the gold steps, nats per token"
"""What is measured of the tasks that are held out."""
_DEV = 16
"""Rows of each task that settings are chosen by, where it has no dev split."""


class TextTrial(FittedTrial):
    """One method with one seed: trained on the tasks of a part, tested on each of them."""

    def __init__(
        self,
        recipe: "TextRecipe",
        part: str,
        name: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Mapping[str, Any],
    ) -> None:
        self.entry, self._asking = recipe.entries[name], Asking(recipe, subject)
        super().__init__(recipe, part, name, seed, subject, scope, setting, self.entry.method, self.entry.settings)
        family, data, limit = FAMILIES[recipe.family], scope.data, scope.limit or recipe.limit
        self.test = {task: recipe.rows(task, "test", scope, limit) for task in recipe.tested(part, scope)}
        held_out = recipe.held_out if scope.tasks is None else ()
        self.held_out = {
            f"{task}, {split}": recipe.rows(task, split, scope, limit)
            for task, split in held_out
            if data is None or holds(data, family, task, recipe.file_of(split))
        }
        self.tasks = (*self.test, *self.held_out)
        self._asking.check_room([row for rows in self.test.values() for row in rows])
        every = [self._taught(task, scope.train_limit or recipe.train_limit) for task in recipe.taught(part, scope)]
        rows = [row for rows in every for row in (self._dealt_out(rows) if self.entry.shuffled else rows)]
        if self.entry.opening is not None:
            rows = truncated(rows, self.entry.opening)
        self.rows = self._asking.fitting(rows)
        self.left_out = len(rows) - len(self.rows)
        warn_of_leaks(self.rows, [row for some in (*self.test.values(), *self.held_out.values()) for row in some])
        self.trained: Trained | None = None

    @property
    def _has_dev(self) -> bool:
        """Whether the recipe makes a split to choose settings by."""
        return self.recipe.file_of("dev") != "dev"

    def _taught(self, task: str, most: int) -> list[Row]:
        """So many training rows, but not all of them where no others could choose settings: sixteen are kept, of few a
        tenth."""
        if not self._has_dev:
            count = len(self.recipe.rows(task, "train", self.scope))
            most = min(most, count - min(_DEV, count // 10))
        return self.recipe.rows(task, "train", self.scope, most)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        answers = {task: list(rows[0].choices) for task, rows in self.test.items()}
        asked = {**self.test, **self.held_out}
        return {
            **self.identity,
            "shuffled": self.entry.shuffled,
            "opening": self.entry.opening,
            "decoding": asdict(self.recipe.decoding),
            "ways": list(self.recipe.ways),
            "train": self.data.fingerprint,
            "test": {task: [row.index for row in rows] for task, rows in asked.items()},
            "asked": {task: digest_of(rows) for task, rows in asked.items()},
            **({} if self.recipe.together else {"choices": answers}),
        }

    @cached_property
    def data(self) -> Batch:
        """The training rows."""
        examples = [Example(row.prompt, row.completion) for row in self.rows]
        return encode(self.subject.bridge, examples, end=self.entry.opening is None, boundary="split")

    def fit(self, checkpoint: Path | None, *, progress: bool) -> Mapping[str, Any]:
        settings: dict[str, Any] = {"seed": self.seed, "checkpoint": checkpoint, "progress": progress}
        self.trained = self.method.fit(self.subject, self.data, self.fit_config, **settings)
        unmeasured = sum(len(rows) - len(self._measurable(task)) for task, rows in self.held_out.items())
        counts = {"rows": len(self.rows), "rows_left_out": self.left_out, "rows_not_measured": unmeasured}
        return asdict(self._trained.measured) | counts

    def save(self, folder: Path) -> int:
        return self._trained.save(folder)

    def load(self, folder: Path) -> None:
        self.trained = load(folder, self.subject)

    def predict(self, task: str, *, progress: bool) -> list[Prediction]:
        if task in self.held_out:
            return self._measured(task)
        return self.answers(self.test[task], self.recipe.ways)

    @property
    def ways(self) -> Sequence[str]:
        return [way for way in self.recipe.ways if way != TEXT]

    def questions(self, task: str) -> Sequence[Row]:
        index_of(list(self.test), task, "task in this run")
        return self.test[task]

    def answers(self, rows: Sequence[Row], ways: Sequence[str]) -> list[Prediction]:
        return self._asking.answers(self._trained, rows, ways)

    def tokens(self, rows: Sequence[Row], ways: Sequence[str]) -> tuple[int, int]:
        return self._asking.tokens(rows, ways)

    @cached_property
    def dev(self) -> Batch:
        """Rows that are not trained on, no question of those that are: the dev split of each task, where the recipe
        makes one, or else sixteen of its training file."""
        taught, rows = {row.question for row in self.rows}, list[Row]()
        split, most = ("dev", None) if self._has_dev else ("train", _DEV)
        for task in dict.fromkeys(row.task for row in self.rows):
            left = [row for row in self.recipe.rows(task, split, self.scope) if row.question not in taught]
            rows += [r for r in left if self._asking.fits(r.prompt + r.completion)][:most]
        if not rows:
            raise ValueError("no rows are left to choose settings by: all are trained on, lower the training limit")
        examples = [Example(row.prompt, row.completion) for row in rows]
        return encode(self.subject.bridge, examples, end=False, boundary="split")

    def dev_score(self) -> float:
        """Mean log-probability of the answers of the dev rows, in nats per token."""
        return self._trained.mean_log_prob(self.dev)

    @property
    def dev_rows(self) -> int:
        return len(self.dev)

    def _measurable(self, task: str) -> list[Row]:
        """The held-out rows that fit with their completions."""
        return [row for row in self.held_out[task] if self._asking.fits(row.prompt + row.completion)]

    def _measured(self, task: str) -> list[Prediction]:
        """Log-probability of the rows' own completions, in nats per token, their end not counted."""
        if not (rows := self._measurable(task)):
            return []
        examples = [Example(row.prompt, row.completion) for row in rows]
        batch = encode(self.subject.bridge, examples, end=False, boundary="split")
        means = self._trained.log_probs(batch) / batch.target_mask.sum(dim=1)
        measures = [{GOLD: value} for value in means.tolist()]
        return [Prediction(task, r.index, r.answer, {}, m) for r, m in zip(rows, measures, strict=True)]

    def cost(self) -> Mapping[str, int]:
        rows, config = [row for rows in self.test.values() for row in rows], self.fit_config
        steps = config.total_steps(len(self.rows)) if self.method.stored else 0
        seen = steps * config.batch_size * config.accumulate
        trained = sum(self._asking.length(row.prompt + row.completion) for row in self.rows) / max(1, len(self.rows))
        read, written = self.tokens(rows, self.recipe.ways)
        measured = [row for task in self.held_out for row in self._measurable(task)]
        return {
            "steps": steps,
            "tokens of training": round(seen * trained),
            "tokens of scoring": read + sum(self._asking.length(row.prompt + row.completion) for row in measured),
            "tokens written at most": written,
            "rows left out": self.left_out,
            "bytes on disk, about": self.disk(self.method.size(self.subject), len(rows) + len(measured), written),
        }

    @property
    def _trained(self) -> Trained:
        if self.trained is None:
            raise RuntimeError("nothing is trained yet: call fit or load first")
        return self.trained

    def _dealt_out(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of a task, each with the answer of another; one of its own choices where that is none of them."""
        order = torch.randperm(len(rows), generator=seeded(self.seed)).tolist()
        dealt = []
        for row, other in zip(rows, order, strict=True):
            answer = rows[other].answer
            if row.choices and answer not in row.choices:
                answer = row.choices[other % len(row.choices)]
            dealt.append(replace(row, answer=answer, completion=self.recipe.task(row.task).written(answer, row)))
        return dealt
