"""Methods of adapting a model, each trained on the same rows, steps and batch: `METHODS[name].fit(subject, data)`."""

from pathlib import Path

from reftlens.errors import index_of
from reftlens.experiments.methods.adapters import IA3, BitFit, Dora, HeadOnly, Lora, Prefix
from reftlens.experiments.methods.joint import ReftAndLora
from reftlens.experiments.methods.method import Method, Trained, load_trained
from reftlens.experiments.methods.refts import Reft, Steering, Unedited
from reftlens.experiments.methods.subjects import Subject

METHODS: dict[str, Method] = {
    "loreft": Reft("LoReFT"),
    "direft": Reft("DiReFT"),
    "orthodireft": Reft("OrthoDiReFT"),
    "noreft": Reft("NoReFT"),
    "consreft": Reft("ConsReFT", init="paper"),
    "lobireft": Reft("LobiReFT"),
    "red": Reft("RED"),
    "lora": Lora(),
    "dora": Dora(),
    "ia3": IA3(),
    "prefix": Prefix(),
    "bitfit": BitFit(),
    "head": HeadOnly(),
    "steering": Steering(),
    "reft+lora": ReftAndLora(),
    "base": Unedited(),
}
"""By the name that the command line takes, with their usual settings."""
_CLASSES: dict[str, type[Method]] = {
    c.__name__: c for c in (Reft, Steering, Unedited, Lora, Dora, IA3, Prefix, BitFit, HeadOnly, ReftAndLora)
}


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: if it is not in `METHODS`; the message says which are, and the nearest.
    """
    index_of(list(METHODS), name, "method")
    return METHODS[name]


def load(folder: str | Path, subject: Subject) -> Trained:
    """What `Trained.save` wrote, on the model that it was trained on.

    Raises:
        StoreMismatch: where the folder holds something else, or was trained on another model.
    """
    return load_trained(folder, subject, _CLASSES)
