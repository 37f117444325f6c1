"""The settings of a method, chosen on dev rows: every method's search has the same number of row-updates."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reftlens import figures
from reftlens.errors import NotFinite
from reftlens.experiments.methods.adapters import Lora
from reftlens.experiments.methods.method import Method, Trained
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.methods.subjects import Subject
from reftlens.figures import Axes, DataFrame
from reftlens.files import located, write_atomically
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig

Choices = Mapping[str, Sequence[Any]]
"""Values to try, by the name of a field of the method, or `lr`."""


@dataclass(frozen=True)
class Space:
    """Which settings are tried.

    Args:
        method: with the settings that are not searched.
        choices: values by field; `lr` is a field, too.
        staged: one field after the other, in the order of `choices`, the best value of each kept from then on; else
            every combination. The first value of each field is where a staged search begins.
    """

    method: Method
    choices: Choices = field(hash=False)
    staged: bool = False

    def __post_init__(self) -> None:
        names = [*asdict(self.method), "lr"]
        for name, values in self.choices.items():
            if name not in names:
                raise ValueError(f"{self.method.name} has no setting {name!r}, expected of {', '.join(names)}")
            if not values or isinstance(values, str):
                raise ValueError(f"{name}={values!r}, expected one or more values to try")
        if "lr" not in self.choices:
            raise ValueError("choices name no lr: give the learning rates to try, or the one to use")

    @property
    def trials(self) -> int:
        """How many settings are trained."""
        sizes = [len(values) for values in self.choices.values()]
        if self.staged:
            return sum(sizes) - len(sizes) + 1
        return len(list(product(*map(range, sizes))))

    def settings(self, best: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each setting to try once; `best` says which of some that were tried is."""
        if not self.staged:
            yield from (dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values()))
            return
        now, tried = {name: values[0] for name, values in self.choices.items()}, list[dict[str, Any]]()
        for name, values in self.choices.items():
            stage = [{**now, name: value} for value in values]
            for setting in stage:
                if setting not in tried:
                    tried.append(setting)
                    yield setting
            now = best(stage)


def lora_space(method: Lora = Lora()) -> Space:
    """Rank 2, 8, 32 by learning rate 1e-4, 3e-4, 1e-3: nine settings."""
    return Space(method, {"rank": (2, 8, 32), "lr": (1e-4, 3e-4, 1e-3)})


