"""Language understanding by a decoder: GLUE task by task, the label written as a word, a similarity as a number.

The paper puts a head on encoders (section 4.4), which is the recipe `glue`. The rows that are trained on, chosen by and
reported are the same there and here, so that an encoder with a head and a decoder with words are compared row by row.
"""

from reftlens.experiments.methods import METHODS
from reftlens.experiments.recipes.glue import GLUE
from reftlens.experiments.recipes.texts import Entry, TextRecipe
from reftlens.experiments.rows.splits import HALVES
from reftlens.generation.decoding import Decoding
from reftlens.training.config import FitConfig

_REFT = {"lr": 9e-4}

GLUE_WORDS = TextRecipe(
    name="glue-words",
    family="glue",
    train=GLUE.tasks,
    test=GLUE.tasks,
    entries={
        "base": Entry(METHODS["base"]),
        "loreft": Entry(METHODS["loreft"], _REFT),
        "direft": Entry(METHODS["direft"], _REFT),
        "red": Entry(METHODS["red"], _REFT),
        "lora": Entry(METHODS["lora"], {"lr": 3e-4}),
        "format-only": Entry(METHODS["loreft"], _REFT, shuffled=True),
    },
    config=FitConfig(steps=250, batch_size=8, warmup=0.1),
    decoding=Decoding(max_new_tokens=8),
    train_limit=GLUE.train_limit,
    limit=GLUE.limit,
    together=False,
    division=HALVES,
)
