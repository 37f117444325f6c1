"""What an experiment is made of: parts that are trained by themselves, and for each method and seed a trial."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

from reftlens.bridge.pretrained import DType
from reftlens.experiments.methods import Method
from reftlens.experiments.methods.spaces import Space
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.rows.task import Row
from reftlens.experiments.runs.records import Prediction
from reftlens.files import located
from reftlens.numbers import whole

Setting = Mapping[str, Any]
"""Fields of a method by name, and `lr`, in place of its own."""


@dataclass(frozen=True)
class Scope:
    """How much of a recipe is run, and on what; None is what the recipe says."""

    data: Path | None
    """The folder of a family of data sets; without one they are loaded from the hub."""
    tasks: tuple[str, ...] | None
    limit: int | None
    """Test rows of each task."""
    train_limit: int | None
    """Training rows of each task."""
    steps: int | None

    def __init__(
        self,
        data: str | Path | None = None,
        tasks: str | Sequence[str] | None = None,
        limit: SupportsIndex | None = None,
        train_limit: SupportsIndex | None = None,
        steps: SupportsIndex | None = None,
    ) -> None:
        tasks = (tasks,) if isinstance(tasks, str) else tasks
        object.__setattr__(self, "data", None if data is None else located(data))
        object.__setattr__(self, "tasks", None if tasks is None else tuple(dict.fromkeys(tasks)))  # each once
        for name, count in {"limit": limit, "train_limit": train_limit, "steps": steps}.items():
            object.__setattr__(self, name, None if count is None else whole(count, name, 1))


class Trial(ABC):
    """One method with one seed: what it is trained on and how it answers."""

    tasks: Sequence[str]

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """All that the result depends on, in JSON values; `recipe`, `part`, `method` and `seed` among them."""

    @abstractmethod
    def fit(self, checkpoint: Path | None, *, progress: bool) -> Mapping[str, Any]:
        """Train, going on from the checkpoint where it exists; what it cost."""

    @abstractmethod
    def predict(self, task: str, *, progress: bool) -> list[Prediction]:
        """Answers to the test rows of a task."""

    @abstractmethod
    def save(self, folder: Path) -> int:
        """Write what was trained; its size in bytes."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    @abstractmethod
    def dev_score(self) -> float:
        """How well it does on rows that are neither trained on nor reported; more is better."""

    @property
    @abstractmethod
    def dev_rows(self) -> int: ...

    @property
    @abstractmethod
    def row_updates(self) -> int:
        """Rows that the optimizer steps of `fit` see."""

    @abstractmethod
    def cost(self) -> Mapping[str, int]:
        """Steps, tokens of training, of scoring and written at most, and bytes on disk, about."""

    @property
    def ways(self) -> Sequence[str]:
        """Ways of answering of which each names one of the choices of a row."""
        return ()

    def questions(self, task: str) -> Sequence[Row]:
        """The test rows of a task, where they may be asked in another form.

        Raises:
            ValueError: where they may not, or there is no such task.
        """
        raise ValueError(
            f"{task} cannot be asked in another form here, expected a recipe that answers in texts, such as commonsense"
        )

    def answers(self, rows: Sequence[Row], ways: Sequence[str]) -> list[Prediction]:
        """What is answered to rows, `questions` in any form, in some of the `ways`."""
        raise NotImplementedError

    def tokens(self, rows: Sequence[Row], ways: Sequence[str]) -> tuple[int, int]:
        """How many tokens `answers` reads, and how many it writes at most."""
        raise NotImplementedError


class Recipe(ABC):
    """An experiment of the paper: its data, its methods, and how answers are scored."""

    name: str
    methods: Mapping[str, Method | None]
    """By the name that the command line takes; None is a head alone."""
    seeds: tuple[int, ...] = (0, 1, 2)

    @abstractmethod
    def parts(self, scope: Scope) -> Sequence[str]:
        """Names of what is trained by itself: the recipe's own, or one for each task."""

    @abstractmethod
    def trial(
        self,
        part: str,
        method: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Setting = MappingProxyType({}),
    ) -> Trial:
        """One method with one seed on one part; `setting` has fields of the method, and `lr`, in place of its own."""

    def space(self, method: str) -> Space | None:
        """What a search of a method tries; None is what is tried of such a method everywhere: `tuning.space_of`."""
        return None

    def subject(self, model: str | None = None, dtype: DType = "float32") -> Subject:
        """The model under study; None is the recipe's own."""
        return Subject(model, dtype=dtype)
