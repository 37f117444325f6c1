"""A method and a head, trained together on labelled rows: the head is the same for all methods, and counted apart."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.editing.engine import hooked
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.site import Site, final_norm, resid_post
from reftlens.errors import StoreMismatch
from reftlens.experiments.methods.acting import size_on_disk
from reftlens.experiments.methods.costs import Measured, measured, measures
from reftlens.experiments.methods.joint import ReftAndLora
from reftlens.experiments.methods.loop import Loop, train
from reftlens.experiments.methods.method import Method, PlainMethod, frozen
from reftlens.experiments.methods.refts import OnHooks
from reftlens.experiments.methods.subjects import Subject
from reftlens.files import write_atomically
from reftlens.interventions.heads import Head
from reftlens.scoring.heads import HeadLoss, head_of, head_scores, label_losses
from reftlens.storage.folder import load, save
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit
from reftlens.training.run import History, Step

_FILE, _WEIGHTS = "classifier.json", "weights.safetensors"


@dataclass(frozen=True)
class HeadSpec:
    """The head of a task: see `Head`."""

    outputs: int
    dropout: float = 0.1


class Classifier(ABC):
    """A method and a head on a model, before and after training."""

    def __init__(self, method: Method | None, head: HeadSpec, subject: Subject, seed: int) -> None:
        self.method, self.spec, self.subject, self.seed = method, head, subject, seed
        self.measured = Measured()

    @abstractmethod
    def fit(self, data: Batch, validation: Batch, config: FitConfig, checkpoint: Path | None, progress: bool) -> None:
        """Train on labelled rows, and keep the weights of the epoch that was best on the validation rows."""

    @abstractmethod
    def scores(self, batch: Batch) -> Float[Tensor, "rows outputs"]:
        """What the head says of each row, dropout off."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers are trained and stored, those of the head among them."""

    @abstractmethod
    def write(self, folder: Path) -> None: ...

    @abstractmethod
    def read(self, folder: Path) -> None: ...

    def save(self, folder: Path) -> int:
        """Write what was trained; its size in bytes, head included."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)
        told = {"method": repr(self.method), "head": asdict(self.spec), "measured": asdict(self.measured)}
        write_atomically(folder / _FILE, json.dumps(told, indent=1).encode())
        return size_on_disk(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; `StoreMismatch` where it is of another method or head."""
        told: Mapping[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        if (told["method"], told["head"]) != (repr(self.method), asdict(self.spec)):
            raise StoreMismatch(f"{folder} holds {told['method']} with {told['head']}, expected {self.method!r}")
        self.read(folder)
        self.measured = Measured(**{name: frozen(value) for name, value in told["measured"].items()})


def classifier(method: Method | None, head: HeadSpec, subject: Subject, seed: int) -> Classifier:
    """An untrained one, drawn from the seed; `method` None trains the head alone.

    Raises:
        TypeError: for a method that no head can stand beside.
    """
    if method is None or isinstance(method, OnHooks):
        return OnHook(method, head, subject, seed)
    if isinstance(method, ReftAndLora):
        return OnAdapted(method, head, subject, seed)
    if isinstance(method, PlainMethod):
        return OnEncoder(method, head, subject, seed)
    raise TypeError(f"{method!r} cannot be trained beside a head: give a ReFT, a method of peft, BitFit, or None")


def read_at(subject: Subject) -> str:
    """The token that a head reads: the first, where the tokenizer has a mark for that, else the last."""
    return "last" if subject.tokenizer.cls_token_id is None else "first"


def site_of_head(subject: Subject) -> Site:
    """Where a head reads: what the model's own head would, after the last block of an encoder, or a decoder's norm."""
    hooks, at = subject.bridge.hook_dict, read_at(subject)
    decodes = "ln_final.hook_out" in hooks and "mlm_head.hook_in" not in hooks
    return final_norm(at) if decodes else resid_post(subject.bridge.cfg.n_layers - 1, at)


class OnHook(Classifier):
    """Edits and a head in one `ReFT`, on the bridge."""

    def __init__(self, method: OnHooks | None, head: HeadSpec, subject: Subject, seed: int) -> None:
        super().__init__(method, head, subject, seed)
        alone = ReFT({site_of_head(subject): Head(subject.bridge.cfg.d_model, head.outputs, dropout=head.dropout)})
        self.reft = alone if method is None else method.edit(subject, seed) | alone
        self.reft = self.reft.to(dtype=subject.dtype) if subject.dtype.itemsize > 4 else self.reft
        self.reft.reset(seed)

    def fit(self, data: Batch, validation: Batch, config: FitConfig, checkpoint: Path | None, progress: bool) -> None:
        steps, objective = list[Step](), HeadLoss(self.reft)
        settings: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress, "on_step": steps.append}
        with measured(self.subject.device) as cost:
            run = fit(
                self.reft, self.subject.bridge, data, config, validation=validation, objective=objective, **settings
            )
        history = History(losses=list(run.losses), evaluations=list(run.validation), seconds=run.seconds)
        edits = [m for m in self.reft.distinct if not isinstance(m, Head)]
        count = sum(m.stored_parameters for m in edits)
        self.measured = measures(self.subject, count, history, cost, len(steps))

    def scores(self, batch: Batch) -> Float[Tensor, "rows outputs"]:
        return head_scores(self.reft.eval(), self.subject.bridge, batch)

    @property
    def size(self) -> int:
        return sum(m.stored_parameters for m in self.reft.distinct)

    def write(self, folder: Path) -> None:
        save(self.reft, folder / "reft", self.subject.bridge)

    def read(self, folder: Path) -> None:
        self.reft = load(folder / "reft", self.subject.bridge)


