"""Rows of data sets, as records of a file or the hub and as prompts with the answers that are right."""

from reftlens.experiments.rows.loading import FAMILIES, TASKS, load_rows, split
from reftlens.experiments.rows.task import Family, Row, Task

__all__ = ["FAMILIES", "TASKS", "Family", "Row", "Task", "load_rows", "split"]
