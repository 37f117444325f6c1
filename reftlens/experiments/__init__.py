"""The experiments that ReFT was judged by, each a recipe that one call or command runs."""

from reftlens.experiments.lm_harness import harness
from reftlens.experiments.methods import METHODS, Method, Trained
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.recipes import RECIPES
from reftlens.experiments.recipes.texts import Entry, TextRecipe
from reftlens.experiments.rows.loading import TASKS, load_rows
from reftlens.experiments.rows.task import Row, Task
from reftlens.experiments.runs.batch_search import search_settings
from reftlens.experiments.runs.recipe import Recipe, Scope
from reftlens.experiments.runs.records import Prediction
from reftlens.experiments.runs.rotating import Rotations
from reftlens.experiments.runs.runner import run_recipe
from reftlens.experiments.runs.searching import MethodSearch
from reftlens.experiments.runs.tables import Table, table

__all__ = [
    "METHODS",
    "RECIPES",
    "TASKS",
    "Entry",
    "Method",
    "MethodSearch",
    "Prediction",
    "Recipe",
    "Rotations",
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
    "search_settings",
    "table",
]
