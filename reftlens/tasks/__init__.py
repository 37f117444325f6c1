"""Worked tasks: data, settings and scores that belong together, one module each."""
