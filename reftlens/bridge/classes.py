"""Which class of transformers a folder holds, and why a model of it would mean nothing here; one sentence each."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


def check_reads_text(config: Any, model_class: Any, name: str) -> None:
    """Raise where a model does not read the tokens of one text, from the first on.

    Raises:
        ValueError: for an encoder-decoder, or a model of images or sounds.
    """
    reads = getattr(model_class, "main_input_name", "input_ids")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, whose encoder reads the tokens that its decoder predicts: choose a "
            "decoder, such as a Llama or a GPT-2"
        )
    if reads != "input_ids":
        raise ValueError(f"{name} reads {reads} and no tokens: choose a language model, such as a Llama or a GPT-2")


def class_in(folder: Path) -> type:
    """The class to load a folder as; raises as `class_of` does."""
    import transformers

    return class_of(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))


def class_of(config: Any) -> type:
    """The class of a configuration: a text tower by itself where transformers has one, else what it names.

    Raises:
        ValueError: where it does not read text, TransformerLens has no adapter for it, or it cannot be made a bridge
            without changing what is installed.
    """
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.utils.import_utils import is_torchvision_available

    named = (getattr(config, "architectures", None) or [""])[0]
    classes = _classes_of(config, named)
    name = named or (classes[0].__name__ if classes else type(config).__name__)
    check_reads_text(config, getattr(transformers, named, None) or next(iter(classes), None), name)
    fitting = [each for each in classes if each.__name__ in SUPPORTED_ARCHITECTURES]
    if not fitting:
        raise ValueError(
            f"TransformerLens has no adapter for {name}, so it has no hooks: choose a model of another family"
        )
    chosen = fitting[0]
    if config.get_text_config() is not config and chosen.__name__ == named and not is_torchvision_available():
        version = torch.__version__.partition("+")[0]
        raise ValueError(
            f"{name} reads more than text, and TransformerLens would install torchvision for it, which can replace "
            f"torch: run `pip install torchvision torch=={version}` yourself, which keeps torch as it is"
        )
    return chosen


def _classes_of(config: Any, named: str) -> list[type]:
    """The classes that can hold a configuration.

    One that predicts masked tokens only where the folder names it, or names an encoder without its head, such as a
    sentence encoder or a classifier.
    """
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture

    usual, masked = transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM
    wanted = get_hf_model_class_for_architecture(named)
    encodes = type(config) in masked._model_mapping and not getattr(config, "is_decoder", False)
    if encodes and named not in SUPPORTED_ARCHITECTURES:
        wanted = masked
    autos = [wanted] if wanted is masked else [usual, wanted]
    entries = [auto._model_mapping.get(type(config), None) for auto in autos]
    return [each for entry in entries for each in (entry if isinstance(entry, tuple) else (entry,)) if each is not None]


def name_class(model: Any) -> bool:
    """Whether TransformerLens has an adapter for the class of a model.

    A configuration that names no class, as one made by hand, or one without an adapter, as that of an encoder alone or
    of a classifier, names the model's own from then on.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    own = [each.__name__ for each in type(model).__mro__ if each.__name__ in SUPPORTED_ARCHITECTURES]
    named = model.config.architectures or [type(model).__name__]
    model.config.architectures = named if set(named) & set(SUPPORTED_ARCHITECTURES) else own[:1] or named
    return bool(own)


_headless: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Models whose head was not in their folder, and what was missing."""


def note_missing(model: nn.Module, missing: Collection[str]) -> None:
    """Warn where the head of a model was not in its folder, and remember it; its numbers are random.

    Raises:
        ValueError: where weights below the head were not in the folder either.
    """
    if not missing:
        return
    names, prefix = sorted(missing), f"{getattr(model, 'base_model_prefix', '')}."
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    words = f"the folder has no weights for {', '.join(names[:2])}{rest} of {type(model).__name__}"
    if any(name.startswith(prefix) for name in names):
        raise ValueError(f"{words}, which would be random numbers: load the whole model")
    warnings.warn(
        f"{words}, so its logits mean nothing: hidden states do, and a head of your own can be trained on them, "
        "rl.interventions.Head",
        stacklevel=5,
    )
    _headless[model] = words


def missing_head(model: nn.Module) -> str:
    """What was missing of the head of a model, in words; empty where nothing was."""
    return _headless.get(model, "")
