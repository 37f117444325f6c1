"""A data set scored under many ways of editing."""
