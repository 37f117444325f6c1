"""Language understanding (paper, section 4.4 and Appendix C): GLUE by an encoder with a trained head, task by task.

The protocol is the paper's: the validation split stands in for the hidden test rows and is halved (of more than 5,000
rows 1,000 are taken), the best epoch is chosen on one half, and the other is reported, over five seeds. Here the halves
are the same for every seed, so that methods are compared row by row, and the best epoch is that of the lowest loss.
"""

from collections.abc import Mapping
from typing import Any, Literal

from reftlens.experiments.methods.adapters import IA3, BitFit, Dora, Lora, Prefix
from reftlens.experiments.methods.joint import ReftAndLora
from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.recipes.heads import HeadRecipe
from reftlens.training.config import FitConfig


def _reft(kind: str, init: Literal["identity", "paper"] = "identity") -> tuple[Method, Mapping[str, Any]]:
    """Rank 1 on all blocks, at the first three and last three tokens, weights shared."""
    return Reft(kind, rank=1, positions="f3+l3", init=init), {"lr": 3e-3}


GLUE = HeadRecipe(
    name="glue",
    tasks=("sst2", "stsb", "qnli", "mnli", "mrpc", "cola", "qqp", "rte"),
    entries={
        "head": (None, {"lr": 1e-3}),
        "loreft": _reft("LoReFT"),
        "direft": _reft("DiReFT"),
        "noreft": _reft("NoReFT"),
        "consreft": _reft("ConsReFT", init="paper"),
        "lobireft": _reft("LobiReFT"),
        "red": _reft("RED"),
        "lora": (Lora(8), {"lr": 1e-3}),
        "dora": (Dora(8), {"lr": 1e-3}),
        "ia3": (IA3(), {"lr": 3e-3}),
        "prefix": (Prefix(10), {"lr": 3e-3}),
        "bitfit": (BitFit(), {"lr": 1e-3}),
        "reft+lora": (
            ReftAndLora(Reft(rank=1, positions="f3+l3", init="identity"), Lora(8)),
            {"lr": 1e-3},
        ),
    },
    config=FitConfig(epochs=4, batch_size=32, warmup=0.06, patience=100),
)
