"""The settings of a method, chosen on dev rows: every method's search has the same number of row-updates."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reftlens import figures
from reftlens.errors import NotFinite
from reftlens.experiments.methods.method import Method, Trained
from reftlens.experiments.methods.spaces import Space, with_settings
from reftlens.experiments.methods.subjects import Subject
from reftlens.figures import Axes, DataFrame
from reftlens.files import located, write_atomically
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig


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
