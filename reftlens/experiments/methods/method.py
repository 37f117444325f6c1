"""What every method has in common: it is fitted to rows, and gives something that scores, writes and is stored."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from reftlens.bridge.trial import check_predicts
from reftlens.errors import StoreMismatch
from reftlens.experiments.methods.acting import Acting, size_on_disk
from reftlens.experiments.methods.costs import Measured, measured, measures
from reftlens.experiments.methods.loop import Loop, train
from reftlens.experiments.methods.subjects import Subject
from reftlens.files import located, write_atomically
from reftlens.generation.decoding import Decoding
from reftlens.numbers import whole
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig

FILE = "method.json"


@dataclass(frozen=True, eq=False)
class Trained:
    """A method after `fit`: what it costs, how it scores, what it writes."""

    method: "Method"
    subject: Subject = field(repr=False)
    acting: Acting = field(repr=False)
    measured: Measured = field(default=Measured(), repr=False)

    @property
    def parameters(self) -> int:
        return self.measured.parameters

    @property
    def percent(self) -> float:
        return self.measured.percent

    @property
    def losses(self) -> tuple[float, ...]:
        return self.measured.losses

    @property
    def seconds_per_step(self) -> float:
        return self.measured.seconds_per_step

    @property
    def peak_bytes(self) -> int | None:
        return self.measured.peak_bytes

    def log_probs(self, batch: Batch, batch_size: int = 16) -> Float[Tensor, " rows"]:
        """For each row the sum of the log-probabilities of its targets, in nats; among `batch.answers`, if it has any.

        Raises:
            ValueError: where a row has no target.
        """
        return self.acting.log_probs(batch, whole(batch_size, "batch_size", 1))

    def mean_log_prob(self, batch: Batch) -> float:
        """Mean log-probability of all targets, in nats per target."""
        return float(self.log_probs(batch).sum() / batch.target_mask.sum())

    def texts(self, prompts: Batch, decoding: Decoding = Decoding()) -> list[str]:
        """What is written after each prompt of `encode_prompts`."""
        return self.acting.texts(prompts, decoding)

    def save(self, folder: str | Path) -> int:
        """Write what was trained to a folder, and return how many bytes `load` needs of it.

        A ReFT lies in `reft` as `rl.save` writes it, an adapter in `adapter` as `peft` does, so that either can be read
        without this library's experiments.
        """
        folder = located(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.acting.write(folder)
        told = {
            **self.method.told(),
            "measured": asdict(self.measured),
            "model": self.subject.fingerprint.to_dict(),
        }
        size = size_on_disk(folder) if type(self.method).stored else 0
        write_atomically(folder / FILE, json.dumps(told, indent=1).encode())
        return size


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt a model to a task; its fields are its settings.

    `fit` gives every method the same rows in the same order, the same micro-batches and the same learning rates: those
    that the `FitConfig` says, with `seed` in place of its own.
    """

    stored: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What a table calls it."""
        return type(self).__name__

    def size(self, subject: Subject) -> int:
        """How many numbers are trained and stored, tied ones once."""
        return 0

    def told(self) -> dict[str, Any]:
        """Its class and its settings, in plain values; those of a method in it are told alike."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "method": type(self).__name__,
            "settings": {name: v.told() if isinstance(v, Method) else v for name, v in values.items()},
        }

    def fit(
        self,
        subject: Subject,
        data: Batch | None = None,
        config: FitConfig = FitConfig(),
        *,
        seed: int = 0,
        validation: Batch | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Trained:
        """Train on rows of `rl.encode(subject.bridge, …)`, from a start that is drawn from `seed`.

        Args:
            data: the rows; a method that trains nothing needs none.
            checkpoint: a file, as that of `rl.fit`: a run that was killed goes on from it.

        Raises:
            TrainingDiverged, CheckpointMismatch: as `rl.fit`.
            TypeError: without rows, where there is something to train.
            ValueError: where the method does not fit the model, or the model does not predict next tokens.
        """
        if data is None and self.stored:
            raise TypeError(f"{self.name} was given no data, expected rows to train on")
        settings = {"validation": validation, "checkpoint": checkpoint, "progress": progress}
        return self._fitted(subject, cast(Batch, data), config.replace({"seed": seed}), settings)

    def _fitted(self, subject: Subject, data: Batch, config: FitConfig, settings: Mapping[str, Any]) -> Trained:
        """See `fit`: `config` has its seed, `settings` are `validation`, `checkpoint` and `progress`."""
        raise NotImplementedError

    @abstractmethod
    def read(self, folder: Path, subject: Subject) -> Acting:
        """What `Acting.write` stored."""


@dataclass(frozen=True)
class PlainMethod(Method):
    """A method that changes a plain transformers model, trained by `loop.train`."""

    @abstractmethod
    def prepared(self, inside: Any, seed: int) -> Any:
        """The model with what is to be trained in it: that alone takes gradients, and is drawn from `seed`."""

    def parts(self, inside: Any) -> list[nn.Module]:
        """Modules in training mode while it trains."""
        return []

    def acting(self, inside: Any, subject: Subject) -> Acting:
        from reftlens.experiments.methods.acting import Weights

        return Weights(inside, subject)

    def _fitted(self, subject: Subject, data: Batch, config: FitConfig, settings: Mapping[str, Any]) -> Trained:
        data.require_targets()
        check_predicts(subject.bridge)
        inside = self.prepared(subject.plain(), config.seed)
        given = {"validation": settings["validation"], "identity": self.identity(subject, config.seed)}
        loop, acting = self.loop(inside, subject, data, config, given)
        with measured(subject.device) as cost:
            history = train(loop, checkpoint=settings["checkpoint"], progress=settings["progress"])
        count = sum(p.numel() for p in loop.trained.values())
        return Trained(self, subject, acting(), measures(subject, count, history, cost, loop.taken))

    def size(self, subject: Subject) -> int:
        return sum(p.numel() for p in self.prepared(subject.plain(), 0).parameters() if p.requires_grad)

    def loop(
        self, inside: Any, subject: Subject, data: Batch, config: FitConfig, settings: Mapping[str, Any]
    ) -> tuple[Loop, Callable[[], Acting]]:
        """What trains the prepared model, and what makes of it, once it is trained, something that acts."""
        loop = Loop(inside, data, config, parts=self.parts(inside), **settings)
        return loop, lambda: self.acting(inside, subject)

    def identity(self, subject: Subject, seed: int) -> dict[str, Any]:
        """What a checkpoint has to agree with."""
        model = subject.fingerprint
        return {"method": repr(self), "start": seed, "model": [model.name, model.config, model.weights]}


def load_trained(folder: str | Path, subject: Subject, methods: dict[str, type[Method]]) -> Trained:
    """See `methods.load`."""
    folder = located(folder)
    file = folder / FILE
    if not file.is_file():
        raise StoreMismatch(f"{folder} holds no {FILE}: it is no folder that Trained.save wrote")
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = type(subject.fingerprint)(**told["model"])
    if changes := kept.differences(subject.fingerprint):
        raise StoreMismatch(f"{folder} was trained on another model: {'; '.join(changes)}")
    method = _made(methods, told, file)
    known = {k: frozen(v) for k, v in told["measured"].items()}
    return Trained(method, subject, method.read(folder, subject), Measured(**known))


def _made(methods: dict[str, type[Method]], told: dict[str, Any], file: Path) -> Method:
    """What `told` tells."""
    if told["method"] not in methods:
        raise StoreMismatch(f"{file} is of the method {told['method']!r}, known are {', '.join(methods)}")
    build: Callable[..., Method] = methods[told["method"]]
    settings = told["settings"].items()
    return build(**{k: _made(methods, v, file) if isinstance(v, dict) else frozen(v) for k, v in settings})


def frozen(value: Any) -> Any:
    """Lists of a JSON file as the tuples that they were."""
    return tuple(frozen(v) for v in value) if isinstance(value, list) else value
