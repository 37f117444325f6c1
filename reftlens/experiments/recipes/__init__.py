"""The experiments that ReFT was judged by, each a short file: data, template, sites, methods and score."""

from reftlens.experiments.recipes.catalogue import RECIPES
from reftlens.experiments.recipes.heads import HeadRecipe
from reftlens.experiments.recipes.texts import Entry, TextRecipe

__all__ = ["RECIPES", "Entry", "HeadRecipe", "TextRecipe"]
