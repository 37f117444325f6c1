"""Settings of a training run, stored with its result, and the learning rate they imply at each step."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reftlens.errors import check_one_of
from reftlens.numbers import real, whole


@dataclass(frozen=True)
class FitConfig:
    """Settings of `fit`; every field is checked here.

    `lr` is the largest learning rate, `schedule` how it falls after warm-up: not at all ("constant"), or towards 0
    ("linear", "cosine"). An optimizer step sees `batch_size · accumulate` examples. `steps` overrides `epochs`.
    `warmup` below 1 is a share of all steps, else a number of steps. `clip` bounds the gradient norm (None: no bound).
    `weight_decay` is AdamW's, on all parameters but orthonormal frames. `eval_every` is in steps, by default one epoch;
    `patience` is how many evaluations without a better validation loss end the run, which then keeps the best weights.
    `precision="bfloat16"` computes the model under autocast. `seed` is of data order (with `shuffle`) and dropout, not
    of the weights that training starts from.
    """

    epochs: int = 10
    steps: int | None = None
    lr: float = 4e-3
    batch_size: int = 8
    accumulate: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    precision: Literal["model", "bfloat16"] = "model"
    seed: int = 0
    shuffle: bool = True
    eval_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulate", "steps", "eval_every", "patience", "seed")
        for name in (*counts, "lr", "warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is None and name in ("steps", "eval_every", "patience", "clip"):
                continue
            if name in counts:
                number = whole(value, name, None if name == "seed" else 1)
            else:
                number = real(value, name)
                if not 0 <= number < math.inf:
                    raise ValueError(f"{name}={value}, expected a finite number, 0 or more")
            object.__setattr__(self, name, number)
        if self.clip == 0:
            raise ValueError("clip=0 leaves no gradient: None switches clipping off")
        check_one_of("schedule", self.schedule, ("constant", "linear", "cosine"))
        check_one_of("precision", self.precision, ("model", "bfloat16"))

    def replace(self, settings: Mapping[str, Any]) -> "FitConfig":
        """The same with other values of the fields that `settings` names.

        Raises:
            TypeError: naming what is no field, and the fields there are.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in settings:
            if name not in names:
                raise TypeError(
                    f"{name}={settings[name]!r} is no argument and no setting; settings: {', '.join(names)}"
                )
        return dataclasses.replace(self, **settings)

    def steps_per_epoch(self, rows: int) -> int:
        return math.ceil(rows / (self.batch_size * self.accumulate))

    def total_steps(self, rows: int) -> int:
        return self.epochs * self.steps_per_epoch(rows) if self.steps is None else self.steps

    def uses(self, rows: int) -> float:
        """How often each of so many rows is computed in the whole run, about."""
        return self.total_steps(rows) * self.batch_size * self.accumulate / rows

    def row_updates(self, rows: int) -> int:
        """How many of so many rows all optimizer steps together see, each as often as it is seen."""
        return sum(len(part) for step in range(self.total_steps(rows)) for part in self.micro_batches(step, rows))

    def micro_batches(self, step: int, rows: int) -> list[tuple[int, ...]]:
        """Which of `rows` rows optimizer step `step` (from 0) sees: a function of the settings alone."""
        epoch, place = divmod(step, self.steps_per_epoch(rows))
        order = torch.arange(rows)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
            order = torch.randperm(rows, generator=generator)
        size, taken = self.batch_size, self.batch_size * self.accumulate
        chosen = order.tolist()[place * taken :][:taken]
        return [tuple(chosen[i : i + size]) for i in range(0, len(chosen), size)]

    def learning_rate(self, step: int, total: int) -> float:
        """The rate of optimizer step `step` (from 0) of `total`; linear and cosine fall towards 0 after warm-up."""
        warmup = math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else self.lr


def replaced(config: Any, settings: Mapping[str, Any]) -> FitConfig:
    """`config` with other settings."""
    if not isinstance(config, FitConfig):
        raise TypeError(f"config={config!r}, expected a FitConfig, or its settings by name, such as epochs=10")
    return config.replace(settings)


def derived_seed(seed: int, what: str, number: int) -> int:
    """An independent seed for each purpose, so that a run can be picked up at any step."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, what, number]).encode()).digest()[:7], "big")
