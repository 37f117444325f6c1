"""A ReFT and a LoRA trained together: the adapter is put on first, the bridge is made of both, and all is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reftlens.editing.engine import forward
from reftlens.editing.reft import ReFT
from reftlens.experiments.methods.acting import Acting, OnBridge
from reftlens.experiments.methods.adapters import Lora, read_adapter
from reftlens.experiments.methods.loop import Loop
from reftlens.experiments.methods.method import PlainMethod
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.methods.subjects import Subject
from reftlens.storage.folder import load
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig


class Adapted(OnBridge):
    """A bridge over a model with an adapter on it, and an edit of its hooks."""

    def __init__(self, bridge: Any, reft: ReFT, weights: dict[str, Tensor], fresh: Callable[[], Any]) -> None:
        super().__init__(bridge, reft)
        self.weights, self.fresh = weights, fresh

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        super().write(folder)
        whole = self.fresh()  # a bridge has taken apart the one that was trained, which peft then cannot store
        for name, parameter in _trained(whole).items():
            parameter.copy_(self.weights[name])
        whole.save_pretrained(folder / "adapter")


@dataclass(frozen=True)
class ReftAndLora(PlainMethod):
    """Both at once, as in PyReFT's example of the two: one optimizer for the numbers of both.

    The weights below the edits change at each step, so that nothing frozen can be reused while they are trained. Once
    they are, the adapter stays as it is, and scoring reuses as ever.
    """

    reft: Reft = field(default_factory=Reft)
    lora: Lora = field(default_factory=Lora)

    @property
    def name(self) -> str:
        return f"{self.reft.name} and {self.lora.name}"

    def prepared(self, inside: Any, seed: int) -> Any:
        """The model with the adapter in it."""
        return self.lora.prepared(inside, seed)

    def size(self, subject: Subject) -> int:
        return self.reft.size(subject) + self.lora.size(subject)

    def loop(
        self, inside: Any, subject: Subject, data: Batch, config: FitConfig, settings: Mapping[str, Any]
    ) -> tuple[Loop, Callable[[], Acting]]:
        layers, weights = self.lora.parts(inside), _trained(inside)
        bridge, reft = subject.boot(inside), self.reft.edit(subject, config.seed).to(subject.device)

        def logits(module: nn.Module, batch: Batch) -> Tensor:
            with reft.on(bridge, batch):
                every = forward(bridge, batch.tokens, batch.attention_mask)
            at = every[batch.predicting]
            return at[:, list(batch.answers)] if batch.answers else at

        def acting() -> Acting:
            reft.settle()
            for weight in weights.values():
                weight.requires_grad_(False)
            return Adapted(bridge, reft.eval(), weights, lambda: self.prepared(subject.plain(), config.seed))

        both = nn.ModuleDict({"reft": reft, "adapted": bridge.original_model})
        return Loop(both, data, config, logits, parts=[reft, *layers], **settings), acting

    def read(self, folder: Path, subject: Subject) -> Acting:
        adapter = read_adapter(folder / "adapter", subject, trainable=True)
        weights, bridge = _trained(adapter), subject.boot(adapter)
        for weight in weights.values():
            weight.requires_grad_(False)
        return Adapted(bridge, load(folder / "reft", bridge), weights, lambda: self.prepared(subject.plain(), 0))


def _trained(adapter: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in adapter.named_parameters() if p.requires_grad}
