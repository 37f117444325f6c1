"""Methods that change the weights of a plain transformers model: those of `peft`, biases, and the unembedding."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from reftlens.errors import StoreMismatch
from reftlens.experiments.methods.acting import Acting, OnPlain
from reftlens.experiments.methods.method import PlainMethod
from reftlens.experiments.methods.subjects import Subject
from reftlens.numbers import real, whole


@dataclass(frozen=True)
class _Peft(PlainMethod):
    """A method of `peft`, with its extra (`pip install "reftlens[experiments]"`)."""

    @abstractmethod
    def config(self) -> Any:
        """The configuration that `peft` takes."""

    def configured(self, inside: Any) -> Any:
        """The configuration for this model."""
        return self.config()

    def prepared(self, inside: Any, seed: int) -> Any:
        """The `PeftModel`, its start drawn from `seed` as after `torch.manual_seed(seed)`."""
        from peft import get_peft_model

        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # transformers to peft
            torch.default_generator.manual_seed(seed)
            return get_peft_model(inside, self.configured(inside)).eval()

    def parts(self, inside: Any) -> list[nn.Module]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers: list[Any] = [m for m in inside.modules() if isinstance(m, BaseTunerLayer)]
        return layers

    def read(self, folder: Path, subject: Subject) -> Acting:
        return self.acting(read_adapter(folder / "adapter", subject), subject)


def read_adapter(folder: Path, subject: Subject, *, trainable: bool = False) -> Any:
    """A `PeftModel` of a fresh copy of the model and an adapter that `peft` stored.

    Raises:
        StoreMismatch: for other numbers than the adapter has on this model, of which `peft` itself only warns.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inside = PeftModel.from_pretrained(subject.plain(), str(folder), is_trainable=trainable)
    file = folder / "adapter_model.safetensors"
    stored = load_file(file).keys() if file.is_file() else set[str]()
    if odd := sorted(stored ^ get_peft_model_state_dict(inside).keys()):
        raise StoreMismatch(f"{folder} does not hold this adapter: {len(odd)} tensors are in one of both, as {odd[0]}")
    return inside.to(subject.device).eval()


@dataclass(frozen=True)
class Lora(_Peft):
    """`W' = W + (alpha / rank) B A` (Hu et al. 2021, arXiv 2106.09685), A drawn and B zero at the start.

    Args:
        alpha: None is twice the rank.
        targets: names of linear maps, such as `("q_proj", "v_proj")`; None is what `peft` takes for the architecture.
    """

    rank: int = 8
    alpha: int | None = None
    targets: Sequence[str] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        whole(self.rank, "rank", 1)
        if self.alpha is not None:
            whole(self.alpha, "alpha", 1)
        if self.targets is not None:
            object.__setattr__(self, "targets", (self.targets,) if isinstance(self.targets, str) else (*self.targets,))
        real(self.dropout, "dropout")

    @property
    def name(self) -> str:
        return "LoRA"

    def config(self, dora: bool = False) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=None if self.targets is None else list(self.targets),
            lora_dropout=self.dropout,
            use_dora=dora,
        )


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA on the directions of `W`, with their lengths trained beside it (Liu et al. 2024, arXiv 2402.09353)."""

    @property
    def name(self) -> str:
        return "DoRA"

    def config(self, dora: bool = True) -> Any:
        return super().config(dora)


@dataclass(frozen=True)
class IA3(_Peft):
    """Keys, values and MLP activations, each number times a trained one (Liu et al. 2022, arXiv 2205.05638).

    Args:
        targets: names of linear maps whose outputs are scaled; None is what `peft` takes.
        feedforward: those of them whose inputs are scaled in place of outputs.
    """

    targets: Sequence[str] | None = None
    feedforward: Sequence[str] | None = None

    def config(self) -> Any:
        from peft import IA3Config

        lists = [None if names is None else list(names) for names in (self.targets, self.feedforward)]
        return IA3Config(target_modules=lists[0], feedforward_modules=lists[1])

    @property
    def name(self) -> str:
        return "(IA)3"


@dataclass(frozen=True)
class Prefix(_Peft):
    """Trained keys and values before the first token of each layer (Li and Liang 2021, arXiv 2101.00190).

    They are drawn as `peft` draws them, so that training does not begin with the unedited model.
    """

    tokens: int = 10

    def __post_init__(self) -> None:
        whole(self.tokens, "tokens", 1)

    @property
    def name(self) -> str:
        return "prefix tuning"

    def config(self, decoder: bool = True) -> Any:
        from peft import PrefixTuningConfig

        kind = "CAUSAL_LM" if decoder else "FEATURE_EXTRACTION"
        return PrefixTuningConfig(task_type=kind, num_virtual_tokens=self.tokens)

    def configured(self, inside: Any) -> Any:
        return self.config(decoder=hasattr(inside, "prepare_inputs_for_generation"))

    def parts(self, inside: Any) -> list[nn.Module]:
        return [inside.prompt_encoder]

    def acting(self, inside: Any, subject: Subject) -> Acting:
        return OnPlain(inside, subject)


@dataclass(frozen=True)
class _Some(PlainMethod):
    """A part of the model's own parameters is trained."""

    @abstractmethod
    def chosen(self, inside: Any) -> dict[str, nn.Parameter]:
        """The parameters, by name; the model is made ready for training them alone."""

    def prepared(self, inside: Any, seed: int) -> Any:
        """Nothing is drawn: training begins with the model's own weights."""
        chosen = self.chosen(inside.requires_grad_(False))
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return inside

    @torch.no_grad()
    def read(self, folder: Path, subject: Subject) -> Acting:
        inside = self.prepared(subject.plain(), 0)
        chosen, stored = self.chosen(inside), load_file(folder / "weights.safetensors")
        if {n: p.shape for n, p in chosen.items()} != {n: t.shape for n, t in stored.items()}:
            raise StoreMismatch(f"{folder} holds other parameters than {self.name} trains on this model")
        for name, parameter in chosen.items():
            parameter.copy_(stored[name])
        return self.acting(inside, subject)


@dataclass(frozen=True)
class BitFit(_Some):
    """The biases of all linear maps and norms (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    def chosen(self, inside: Any) -> dict[str, nn.Parameter]:
        biases = {n: p for n, p in inside.named_parameters() if n.split(".")[-1] == "bias"}
        if not biases:
            raise ValueError(
                f"BitFit trains biases, and this {type(inside).__name__} has none: choose a model with biases, as "
                "GPT-2 or BERT; Reft(kind='LobiReFT') adds a bias to hidden states of any model"
            )
        return biases


@dataclass(frozen=True)
class HeadOnly(_Some):
    """Full fine-tuning of the unembedding alone; where it is tied to the embedding, of a copy of it."""

    @property
    def name(self) -> str:
        return "head only"

    def chosen(self, inside: Any) -> dict[str, nn.Parameter]:
        head = inside.get_output_embeddings()
        if head is None:
            raise ValueError(f"this {type(inside).__name__} has no unembedding to train: load the class with its head")
        if head.weight is inside.get_input_embeddings().weight:
            head.weight = nn.Parameter(head.weight.detach().clone())
            inside.config.tie_word_embeddings = False
        ours = {id(p) for p in head.parameters()}
        return {n: p for n, p in inside.named_parameters() if id(p) in ours}
