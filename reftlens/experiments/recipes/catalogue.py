"""The recipes by name."""

from reftlens.experiments.recipes.arithmetic import ARITHMETIC
from reftlens.experiments.recipes.commonsense import COMMONSENSE
from reftlens.experiments.recipes.glue import GLUE
from reftlens.experiments.recipes.glue_words import GLUE_WORDS
from reftlens.experiments.recipes.instruct import INSTRUCT
from reftlens.experiments.runs.recipe import Recipe

_RECIPES: tuple[Recipe, ...] = (COMMONSENSE, ARITHMETIC, INSTRUCT, GLUE, GLUE_WORDS)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