class InLoop(Classifier):
    """Trained by a loop that computes everything."""

    both: nn.ModuleDict
    """All that is trained, and what it acts in."""
    parts: Sequence[nn.Module]
    """Those in training mode while it trains."""
    head: Head

    @abstractmethod
    def _scores(self, batch: Batch) -> Float[Tensor, "rows outputs"]: ...

    def fit(self, data: Batch, validation: Batch, config: FitConfig, checkpoint: Path | None, progress: bool) -> None:
        identity = {"method": repr(self.method), "head": asdict(self.spec), "start": self.seed}
        objective = HeadLoss(ReFT({site_of_head(self.subject): self.head}))
        for name, batch in {"data": data, "validation": validation}.items():
            objective.check(batch, name)
        settings: dict[str, Any] = {"validation": validation, "parts": self.parts, "identity": identity}
        loop = Loop(self.both, data, config, lambda _, batch: self._scores(batch), label_losses, **settings)
        with measured(self.subject.device) as cost:
            history = train(loop, checkpoint=checkpoint, progress=progress)
        own = {id(p) for p in self.head.parameters()}
        count = sum(p.numel() for p in loop.trained.values() if id(p) not in own)
        self.measured = measures(self.subject, count, history, cost, loop.taken)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Float[Tensor, "rows outputs"]:
        with training_mode(self.both, training=False):
            pieces = [batch[i : i + 32].to(self.subject.device) for i in range(0, len(batch), 32)]
            return torch.cat([self._scores(piece).cpu() for piece in pieces])

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.both.parameters() if p.requires_grad)

    def write(self, folder: Path) -> None:
        trained = {n: p.detach().cpu().contiguous() for n, p in self.both.named_parameters() if p.requires_grad}
        write_atomically(folder / _WEIGHTS, safetensors.torch.save(trained))

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        stored = safetensors.torch.load_file(folder / _WEIGHTS)
        trained = {n: p for n, p in self.both.named_parameters() if p.requires_grad}
        if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in stored.items()}:
            raise StoreMismatch(f"{folder} holds other parameters than {self.method!r} trains with this head")
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


class OnEncoder(InLoop):
    """A plain transformers model without its head, with adapters or trained biases, and a head on its last states."""

    def __init__(self, method: PlainMethod, head: HeadSpec, subject: Subject, seed: int) -> None:
        super().__init__(method, head, subject, seed)
        self.inside = method.prepared(subject.plain().base_model.requires_grad_(False), seed)
        width, generator = subject.bridge.cfg.d_model, torch.Generator().manual_seed(seed)
        self.head = Head(width, head.outputs, dropout=head.dropout, generator=generator)
        self.head = self.head.to(subject.device, subject.dtype if subject.dtype.itemsize > 4 else None)
        self.both = nn.ModuleDict({"inside": self.inside, "head": self.head})
        self.parts = [self.head, *method.parts(self.inside)]
        self.last = read_at(subject) == "last"

    def _scores(self, batch: Batch) -> Float[Tensor, "rows outputs"]:
        states = self.inside(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).last_hidden_state
        at = batch.attention_mask.sum(dim=1) - 1 if self.last else torch.zeros_like(batch.tokens[:, 0])
        return self.head.scores(states[torch.arange(len(batch), device=states.device), at])


class OnAdapted(InLoop):
    """Edits, a head, and an adapter below them, on a bridge that is made of both; all is trained together."""

    def __init__(self, method: ReftAndLora, head: HeadSpec, subject: Subject, seed: int) -> None:
        super().__init__(method, head, subject, seed)
        adapter = method.prepared(subject.plain().requires_grad_(False), seed)
        layers = method.lora.parts(adapter)
        self.bridge = subject.boot(adapter)
        self.reft = OnHook(method.reft, head, subject, seed).reft.to(subject.device)
        self.site, self.head = head_of(self.reft)
        self.both = nn.ModuleDict({"reft": self.reft, "adapted": self.bridge.original_model})
        self.parts = [self.reft, *layers]

    def _scores(self, batch: Batch) -> Float[Tensor, "rows outputs"]:
        found: list[Tensor] = []

        def read(h: Tensor, hook: Any) -> None:
            found.append(h[self.site.positions.mask(batch.view)])

        point = self.bridge.hook_dict[self.site.hook]
        with self.reft.on(self.bridge, batch), hooked(self.bridge, [(point, read)]):
            self.bridge.original_model.base_model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long())
        return self.head.scores(found[0])
