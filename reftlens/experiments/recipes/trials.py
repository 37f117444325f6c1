"""What trials of heads and of texts have in common: a method with its settings, and what identifies a run of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.spaces import with_settings
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.rows.task import Row
from reftlens.experiments.runs.recipe import Scope, Setting, Trial


class FittedTrial(Trial):
    """One method with one seed on one part of a recipe.

    Args:
        method: as the recipe has it, None for a head alone; `setting` changes its fields.
        settings: fields of `FitConfig` in place of the recipe's.
    """

    rows: Sequence[Row]
    """Those that are trained on."""

    def __init__(
        self,
        recipe: Any,
        part: str,
        name: str,
        seed: int,
        subject: Subject,
        scope: Scope,
        setting: Setting,
        method: Method | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.recipe, self.part, self.name, self.seed, self.subject, self.scope = (
            recipe,
            part,
            name,
            seed,
            subject,
            scope,
        )
        self.method: Any = method if method is None else with_settings(method, setting)
        own = {k: v for k, v in {"steps": scope.steps, "lr": setting.get("lr")}.items() if v is not None}
        self.fit_config = recipe.config.replace({**settings, **own, "seed": seed})

    @property
    def row_updates(self) -> int:
        return self.fit_config.row_updates(len(self.rows))

    def disk(self, numbers: int, rows: int, written: int = 0) -> int:
        """Bytes of a finished run, about: each number, 300 bytes of each answered row, and four of each token."""
        return numbers * max(4, self.subject.dtype.itemsize) + 300 * rows + 4 * written

    @property
    def identity(self) -> dict[str, Any]:
        """What the configuration of every run holds."""
        return {
            "recipe": self.recipe.name,
            "part": self.part,
            "method": self.name,
            "seed": self.seed,
            "settings": {"kind": type(self.method).__name__, **(asdict(self.method) if self.method else {})},
            "fit": asdict(self.fit_config),
            "model": self.subject.fingerprint.to_dict(),
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "max_length": self.recipe.max_length,
        }
