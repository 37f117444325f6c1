"""Commonsense reasoning (paper, section 4.2 and Appendix C): eight data sets, trained on together, tested one by one.

The paper's LoReFT edits every block, at rank 8, at the first and last seven tokens of the prompt, with the weights of
both shared; its prompts and answers are those of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).
"""

from reftlens.experiments.methods import METHODS
from reftlens.experiments.recipes.texts import Entry, TextRecipe
from reftlens.generation.decoding import Decoding
from reftlens.training.config import FitConfig

_REFT, _ADAPTER = {"lr": 9e-4}, {"lr": 3e-4}
_RATES = {"base": {}, "lora": _ADAPTER, "dora": _ADAPTER, "prefix": {"lr": 1e-2}, "ia3": {"lr": 3e-3}}

TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "obqa")

COMMONSENSE = TextRecipe(
    name="commonsense",
    family="commonsense",
    train=TASKS,
    test=TASKS,
    entries={
        **{name: Entry(method, _RATES.get(name, _REFT)) for name, method in METHODS.items()},
        "format-only": Entry(METHODS["loreft"], _REFT, shuffled=True),
    },
    config=FitConfig(steps=125, batch_size=8, warmup=0.1),
    decoding=Decoding(max_new_tokens=32),
    train_limit=1000,
    limit=100,
)
