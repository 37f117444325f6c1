"""Splits that are shares of one file, and those that a folder of data sets holds."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reftlens.experiments.rows.loading import load_rows, split
from reftlens.experiments.rows.task import Family, Row, file_at
from reftlens.text.loading import Source

SAMPLE = 0
"""Seed of samples and divisions of rows: every method and every seed sees the same."""


@dataclass(frozen=True)
class Division:
    """Two splits made of the rows of one file, no question in both: the same for every method and seed.

    Args:
        file: the split whose file it is.
        shares: of its rows, by split.
        most: so many rows of the first split, where the file has more than five times as many.
    """

    file: str
    shares: Mapping[str, float] = field(hash=False)
    most: int | None = None

    def rows(self, task: str, data: Source | None) -> dict[str, list[Row]]:
        """The rows of both, each in the order of the source."""
        every, shares = load_rows(task, self.file, data=data), self.shares
        if self.most is not None and len(every) > 5 * self.most:
            first, second = shares
            shares = {first: self.most / len(every), second: 1 - self.most / len(every)}
        return split(every, shares, seed=SAMPLE)


HALVES = Division("test", {"dev": 0.5, "test": 0.5}, most=1000)
"""Of GLUE, the labels of whose test rows are not public: one half of the validation rows chooses, the other is reported
(LoReFT paper, section 4.4; Wu et al. 2024, RED)."""
TENTH = Division("train", {"train": 0.9, "test": 0.1})
"""Of a data set that has one file: a tenth is not trained on."""


def holds(data: Path, family: Family, name: str, split: str) -> bool:
    """Whether a folder holds the file of a task and split."""
    files = family.files(family.task(name), split)
    return any(file_at(data / folder / file) for folder in ("", family.name) for file in files)


def available(recipe: str, family: Family, names: Sequence[str], split: str, data: Path | None) -> tuple[str, ...]:
    """Those of these tasks that are in a folder, with a warning of the others; all, without one.

    Raises:
        ValueError: where it holds none of them.
    """
    there = [name for name in names if data is None or holds(data, family, name, split)]
    files = {name: family.files(family.task(name), split)[0] for name in names}
    if not there:
        raise ValueError(f"{data} holds none of the {split} files of {recipe}: looked for {', '.join(files.values())}")
    if missing := [files[name] for name in names if name not in there]:
        warnings.warn(f"{recipe} goes without {', '.join(missing)}, not in {data}", stacklevel=3)
    return tuple(there)
