"""What is checked of one architecture, part by part, beside the oracle: `check(name)` tells how each part ended."""

import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor

import reftlens as rl

TOLERANCE = 2e-4
"""Of the largest value: float32 sums in another order, three blocks deep, differ by some 1e-6, and gradients through
a QR factor by up to 2e-5; every fault that turned up here was 1e-3 or more."""
TEXT = "the cat sat on the mat and looked at the moon over the green hill while a dog ran by"
SENTENCE = 300


class Wrong(Exception):
    """The library's answer is not the oracle's."""


@dataclass
class Checked:
    """What came of one architecture; `parts` maps each part of the check to its ending, and to the words of it.

    An ending is "right", "wrong", "refused" (by a sentence of reftlens or TransformerLens) or "raw" (any other
    exception).
    """

    name: str
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)
    computation: dict[str, str] = field(default_factory=dict)
    """Of each fit, by the place of its edit."""
    error: float = 0.0
    """Largest relative difference from the oracle."""
    warnings: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """Programs that something tried to start."""
    seconds: float = 0.0

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` returns, or None where it ended otherwise than right."""
        result = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = run()
                self.parts[name] = ("right", "")
            except Wrong as difference:
                self.parts[name] = ("wrong", str(difference))
            except Exception as error:
                self.parts[name] = ending(error)
        ours = {str(w.message) for w in caught if "/reftlens/" in w.filename or "/benchmarks/" in w.filename}
        self.warnings += [f"{name}: {text}" for text in sorted(ours)]
        return result

    def equal(self, what: str, result: Tensor, expected: Tensor, floor: float = 0.0) -> None:
        """Raise `Wrong` where two tensors differ by more than rounding of the largest value, or of `floor`."""
        if result.shape != expected.shape:
            raise Wrong(f"{what} have shape {list(result.shape)}, the oracle's {list(expected.shape)}")
        largest = max(expected.abs().max().item(), floor, 1e-30)
        error = (result.double() - expected.double()).abs().max().item() / largest
        self.error = max(self.error, error)
        if not error <= TOLERANCE:
            raise Wrong(f"{what} differ by {error:.1e}")


def ending(error: Exception) -> tuple[str, str]:
    """Whether an exception was raised on purpose, and in one sentence, or is whatever broke.

    Where the oracle broke, the library had answered before it.
    """
    frames, text = traceback.extract_tb(error.__traceback__), str(error).strip()
    if any(frame.filename.endswith("/row_oracle.py") for frame in frames):
        return "wrong", f"answered, and the plain model cannot: {text[:120]}"
    last = frames[-1]
    if isinstance(error, ImportError) and "/transformers/" in last.filename:  # of a library that is not there
        return "refused", " ".join(text.split())
    ours = "/reftlens/" in last.filename or "/transformer_lens/" in last.filename
    slip = type(error) in (AttributeError, KeyError, IndexError, AssertionError)
    if ours and not slip and (last.line or "").startswith("raise ") and "\n" not in text and len(text) <= SENTENCE:
        return "refused", text
    return "raw", f"{type(error).__name__}: {text} ({'/'.join(Path(last.filename).parts[-2:])}:{last.lineno})"


def check(name: str) -> dict[str, Any]:
    """Everything about one row of the zoo, as JSON."""
    from edited_checks import check_edits

    began, checked = time.perf_counter(), Checked(name)
    torch.manual_seed(0)
    with zoo.no_commands(), tempfile.TemporaryDirectory() as folder:
        model = checked.part("transformers", lambda: zoo.plain(name).requires_grad_(False))
        if model is not None:
            loaded = checked.part("load_model", lambda: load_model(checked, model, Path(folder)))
            bridge = checked.part("boot", lambda: zoo.boot(name))
            if bridge is None and loaded is not None:  # as another class: that one is checked
                bridge = loaded
                model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").requires_grad_(False)
            if bridge is not None:
                checked.part("hooks", lambda: rl.hooks(bridge))
                check_edits(checked, bridge, model, Path(folder))
                refuse_meaningless(checked, meaningless(model))
    checked.commands, checked.seconds = list(zoo.FORBIDDEN), time.perf_counter() - began
    return asdict(checked)


def load_model(checked: Checked, model: Any, folder: Path) -> Any:
    """The bridge that `load_model` makes of the same weights in a folder; it gives the same logits."""
    model.save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    bridge = rl.load_model(str(folder / "model"), device="cpu", progress=False)
    ids = torch.tensor([zoo.tokenizer()(TEXT).input_ids])
    with torch.no_grad():
        logits, plain = bridge(ids, return_type="logits"), model(input_ids=ids, use_cache=False)
    if not hasattr(plain, "logits"):  # a class without a head, loaded with the embeddings as its head
        plain.logits = plain.last_hidden_state @ model.get_input_embeddings().weight.T
    checked.equal("logits of load_model", logits, plain.logits)
    return bridge


@torch.no_grad()
def meaningless(model: Any) -> str:
    """Why training on the next token, and generation, mean nothing for this model, or ""."""
    ids = zoo.tokenizer()("the cat sat on the mat").input_ids
    if getattr(model.config, "is_encoder_decoder", False):
        return "its encoder reads the tokens to predict"
    try:
        short, long = (model(input_ids=torch.tensor([some])).logits[0] for some in (ids[:-1], ids))
    except Exception:
        return "it has no logits for tokens"
    return "it sees the tokens it predicts" if (short - long[:-1]).abs().max() > 1e-3 * long.abs().max() else ""


def refuse_meaningless(checked: Checked, why: str) -> None:
    """Whatever was answered of a model for which no answer means anything is wrong."""
    for part, (status, text) in checked.parts.items():
        if why and status in ("right", "wrong") and part.startswith(("fit", "evaluate", "generate")):
            checked.parts[part] = ("wrong", f"answered, though {why}" + (f" ({text})" if text else ""))