def reft_space(method: Reft = Reft(), depth: int | None = None) -> Space:
    """Nine settings over learning rate, positions, rank and, given the model's `depth`, layers, one after the other.

    In the order of the paper's advice (appendix D.2: several positions on all layers first, then a low rank and fewer
    layers), after the learning rate, without which none can be told. Fewer layers are the middle half, and every third.
    """
    choices: dict[str, Sequence[Any]] = {"lr": (3e-3, 1e-3, 1e-2)}
    more = {"positions": ("f7+l7", "f3+l3", "f1+l1", "f11+l11"), "rank": (8, 2, 32, 16)}
    if method.kind in ("RED", "SteeringVector"):
        del more["rank"]
        choices["lr"] = (*choices["lr"], 3e-4, 3e-2, 1e-4)[: 6 if depth is None else 5]
    if depth is not None:
        few = (tuple(range(depth // 4, depth - depth // 4)), tuple(range(1, depth, 3)))
        more = {name: values[:3] for name, values in more.items()} | {"layers": ("all", *few)}
    for name, values in more.items():
        now = getattr(method, name)
        choices[name] = (now, *(v for v in values if v != now))[: len(values)]
    return Space(method, choices, staged=True)


@dataclass(frozen=True)
class Tried:
    """One setting, trained."""

    setting: dict[str, Any] = field(hash=False)
    score: float
    loss: float
    """Training loss of the last step."""
    parameters: int
    seconds: float
    """Of the fit."""


@dataclass(frozen=True)
class MethodSearch:
    """What a search tried, and what it costs."""

    method: Method
    """With the best settings."""
    lr: float
    trials: tuple[Tried, ...]
    """In the order in which they were tried."""
    steps: int
    row_updates: int
    """Rows that optimizer steps saw, over all trials: equal for searches that are compared."""
    measure: str
    dev_rows: int
    seed: int

    @property
    def best(self) -> Tried:
        return max(self.trials, key=lambda tried: tried.score)  # the first of equals

    def __repr__(self) -> str:
        lines = [
            f"{self.method.name}: {len(self.trials)} settings of {self.steps} steps, {self.row_updates:,} row-updates, "
            f"seed {self.seed}, chosen by {self.measure} on {self.dev_rows} dev rows:"
        ]
        for tried in self.trials:
            mark = "→ " if tried is self.best else "  "
            lines.append(f"{mark}{tried.score:.4f}: {', '.join(f'{k}={v}' for k, v in tried.setting.items())}")
        return figures.screenful(lines)

    def to_frame(self) -> DataFrame:
        """One row per setting."""
        rows = [{**t.setting, **{k: v for k, v in asdict(t).items() if k != "setting"}} for t in self.trials]
        return figures.table([{**row, "chosen": t is self.best} for row, t in zip(rows, self.trials, strict=True)])

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """The score of each setting over its learning rate; the chosen one filled."""
        ax = figures.axes(ax)
        rates, scores = [t.setting["lr"] for t in self.trials], [t.score for t in self.trials]
        (dots,) = ax.plot(rates, scores, "o", markerfacecolor="none", label=label or self.method.name)
        ax.plot([self.lr], [self.best.score], "o", color=dots.get_color())
        ax.set(xlabel="learning rate", ylabel=f"{self.measure}, {self.dev_rows} dev rows", xscale="log")
        ax.legend(frameon=False)
        return ax


def mean_log_prob(dev: Batch) -> Callable[[Trained], float]:
    """Mean log-probability of the targets of dev rows, in nats per target."""
    return lambda trained: float(trained.log_probs(dev).sum() / dev.target_mask.sum())


def search_settings(
    space: Space,
    subject: Subject,
    data: Batch,
    dev: Batch,
    config: FitConfig = FitConfig(steps=60),
    *,
    score: Callable[[Trained], float] | None = None,
    measure: str = "log-probability per target",
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> MethodSearch:
    """Train each setting of a space with one seed for the steps of `config`, and keep what scores most on `dev`.

    Args:
        score: of a trained method, more is better; the mean log-probability of dev targets by default. A score of one's
            own has a name, `measure`.
        folder: where each trial is written; a search that was killed goes on there, within a trial too. Trials of other
            data, settings or models are others.

    Raises:
        NotFinite: for a score that is no finite number.
    """
    judge = mean_log_prob(dev) if score is None else score
    rows = {"data": data.fingerprint, "dev": dev.fingerprint, "config": asdict(config), "seed": seed, "by": measure}
    identity = {**rows, "weights": subject.fingerprint.weights, "kind": type(space.method).__name__}
    trials = _Trials(space, subject, data, config, seed, judge, None if folder is None else located(folder), identity)
    with tqdm(total=space.trials, desc=f"search {space.method.name}", unit="trial", disable=not progress) as bar:
        for setting in space.settings(trials.best):
            trials.run(setting)
            bar.update()
    best = trials.best([tried.setting for tried in trials.done])
    steps = config.total_steps(len(data))
    told = (tuple(trials.done), steps, rows_seen(config, len(data)) * len(trials.done), measure, len(dev), seed)
    return MethodSearch(with_settings(space.method, best), best["lr"], *told)


def rows_seen(config: FitConfig, rows: int) -> int:
    """How many rows all optimizer steps together see."""
    return sum(len(part) for step in range(config.total_steps(rows)) for part in config.micro_batches(step, rows))


def with_settings(method: Method, setting: Mapping[str, Any]) -> Method:
    """The method with values of its fields, a learning rate left out."""
    return replace(method, **{name: value for name, value in setting.items() if name != "lr"})


@dataclass
class _Trials:
    """The settings that were trained so far."""

    space: Space
    subject: Subject
    data: Batch
    config: FitConfig
    seed: int
    judge: Callable[[Trained], float]
    folder: Path | None
    identity: dict[str, Any]
    done: list[Tried] = field(default_factory=list)

    def best(self, some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The setting of these that scored most; the first of equals."""
        return max((tried for tried in self.done if tried.setting in some), key=lambda tried: tried.score).setting

    def run(self, setting: dict[str, Any]) -> None:
        """Train and score a setting, or read what became of it."""
        method, file = with_settings(self.space.method, setting), None
        if self.folder is not None:
            told = json.dumps({**self.identity, "method": repr(method), "lr": setting["lr"]}, sort_keys=True)
            file = self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        if file is not None and file.is_file():
            self.done.append(Tried(**{**json.loads(file.read_text(encoding="utf-8")), "setting": setting}))
            return
        checkpoint = None if file is None else file.with_suffix(".checkpoint")
        config = self.config.replace({"lr": setting["lr"]})
        fitted = method.fit(self.subject, self.data, config, seed=self.seed, checkpoint=checkpoint, progress=False)
        score = float(self.judge(fitted))
        if not math.isfinite(score):
            raise NotFinite(f"the score of {setting} is {score}, expected a finite number")
        seconds = fitted.seconds_per_step * len(fitted.losses)
        tried = Tried(setting, score, fitted.losses[-1], fitted.parameters, seconds)
        if file is not None and checkpoint is not None:
            write_atomically(file, json.dumps(asdict(tried)).encode())
            checkpoint.unlink(missing_ok=True)
        self.done.append(tried)
