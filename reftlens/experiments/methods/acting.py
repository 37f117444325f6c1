"""A model as a method has left it: what it gives to the targets of rows, and what it writes."""

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import resid_post
from reftlens.editing.variant import Variant
from reftlens.experiments.methods.loop import target_logits
from reftlens.experiments.methods.subjects import Subject
from reftlens.files import write_atomically
from reftlens.generation import Decoding, generate
from reftlens.generation.decoding import stop_tokens
from reftlens.interventions.fixed import SteeringVector
from reftlens.scoring.evaluation import losses_of
from reftlens.scoring.objectives import cross_entropy
from reftlens.storage.folder import save
from reftlens.text.batch import Batch


class Acting(ABC):
    """What scores and writes once a method was trained."""

    @abstractmethod
    def log_probs(self, batch: Batch, batch_size: int) -> Float[Tensor, " rows"]:
        """For each row the sum of the log-probabilities of its targets, in nats, float64 on the CPU."""

    @abstractmethod
    def texts(self, prompts: Batch, decoding: Decoding) -> list[str]:
        """What is written after each prompt."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Store what was trained."""


class OnBridge(Acting):
    """A bridge, edited by a `ReFT` or by none: rows share their beginnings, and what no edit can change is reused."""

    def __init__(self, bridge: Any, reft: ReFT | None) -> None:
        self.bridge, self.reft = bridge, reft

    def log_probs(self, batch: Batch, batch_size: int) -> Float[Tensor, " rows"]:
        if self.reft is None:
            last = resid_post(self.bridge.cfg.n_layers - 1, "all")
            plan = Plan(ReFT({last: SteeringVector(self.bridge.cfg.d_model)}), Variant(strength=0.0))
        else:
            plan = Plan(self.reft)
        settings: dict[str, Any] = {"batch_size": batch_size, "describe": "scores", "progress": False}
        losses, _, _ = losses_of(self.bridge, batch, [plan], cross_entropy, Reuse(), **settings)
        return -losses[0] * batch.target_mask.sum(dim=1).cpu()

    def texts(self, prompts: Batch, decoding: Decoding) -> list[str]:
        return list(generate(self.reft, self.bridge, prompts, decoding).texts)

    def write(self, folder: Path) -> None:
        if self.reft is not None:
            save(self.reft, folder / "reft", self.bridge)


class Weights(Acting):
    """A plain model whose weights were changed: it is scored through a bridge of a copy, with the adapters merged."""

    def __init__(self, inside: Any, subject: Subject) -> None:
        self.inside, self.subject = inside, subject

    @cached_property
    def merged(self) -> OnBridge:
        """Adapters folded into the weights, which changes logits by rounding alone and runs as the base model does."""
        inside = copy.deepcopy(self.inside)
        if hasattr(inside, "merge_and_unload"):
            inside = inside.merge_and_unload()
        return OnBridge(self.subject.boot(inside), None)

    def log_probs(self, batch: Batch, batch_size: int) -> Float[Tensor, " rows"]:
        return self.merged.log_probs(batch, batch_size)

    def texts(self, prompts: Batch, decoding: Decoding) -> list[str]:
        return self.merged.texts(prompts, decoding)

    def write(self, folder: Path) -> None:
        if hasattr(self.inside, "save_pretrained") and hasattr(self.inside, "peft_config"):
            self.inside.save_pretrained(folder / "adapter")
            return
        trained = {n: p.detach().cpu().contiguous() for n, p in self.inside.named_parameters() if p.requires_grad}
        write_atomically(folder / "weights.safetensors", safetensors.torch.save(trained))


class OnPlain(Weights):
    """A plain model, or a `PeftModel`, run as it is: for prefixes, which no bridge takes."""

    @torch.no_grad()
    def log_probs(self, batch: Batch, batch_size: int) -> Float[Tensor, " rows"]:
        batch.require_targets()
        lengths, sums = batch.attention_mask.sum(dim=1), torch.zeros(len(batch), dtype=torch.float64)
        order = lengths.argsort(stable=True).tolist()  # rows of like length together: less padding
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            some = batch[rows].to(self.subject.device)
            losses = cross_entropy(target_logits(self.inside, some), some).cpu().double()
            sums[rows] = -torch.zeros(len(rows), dtype=torch.float64).index_add(0, some.target_rows.cpu(), losses)
        return sums

    @torch.no_grad()
    def texts(self, prompts: Batch, decoding: Decoding, batch_size: int = 16) -> list[str]:
        """By transformers' own `generate`, in batches padded on the left."""
        written, settings = dict[int, str](), _settings(decoding, stop_tokens(self.subject.bridge, prompts))
        with torch.random.fork_rng([self.subject.device] if self.subject.device.type == "cuda" else []):
            torch.default_generator.manual_seed(decoding.seed)
            if self.subject.device.type == "cuda":
                torch.cuda.manual_seed(decoding.seed)
            for rows in _together(prompts, decoding, batch_size):
                some = prompts[rows].to(self.subject.device)
                order = some.attention_mask.long().argsort(dim=1, stable=True)  # padding first
                tokens, mask = some.tokens.gather(1, order), some.attention_mask.long().gather(1, order)
                ids = self.inside.generate(input_ids=tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]
                texts = self.subject.tokenizer.batch_decode(ids, skip_special_tokens=True)
                written.update(zip(rows, texts, strict=True))
        return [written[row] for row in range(len(prompts))]


def _together(prompts: Batch, decoding: Decoding, size: int) -> list[list[int]]:
    """Rows that are written together: of one length, where transformers counts padding among what was said before."""
    groups = [list(range(len(prompts)))]
    if decoding.repetition_penalty != 1 or decoding.no_repeat_ngram:
        lengths = prompts.attention_mask.sum(dim=1)
        groups = [(lengths == n).nonzero()[:, 0].tolist() for n in lengths.unique()]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _settings(decoding: Decoding, stops: set[int]) -> dict[str, Any]:
    """The same choice of tokens in transformers' words."""
    sampled = decoding.temperature > 0
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "do_sample": sampled,
        "temperature": decoding.temperature if sampled else None,
        "top_k": (decoding.top_k or 0) if sampled else None,
        "top_p": (decoding.top_p or 1.0) if sampled else None,
        "num_beams": decoding.beams,
        "repetition_penalty": decoding.repetition_penalty,
        "no_repeat_ngram_size": decoding.no_repeat_ngram,
        "eos_token_id": sorted(stops),
        "pad_token_id": min(stops),
    }


def size_on_disk(folder: Path) -> int:
    """Bytes of the files that loading needs; cards that say what they are, README.md, are left out."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
