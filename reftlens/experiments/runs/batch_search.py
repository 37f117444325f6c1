"""Settings of a method for rows that are encoded already, as in a notebook."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reftlens.experiments.methods.method import Method, Trained
from reftlens.experiments.methods.spaces import Space, with_settings
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.runs.recipe import Setting
from reftlens.experiments.runs.searching import Attempt, MethodSearch, search
from reftlens.files import located
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig


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
    """Train each setting of a space with one seed for the steps of `config`, and tell what scores most on `dev`.

    Args:
        score: of a trained method, more is better; the mean log-probability of dev targets in nats by default. A score
            of one's own has a name, `measure`.
        folder: where `search.json` is kept; a search that was killed goes on there behind the last setting.

    Raises:
        StoreMismatch: where the folder holds a search of other data, another model or other settings.
        NotFinite: where no setting has a finite score.
    """
    judge = score or (lambda trained: trained.mean_log_prob(dev))
    of = {"data": data.fingerprint, "dev": dev.fingerprint, "config": asdict(config), "seed": seed, "by": measure}
    of |= {"weights": subject.fingerprint.weights, "method": repr(space.method)}

    def attempt(setting: Setting) -> Attempt:
        method, own = with_settings(space.method, setting), config.replace({"lr": setting["lr"], "seed": seed})
        return _OnBatches(method, subject, data, dev, own, judge)

    told: dict[str, Any] = {"steps": config.total_steps(len(data)), "measure": measure, "progress": progress}
    where = None if folder is None else located(folder)
    return search(space, attempt, of=of, folder=where, desc=f"search {space.method.name}", **told)


@dataclass
class _OnBatches:
    """An `Attempt` on rows that are encoded already."""

    method: Method
    subject: Subject
    data: Batch
    dev: Batch
    config: FitConfig
    judge: Callable[[Trained], float]
    trained: Trained | None = None

    @property
    def row_updates(self) -> int:
        return self.config.row_updates(len(self.data))

    @property
    def dev_rows(self) -> int:
        return len(self.dev)

    def fit(self, checkpoint: Path | None, *, progress: bool) -> None:
        settings: dict[str, Any] = {"seed": self.config.seed, "checkpoint": checkpoint, "progress": progress}
        self.trained = self.method.fit(self.subject, self.data, self.config, **settings)

    def dev_score(self) -> float:
        assert self.trained is not None
        return float(self.judge(self.trained))
