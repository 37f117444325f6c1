"""The experiments that ReFT was judged by, each a recipe that one call or command runs."""

from reftlens.experiments.catalogue import RECIPES
from reftlens.experiments.lm_harness import harness
from reftlens.experiments.methods import METHODS, Method, Trained
from reftlens.experiments.recipe import Recipe, Scope
from reftlens.experiments.records import Prediction
from reftlens.experiments.rows import TASKS, load_rows
from reftlens.experiments.runner import run_recipe
from reftlens.experiments.subjects import Subject
from reftlens.experiments.tables import Table, table
from reftlens.experiments.task import Row, Task
from reftlens.experiments.texts import Entry, TextRecipe

__all__ = [
    "METHODS",
    "RECIPES",
    "TASKS",
    "Entry",
    "Method",
    "Prediction",
    "Recipe",
    "Row",
    "Scope",
    "Subject",
    "Table",
    "Task",
    "TextRecipe",
    "Trained",
    "harness",
    "load_rows",
    "run_recipe",
    "table",
]
