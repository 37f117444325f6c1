"""Arithmetic word problems answered in steps (paper, section 4.2), and how far the edits reach into the answer.

In the paper edits of the prompt alone lose 4.3 points to LoRA (LLaMA-7B). `loreft-4` edits the first four tokens that
are written as well, `loreft-all` every one; `loreft-opening` is taught the first words of each answer alone. Both are
as later work has it (arXiv 2511.10707).
"""

from reftlens.experiments.methods import METHODS, Reft
from reftlens.experiments.recipes.texts import WRITTEN, Entry, TextRecipe
from reftlens.generation.decoding import Decoding
from reftlens.training.config import FitConfig

_REFT = {"lr": 3e-3}
TASKS = ("mawps", "singleeq", "multiarith", "gsm8k", "aqua", "svamp", "addsub")
REACHES = (4, 8, 16, 32)

ARITHMETIC = TextRecipe(
    name="arithmetic",
    family="arithmetic",
    train=("math10k",),
    test=TASKS,
    entries={
        "base": Entry(METHODS["base"]),
        "loreft": Entry(Reft("LoReFT"), _REFT),
        **{f"loreft-{k}": Entry(Reft("LoReFT", response=k), _REFT) for k in REACHES},
        "loreft-all": Entry(Reft("LoReFT", response="all"), _REFT),
        "loreft-opening": Entry(Reft("LoReFT"), _REFT, opening=24),
        "direft": Entry(METHODS["direft"], _REFT),
        "red": Entry(METHODS["red"], _REFT),
        "lora": Entry(METHODS["lora"], {"lr": 3e-4}),
    },
    config=FitConfig(steps=125, batch_size=8, warmup=0.1),
    decoding=Decoding(max_new_tokens=256),
    train_limit=2000,
    limit=200,
    ways=(WRITTEN,),
    held_out=(("gsm8k", "dev"),),
)
