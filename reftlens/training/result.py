"""What a training run was and how it went: enough to repeat it and to plot it."""

import math
import platform
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

from reftlens import figures
from reftlens.bridge.source import Source, in_words
from reftlens.figures import Axes, DataFrame
from reftlens.text.batch import Batch
from reftlens.text.view import token_text
from reftlens.training.config import FitConfig


def library_versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    names = ("reftlens", "torch", "transformers", "transformer-lens")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def encoding_of(data: Batch) -> dict[str, Any]:
    """How the rows of `data` were written, in plain values."""
    if data.template is None or data.tokenizer is None:
        return {}
    start, first = data.tokenizer.bos_token_id, data.tokens[:, 0]
    begins = start is not None and bool((first == start).all())
    words = asdict(data.template) | {"bos": data.tokenizer.bos_token if begins else None}
    return words | ({"answers": [token_text(data.tokenizer, i) for i in data.answers]} if data.answers else {})


@dataclass(frozen=True)
class FitResult:
    """The record of one run of `fit`; index `i` of the tuples is optimizer step `i`."""

    config: FitConfig
    losses: tuple[float, ...]
    """Mean training loss per target (nats, for cross-entropy)."""
    learning_rates: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    """Before clipping."""
    validation: tuple[tuple[int, float], ...]
    """`(steps done, mean loss per target)`."""
    best_step: int | None
    """Steps done when validation was best; the weights kept are of that moment if `patience` was set."""
    stopped_early: bool
    seconds: float
    """Time spent in training steps and evaluations, over all pieces of a resumed run."""
    data_hash: str
    model_name: str
    device: str
    versions: dict[str, str]
    computation: str = ""
    """What was computed at each step, and what was reused; or why everything was computed."""
    objective: str = "cross_entropy"
    """What was minimised, with its settings."""
    weights: str = ""
    """SHA-256 of the weights that the run ended with."""
    source: Source = field(default_factory=dict)
    """Where the model's weights were read from."""
    encoding: dict[str, Any] = field(default_factory=dict)
    """How the data were encoded: the settings of the `Template`, the token that every row begins with, where that is
    `bos`, and the answers that were scored among; empty for rows that were not encoded from text."""

    def __repr__(self) -> str:
        unit = "nats per target" if self.objective == "cross_entropy" else f"by {self.objective}"
        held_out = f", validation {min(loss for _, loss in self.validation):.4f}" if self.validation else ""
        return (
            f"{len(self.losses)} steps in {self.seconds:.0f} s on {self.model_name}, {self.device}: loss "
            f"{self.losses[0]:.4f} → {self.losses[-1]:.4f} {unit}{held_out}\n{self.computation}"
            + (f"\nweights of {in_words(self.source)}" if self.source else "")
        )

    @property
    def loss(self) -> float:
        """Training loss of the last step."""
        return self.losses[-1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_frame(self) -> DataFrame:
        """One row per optimizer step: loss, learning rate, gradient norm, and validation loss where measured."""
        columns = {"loss": self.losses, "learning_rate": self.learning_rates, "gradient_norm": self.gradient_norms}
        steps, validation = range(1, len(self.losses) + 1), dict(self.validation)
        if validation:
            columns["validation_loss"] = tuple(validation.get(step, math.nan) for step in steps)
        return figures.table({"step": steps, **columns}, "step")

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """Training loss over steps, with the validation loss (dashed) where there is one.

        Args:
            label: of this run where several are drawn on `ax`.
            color: likewise; by default the next of the colours of `ax`.
        """
        ax = figures.axes(ax)
        name = figures.entry(ax, label, "training")
        (line,) = ax.plot(range(1, len(self.losses) + 1), self.losses, color=color, label=name)
        if self.validation:
            steps, losses = zip(*self.validation, strict=True)
            style = {"linestyle": "--", "marker": "o", "markersize": 3, "color": line.get_color()}
            ax.plot(steps, losses, **style, label=figures.entry(ax, label, "validation"))
        ax.legend(frameon=False)
        crossed = self.objective == "cross_entropy"
        loss = "loss per target token (nats)" if crossed else f"loss by {figures.short(self.objective)}"
        ax.set(xlabel="optimizer step", ylabel=loss, ylim=(0, None))
        return ax
