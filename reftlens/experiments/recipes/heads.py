"""Recipes whose answers are labels or numbers: a head is trained on hidden states, task by task, beside a method."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reftlens.bridge.pretrained import DType
from reftlens.experiments.answers.scores import score
from reftlens.experiments.methods.classifiers import Classifier, HeadSpec, classifier
from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.methods.spaces import Space
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.recipes.trials import FittedTrial
from reftlens.experiments.rows.families.glue import metrics_of
from reftlens.experiments.rows.loading import FAMILIES, Row, check_family, load_rows, warn_of_leaks
from reftlens.experiments.rows.splits import HALVES, SAMPLE, available
from reftlens.experiments.rows.task import digest_of
from reftlens.experiments.runs.recipe import Recipe, Scope, Setting
from reftlens.experiments.runs.records import Prediction
from reftlens.text.batch import Batch
from reftlens.text.labelled import encode_labelled
from reftlens.training.config import FitConfig

HEAD = "head"
"""The one way of answering: the label of the highest score, or the value."""
ENCODER = "FacebookAI/roberta-base"


@dataclass(frozen=True)
class HeadRecipe(Recipe):
    """Tasks that are trained and tested one by one, with a head."""

    name: str
    tasks: tuple[str, ...]
    entries: Mapping[str, tuple[Method | None, Mapping[str, Any]]]
    """Of each method what it is (None is the head alone), and the settings of `FitConfig` that are its own."""
    config: FitConfig
    train_limit: int = 2000
    limit: int = 1000
    max_length: int = 256
    dropout: float = 0.1
    """Of the head."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def methods(self) -> Mapping[str, Any]:
        return {name: method for name, (method, _) in self.entries.items()}

    def space(self, method: str) -> Space | None:
        """Of a ReFT three rates by three dropouts, as the paper's; its rank and places are what the recipe is about."""
        edit = self.methods[method]
        if not isinstance(edit, Reft):
            return None
        return Space(edit, {"lr": (3e-3, 1e-3, 1e-2), "dropout": (0.0, 0.05, 0.2)})

    def subject(self, model: str | None = None, dtype: DType = "float32") -> Subject:
        return Subject(model or ENCODER, dtype=dtype)

    def parts(self, scope: Scope) -> Sequence[str]:
        """The tasks; of a local folder those that are there."""
        return scope.tasks or available(self.name, FAMILIES["glue"], self.tasks, "train", scope.data)

    def trial(
        self,
        part: str,
        method: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Setting = MappingProxyType({}),
    ) -> "HeadTrial":
        return HeadTrial(self, part, method, seed, subject, scope, setting)


class HeadTrial(FittedTrial):
    """One method with one seed on one task."""

    def __init__(
        self,
        recipe: HeadRecipe,
        task: str,
        name: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Mapping[str, Any],
    ) -> None:
        super().__init__(recipe, task, name, seed, subject, scope, setting, *recipe.entries[name])
        self.tasks = (task,)
        check_family(task, "glue")
        limit = scope.train_limit or recipe.train_limit
        self.rows = load_rows(task, "train", data=scope.data, limit=limit, seed=SAMPLE)
        halves = HALVES.rows(task, scope.data)
        self.dev, self.test = halves["dev"], halves["test"][: scope.limit or recipe.limit]
        warn_of_leaks(self.rows, self.test)
        self.classes = self.rows[0].choices
        if odd := [row for row in (*self.dev, *self.test) if row.choices != self.classes]:
            raise ValueError(
                f"{task}: the training rows have the labels {self.classes}, and {odd[0].fields['place']} others"
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {
            **self.identity,
            "head": asdict(self._head),
            "train": self._encoded(self.rows).fingerprint,
            "dev": self._encoded(self.dev).fingerprint,
            "test": [row.index for row in self.test],
            "asked": digest_of(self.test),
            "choices": {self.tasks[0]: list(self.classes)},
        }

    @property
    def _head(self) -> HeadSpec:
        return HeadSpec(len(self.classes) or 1, self.recipe.dropout)

    @cached_property
    def trained(self) -> Classifier:
        return classifier(self.method, self._head, self.subject, self.seed)

    def fit(self, checkpoint: Path | None, *, progress: bool) -> Mapping[str, Any]:
        data, dev = self._encoded(self.rows), self._encoded(self.dev)
        self.trained.fit(data, dev, self.fit_config, checkpoint, progress)
        return {**asdict(self.trained.measured), "rows": len(self.rows), "rows_cut": len(data.truncated)}

    def predict(self, task: str, *, progress: bool) -> list[Prediction]:
        scores = self.trained.scores(self._encoded(self.test)).tolist()
        return [
            Prediction(task, row.index, row.answer, {HEAD: self._answer(values)}, details={"scores": values})
            for row, values in zip(self.test, scores, strict=True)
        ]

    def _answer(self, scores: Sequence[float]) -> str:
        if not self.classes:
            return f"{scores[0]:.4f}"
        return self.classes[max(range(len(scores)), key=lambda i: scores[i])]

    def save(self, folder: Path) -> int:
        return self.trained.save(folder)

    def load(self, folder: Path) -> None:
        self.trained.load(folder)

    def dev_score(self) -> float:
        """The first of the task's metrics."""
        scores = self.trained.scores(self._encoded(self.dev)).tolist()
        metric = metrics_of(self.tasks[0], self.classes)[0]
        return score(metric, [self._answer(s) for s in scores], [row.answer for row in self.dev], self.classes).value

    @property
    def dev_rows(self) -> int:
        return len(self.dev)

    def cost(self) -> Mapping[str, int]:
        data, config = self._encoded(self.rows), self.fit_config
        mean, steps = int(data.attention_mask.sum()) / len(data), config.total_steps(len(data))
        epochs = steps / config.steps_per_epoch(len(data))
        dev, test = (int(self._encoded(rows).attention_mask.sum()) for rows in (self.dev, self.test))
        return {
            "steps": steps,
            "tokens of training": round(steps * config.batch_size * config.accumulate * mean),
            "tokens of scoring": round(epochs * dev + test),
            "tokens written at most": 0,
            "rows cut": len(data.truncated),
            "bytes on disk, about": self.disk(self.trained.size, len(self.test)),
        }

    def _encoded(self, rows: Sequence[Row]) -> Batch:
        texts: list[Any] = [
            row.fields["texts"][0] if len(row.fields["texts"]) == 1 else row.fields["texts"] for row in rows
        ]
        labels = [float(row.fields["label"]) if not self.classes else row.fields["label"] for row in rows]
        return encode_labelled(self.subject.bridge, texts, labels, max_length=self.recipe.max_length)
