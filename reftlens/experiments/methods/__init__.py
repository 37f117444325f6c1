"""Methods of adapting a model, each trained on the same rows, steps and batch: `METHODS[name].fit(subject, data)`."""

from reftlens.experiments.methods.adapters import IA3, BitFit, Dora, HeadOnly, Lora, Prefix
from reftlens.experiments.methods.catalogue import METHODS, load, method_of
from reftlens.experiments.methods.costs import Measured
from reftlens.experiments.methods.joint import ReftAndLora
from reftlens.experiments.methods.method import Method, Trained
from reftlens.experiments.methods.refts import OnHooks, Reft, Steering, Unedited
from reftlens.experiments.methods.spaces import Space, lora_space, reft_space, with_settings
from reftlens.experiments.methods.subjects import Subject

__all__ = [
    "IA3",
    "METHODS",
    "BitFit",
    "Dora",
    "HeadOnly",
    "Lora",
    "Measured",
    "Method",
    "OnHooks",
    "Prefix",
    "Reft",
    "ReftAndLora",
    "Space",
    "Steering",
    "Subject",
    "Trained",
    "Unedited",
    "load",
    "lora_space",
    "method_of",
    "reft_space",
    "with_settings",
]
