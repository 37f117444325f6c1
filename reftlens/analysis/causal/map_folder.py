"""The folder of a map: the cells of each layer in a file of its own, read instead of computed again."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reftlens.analysis.causal.map_results import Cell
from reftlens.files import write_atomically


def read_cells(folder: Path, layer: int, fingerprint: str) -> list[Cell] | None:
    """The cells of a layer, None where there is no file.

    Raises:
        ValueError: where the file has another fingerprint.
    """
    path = _path(folder, layer)
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["fingerprint"] != fingerprint:
        raise ValueError(f"{path} belongs to a map of other data or settings: choose another folder")
    return [Cell(**{**c, "choose": tuple(c["choose"]), "report": tuple(c["report"])}) for c in stored["cells"]]


def write_cells(folder: Path, layer: int, fingerprint: str, cells: Sequence[Cell]) -> None:
    """Write the cells of a layer: the whole file, or none, also where several processes fill one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"fingerprint": fingerprint, "cells": [asdict(c) for c in cells]}
    write_atomically(_path(folder, layer), json.dumps(stored).encode())


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.json"
