"""The recipes by name."""

from reftlens.experiments.arithmetic import ARITHMETIC
from reftlens.experiments.commonsense import COMMONSENSE
from reftlens.experiments.glue import GLUE
from reftlens.experiments.instruct import INSTRUCT
from reftlens.experiments.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (COMMONSENSE, ARITHMETIC, INSTRUCT, GLUE)}
