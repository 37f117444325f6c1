"""Runs of recipes: each in a folder that a killed one goes on from, and tables of what is in the folders."""
