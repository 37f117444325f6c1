"""Instruction following (paper, section 4.3): UltraFeedback in the template of Alpaca; texts, and held-out ones scored.

The paper's LoReFT: four blocks, rank 4, first and last five tokens of the prompt, weights of their own; decoding is the
paper's too. How good a text is, only a judge can say: `judging.win_rate` takes the texts of two runs.
"""

from dataclasses import replace
from typing import Any

from reftlens.experiments.methods import METHODS, Reft
from reftlens.experiments.recipes.texts import TEXT, Entry, TextRecipe
from reftlens.experiments.rows.splits import TENTH
from reftlens.generation.decoding import Decoding
from reftlens.training.config import FitConfig

_REFT = {"lr": 9e-4}
_PLACES: dict[str, Any] = {"layers": (3, 9, 18, 24), "positions": "f5+l5", "tied": False}
_LOREFT = Reft("LoReFT", rank=4, **_PLACES)

INSTRUCT = TextRecipe(
    name="instruct",
    family="instruction",
    train=("ultrafeedback",),
    test=("ultrafeedback",),
    entries={
        "base": Entry(METHODS["base"]),
        "loreft": Entry(_LOREFT, _REFT),
        "direft": Entry(replace(_LOREFT, kind="DiReFT"), _REFT),
        "red": Entry(replace(_LOREFT, kind="RED", tied=True), _REFT),
        "lora": Entry(METHODS["lora"], {"lr": 3e-4}),
    },
    config=FitConfig(steps=125, batch_size=8),
    decoding=Decoding(max_new_tokens=256, repetition_penalty=1.1, no_repeat_ngram=5),
    train_limit=1000,
    limit=50,
    ways=(TEXT,),
    held_out=(("ultrafeedback", "test"),),
    max_length=768,
    division=TENTH,
)
