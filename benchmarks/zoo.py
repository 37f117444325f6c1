"""One tiny model with random weights for every architecture: `boot` makes a bridge, `plain` a second copy without one.

    import zoo; bridge = zoo.boot("LlamaForCausalLM"); model = zoo.plain("LlamaForCausalLM")

Nothing that it does starts another program: TransformerLens installs torchvision where a multimodal class lacks it,
and pip would then replace torch itself.
"""

import dataclasses
import importlib.util
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo_configs import CLASSES, COMMON, NO_ADAPTER, TOWER, VARIANTS

ROWS = CLASSES | VARIANTS | NO_ADAPTER
FORBIDDEN: list[str] = []
"""Commands that something tried to run inside `no_commands`."""


@contextmanager
def no_commands() -> Iterator[None]:
    """Inside the block no other program can be started; what was tried is kept in `FORBIDDEN`."""

    def refuse(command: Any, *_: Any, **__: Any) -> Any:
        FORBIDDEN.append(command if isinstance(command, str) else " ".join(map(str, command)))
        raise PermissionError(f"the zoo starts no other program: {FORBIDDEN[-1]}")

    names = ("run", "call", "check_call", "check_output", "Popen")
    before: dict[str, Any] = {name: getattr(subprocess, name) for name in names}
    try:
        for name in names:
            setattr(subprocess, name, refuse)
        yield
    finally:
        for name, function in before.items():
            setattr(subprocess, name, function)


def boot(name: str) -> Any:
    """A `TransformerBridge` of its own, in eval mode."""
    from transformer_lens.model_bridge import TransformerBridge

    with no_commands():
        return TransformerBridge.boot_transformers(
            f"tiny/{name}", hf_model=plain(name), tokenizer=tokenizer(), device="cpu", dtype=torch.float32
        ).eval()


def plain(name: str, seed: int = 0) -> Any:
    """The transformers model; the same seed gives the same weights."""
    cls = _class(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config_of(name))  # the attention that transformers chooses
        _shake(model)
    model.config.architectures = [cls.__name__]
    return model.eval()


def config_of(name: str) -> Any:
    return _config(_class(name).config_class, ROWS[name], COMMON)


def _class(name: str) -> Any:
    return getattr(transformers, name.split(":")[0])


def _config(cls: Any, special: dict[str, Any], shared: dict[str, Any]) -> Any:
    """`shared` as far as `cls` knows the names, `special` over it, and the same for the configurations inside."""
    vocab = len(tokenizer())
    words = {"vocab_size": vocab, "vocab_size_per_layer_input": vocab} if shared is COMMON else {}
    known = {field.name for field in dataclasses.fields(cls)}
    settings = {name: value for name, value in (shared | words).items() if name in known}
    for part, usual in getattr(cls, "sub_configs", {}).items():
        inner = dict(special.get(part, {}))
        kind = inner.pop("model_type", None)
        chosen = CONFIG_MAPPING[kind] if kind else usual
        if chosen is not transformers.AutoConfig:
            settings[part] = _config(chosen, inner, COMMON if part in ("text_config", "encoder", "decoder") else TOWER)
    own = {name: value for name, value in special.items() if name not in getattr(cls, "sub_configs", {})}
    return cls(**settings | own)


@torch.no_grad()
def _shake(model: Any) -> None:
    """No bias is 0 and no norm's gain is 1, and tied embeddings do not repeat the last token for ever.

    What is one and the same number throughout gets noise added to it, whatever number its family starts from.
    """
    for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("bias"))]:
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        model.get_input_embeddings().weight.mul_(0.3)


def _tests() -> Any:
    """tests/architectures.py, under another name than that of the script beside this file."""
    path = Path(__file__).parent.parent / "tests" / "architectures.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tokenizer = _tests().tokenizer
