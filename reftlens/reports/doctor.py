"""`reftlens doctor`: versions, devices, caches and a check of the whole chain, to be put into a bug report."""

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from reftlens.bridge.pretrained import DEFAULT_MODEL, load_model, no_bars, stored_model
from reftlens.bridge.protocol import Bridge, parameter_total
from reftlens.bridge.wheel import cache
from reftlens.editing.preflight import hooks
from reftlens.editing.reading import activations
from reftlens.editing.reft import ReFT
from reftlens.editing.site import resid_post
from reftlens.errors import NotFinite
from reftlens.interventions import LoReFT
from reftlens.scoring.evaluation import evaluate
from reftlens.text.encoding import encode, encode_prompts
from reftlens.text.template import Example
from reftlens.training.fitting import fit

NEEDED = (
    "reftlens",
    "torch",
    "transformers",
    "transformer-lens",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
)
OPTIONAL = ("gguf", "accelerate", "datasets", "peft", "ipywidgets", "scikit-learn", "openai", "lm-eval")
_WORDS = ("the", "a", "cat", "dog", "sat", "on", "mat", "ran", "looked", "at", "moon", "and")


def add_doctor(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `doctor` to the commands."""
    command = commands.add_parser("doctor", help="say what is installed and whether it works, for a bug report")
    command.add_argument("--model", metavar="NAME", help="load this model, too: a folder, a hub id, or a wheel's name")
    command.set_defaults(run=run)


def diagnosis(name: str | None = None) -> tuple[str, bool]:
    """What is here, and whether every check has passed; `name` is of a model that is loaded, too."""
    checks = {"tiny random model": _tiny_check, "default model": _default_model}
    if name is not None:
        checks[name] = lambda: _booted(name)
    lines, passed = [*_versions(), "", *_devices(), "", *_caches(), ""], True
    for what, check in checks.items():
        try:
            lines.append(f"{what}: {check()}")
        except Exception as error:  # whatever breaks is what is to be told
            passed = False
            lines.append(f"{what}: failed: {type(error).__name__}: {error}")
    return "\n".join(lines), passed


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield ", ".join(f"{name} {_version(name)}" for name in NEEDED)
    yield "optional: " + ", ".join(f"{name} {_version(name)}" for name in OPTIONAL)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices() -> Iterator[str]:
    yield f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        yield f"CUDA {i}: {torch.cuda.get_device_name(i)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if not torch.cuda.is_available():
        yield "CUDA: none"


def _caches() -> Iterator[str]:
    yield from _hub_cache()
    folders = sorted(folder for folder in cache().glob("*") if folder.is_dir())
    yield f"reftlens cache, {cache()}: {'' if folders else 'empty'}".rstrip()
    for folder in folders:
        yield f"  {folder.name}, {_size(folder) / 1e6:.0f} MB"


def _hub_cache() -> Iterator[str]:
    from huggingface_hub import constants, scan_cache_dir

    path = Path(constants.HF_HUB_CACHE)
    repos = sorted(scan_cache_dir(path).repos, key=lambda repo: repo.repo_id) if path.is_dir() else []
    yield f"Hugging Face cache, {path}: {'' if repos else 'empty'}".rstrip()
    for repo in repos:
        yield f"  {repo.repo_type} {repo.repo_id}, {repo.size_on_disk / 1e6:.0f} MB"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _tiny_check() -> str:
    """Train two steps on the CPU, and see that strength 0 is the model as it was."""
    with tempfile.TemporaryDirectory() as folder:
        model = _tiny_model(folder)
    data = encode(model, [Example("the cat sat on", " the mat"), Example("a dog", " ran and looked")])
    reft = ReFT({resid_post(0, "last"): LoReFT(model.cfg.d_model, rank=2, init="identity")})
    reft.reset(seed=0)
    before = evaluate(reft, model, data, [0], progress=False).loss[0]
    run = fit(reft, model, data, steps=2, lr=1e-2, progress=False)
    after = evaluate(reft, model, data, [0, 1], progress=False).loss
    if not torch.equal(after[0], before) or after[1].mean() >= before.mean():
        raise RuntimeError(
            f"mean losses {before.mean():.4f} before, {after.mean(dim=1).tolist()} at strength 0 and 1 after"
        )
    return f"trained 2 steps, loss {before.mean():.4f} to {after[1].mean():.4f}; {run.computation}"


def _tiny_model(folder: str) -> Bridge:
    """A random model that knows a dozen words, by way of a folder, as every model comes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<unk>", "<s>", "</s>", *_WORDS))}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]), no_bars():
        torch.default_generator.manual_seed(0)
        plain = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes))
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, device="cpu", progress=False)


def _default_model() -> str:
    folder = stored_model(DEFAULT_MODEL)
    where = (
        "not on this machine; the first load_model() or `reftlens demo` fetches it"
        if folder is None
        else f"in {folder}"
    )
    return f"{DEFAULT_MODEL}, {where}"


def _booted(name: str) -> str:
    model = load_model(name, progress=False)
    last = activations(
        model, encode_prompts(model, ["A text."]), resid_post(model.cfg.n_layers - 1, "last"), progress=False
    )
    if not last.isfinite().all():
        raise NotFinite("the last block writes numbers that are not finite")
    shape = (
        f"{model.cfg.n_layers} blocks of width {model.cfg.d_model}, {parameter_total(model) / 1e6:.1f} million numbers"
    )
    return f"{type(model.original_model).__name__} on {model.cfg.device}, {shape}, {len(hooks(model))} hooks to edit"
