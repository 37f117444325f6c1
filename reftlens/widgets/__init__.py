"""Edits live in a notebook."""
