"""One method with one seed on texts: trained on the mix of a recipe, it writes answers and scores them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reftlens.experiments.methods import Trained, load
from reftlens.experiments.methods.searching import rows_seen, with_settings
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.rows.families.arithmetic import truncated
from reftlens.experiments.rows.loading import Row, load_rows
from reftlens.experiments.rows.loading import split as split_rows
from reftlens.experiments.runs.recipe import Scope, Trial
from reftlens.experiments.runs.records import Prediction
from reftlens.numbers import seeded
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode, encode_prompts
from reftlens.text.template import Example

if TYPE_CHECKING:
    from reftlens.experiments.recipes.texts import TextRecipe

WRITTEN, LIKELIHOOD, TEXT = "written", "likelihood", "text"
"""Ways of answering: the model writes a text, in which the task's rule reads an answer; the answer of the highest
log-probability, summed over its tokens; a text that only a judge can score."""
GOLD = "log-probability of the gold steps, nats per token"
"""What is measured of the tasks that are held out."""
_DEV = 16
"""Rows of each task that settings are chosen by."""
_SAMPLE = 0
"""Seed of the samples of rows: every method and every seed sees the same."""


class TextTrial(Trial):
    """One method with one seed: trained on the mix, tested on each task."""

    def __init__(
        self, recipe: "TextRecipe", name: str, seed: int, subject: Subject, scope: Scope, setting: Mapping[str, Any]
    ) -> None:
        self.recipe, self.subject, self.name, self.seed = recipe, subject, name, seed
        self.entry, self.scope = recipe.entries[name], scope
        self.method = with_settings(self.entry.method, setting)
        own = {k: v for k, v in {"steps": scope.steps, "lr": setting.get("lr")}.items() if v is not None}
        self.fit_config = recipe.config.replace({**self.entry.settings, **own, "seed": seed})
        names, limit = scope.tasks or recipe.available(recipe.test, "test", scope.data), scope.limit or recipe.limit
        self.test = {task: self._loaded(task, "test", limit) for task in names}
        held_out = recipe.held_out if scope.tasks is None else ()
        self.held_out = {
            f"{task}, {split}": self._loaded(task, split, limit)
            for task, split in held_out
            if scope.data is None or recipe.holds(scope.data, task, split)
        }
        self.tasks = (*self.test, *self.held_out)
        every = [
            self._loaded(task, "train", scope.train_limit or recipe.train_limit)
            for task in recipe.available(recipe.train, "train", scope.data)
        ]
        rows = [row for rows in every for row in (self._dealt_out(rows) if self.entry.shuffled else rows)]
        if self.entry.opening is not None:
            rows = truncated(rows, self.entry.opening)
        self.rows = [row for row in rows if self._fits(row.prompt + row.completion)]
        self.left_out = len(rows) - len(self.rows)
        self.trained: Trained | None = None

    def _loaded(self, task: str, split: str, limit: int | None = None) -> list[Row]:
        if not self.recipe.divided:
            return load_rows(task, split, data=self.scope.data, limit=limit, seed=_SAMPLE)
        parts = split_rows(load_rows(task, "train", data=self.scope.data), {"train": 0.9, "test": 0.1}, seed=_SAMPLE)
        return parts[split][:limit]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {
            "recipe": self.recipe.name,
            "part": "mix",
            "method": self.name,
            "seed": self.seed,
            "settings": {"kind": type(self.method).__name__, **asdict(self.method)},
            "shuffled": self.entry.shuffled,
            "opening": self.entry.opening,
            "fit": asdict(self.fit_config),
            "decoding": asdict(self.recipe.decoding),
            "ways": list(self.recipe.ways),
            "model": self.subject.fingerprint.to_dict(),
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "train": self.data.fingerprint,
            "test": {t: [row.index for row in rows] for t, rows in {**self.test, **self.held_out}.items()},
        }

    @cached_property
    def data(self) -> Batch:
        """The training rows."""
        examples = [Example(row.prompt, row.completion) for row in self.rows]
        return encode(self.subject.bridge, examples, end=self.entry.opening is None, boundary="split")

    def fit(self, checkpoint: Path | None, *, progress: bool) -> Mapping[str, Any]:
        settings: dict[str, Any] = {"seed": self.seed, "checkpoint": checkpoint, "progress": progress}
        self.trained = self.method.fit(self.subject, self.data, self.fit_config, **settings)
        return {**asdict(self.trained.measured), "rows": len(self.rows), "rows_left_out": self.left_out}

    def save(self, folder: Path) -> int:
        return self._trained.save(folder)

    def load(self, folder: Path) -> None:
        self.trained = load(folder, self.subject)

    def predict(self, task: str, *, progress: bool) -> list[Prediction]:
        if task in self.held_out:
            return self._measured(task)
        rows = self.test[task]
        fits = [i for i, row in enumerate(rows) if self._fits(row.prompt + max(self._written(row), key=len))]
        ways = [way for way in self.recipe.ways if way != TEXT]
        given: list[dict[str, str | None]] = [dict.fromkeys(ways) for _ in rows]
        details: list[dict[str, Any]] = [{} for _ in rows]
        some = [rows[i] for i in fits]
        if self._writes and some:
            for i, row, text in zip(fits, some, self._texts(some), strict=True):
                details[i]["text"] = text
                given[i] |= {WRITTEN: self._read(row, text)} if WRITTEN in ways else {}
        if LIKELIHOOD in self.recipe.ways and some:
            for i, values in zip(fits, self._log_probs(some), strict=True):
                given[i][LIKELIHOOD] = max(values, key=lambda choice: values[choice])
                details[i]["log_probs"] = values
        return [
            Prediction(task, row.index, row.answer, g, details=d if i in set(fits) else {"fits": False})
            for i, (row, g, d) in enumerate(zip(rows, given, details, strict=True))
        ]

    @cached_property
    def dev(self) -> Batch:
        """Rows of the training files that are not trained on, sixteen of each task, no question of those that are."""
        taught, rows = {row.question for row in self.rows}, list[Row]()
        for task in dict.fromkeys(row.task for row in self.rows):
            left = [row for row in self._loaded(task, "train") if row.question not in taught]
            rows += [r for r in left if self._fits(r.prompt + r.completion)][:_DEV]
        if not rows:
            raise ValueError("no rows are left to choose settings by: all are trained on, lower the training limit")
        examples = [Example(row.prompt, row.completion) for row in rows]
        return encode(self.subject.bridge, examples, end=False, boundary="split")

    def dev_score(self) -> float:
        """Mean log-probability of the answers of the dev rows, in nats per token."""
        return float(self._trained.log_probs(self.dev).sum() / self.dev.target_mask.sum())

    @property
    def dev_rows(self) -> int:
        return len(self.dev)

    @property
    def row_updates(self) -> int:
        return rows_seen(self.fit_config, len(self.rows))

    def _measured(self, task: str) -> list[Prediction]:
        """Log-probability of the rows' own completions, in nats per token, their end not counted."""
        rows = [row for row in self.held_out[task] if self._fits(row.prompt + row.completion)]
        examples = [Example(row.prompt, row.completion) for row in rows]
        batch = encode(self.subject.bridge, examples, end=False, boundary="split")
        means = self._trained.log_probs(batch) / batch.target_mask.sum(dim=1)
        measures = [{GOLD: value} for value in means.tolist()]
        return [Prediction(task, r.index, r.answer, {}, m) for r, m in zip(rows, measures, strict=True)]

    def cost(self) -> Mapping[str, int]:
        rows, config = [row for rows in self.test.values() for row in rows], self.fit_config
        steps = config.total_steps(len(self.rows)) if self.method.stored else 0
        seen = steps * config.batch_size * config.accumulate
        trained = sum(self._length(row.prompt + row.completion) for row in self.rows) / max(1, len(self.rows))
        asked = sum(self._length(row.prompt) for row in rows)
        scored = sum(self._length(row.prompt + answer) for row in rows for answer in self._written(row))
        return {
            "steps": steps,
            "tokens of training": round(seen * trained),
            "tokens of scoring": scored * (LIKELIHOOD in self.recipe.ways) + asked * self._writes,
            "tokens written at most": len(rows) * self.recipe.decoding.max_new_tokens * self._writes,
            "rows left out": self.left_out,
        }

    @property
    def _writes(self) -> bool:
        return WRITTEN in self.recipe.ways or TEXT in self.recipe.ways

    @property
    def _trained(self) -> Trained:
        if self.trained is None:
            raise RuntimeError("nothing is trained yet: call fit or load first")
        return self.trained

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        prompts = encode_prompts(self.subject.bridge, [row.prompt for row in rows])
        return self._trained.texts(prompts, self.recipe.decoding)

    def _log_probs(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """For each row the log-probability of each of its answers, in nats, summed over the answer's tokens."""
        examples = [Example(row.prompt, answer) for row in rows for answer in self._written(row)]
        values = self._trained.log_probs(encode(self.subject.bridge, examples, end=False, boundary="split")).tolist()
        found, start = [], 0
        for row in rows:
            found.append(dict(zip(row.choices, values[start : start + len(row.choices)], strict=True)))
            start += len(row.choices)
        return found

    def _length(self, text: str) -> int:
        return len(self.subject.bridge.tokenizer(text).input_ids)

    def _fits(self, text: str) -> bool:
        """With two tokens to spare, for a BOS token and the end."""
        return self._length(text) + 2 <= min(self.recipe.max_length, self.subject.bridge.cfg.n_ctx)

    def _written(self, row: Row) -> list[str]:
        """The completions of all answers; the right one, where there is no choice."""
        task = self.recipe.task(row.task)
        return [task.written(answer, row) for answer in row.choices or (row.answer,)]

    def _read(self, row: Row, text: str) -> str | None:
        """The answer in a text; the right one as the row writes it, where it is the same."""
        task = self.recipe.task(row.task)
        answer = task.extract(text, row)
        return row.answer if answer is not None and task.equal(answer, row.answer) else answer

    def _dealt_out(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of a task, each with the answer of another; one of its own choices where that is none of them."""
        order = torch.randperm(len(rows), generator=seeded(self.seed)).tolist()
        dealt = []
        for row, other in zip(rows, order, strict=True):
            answer = rows[other].answer
            answer = answer if answer in row.choices else row.choices[other % len(row.choices)]
            dealt.append(replace(row, answer=answer, completion=self.recipe.task(row.task).written(answer, row)))
        return dealt
