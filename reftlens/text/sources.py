"""Rows to exchange with: which batch they are of, and which of its rows each row of the data takes from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens.numbers import Integers, whole_numbers

if TYPE_CHECKING:
    from reftlens.text.batch import Batch


class Source(NamedTuple):
    """Rows to exchange with: `batch`, and for each row of the data which of its rows, or -1 for no exchange."""

    batch: "Batch"
    rows: Int[Tensor, " rows"]


def row_numbers_of(name: str, rows: Integers, available: int, count: int) -> Int[Tensor, " rows"]:
    """For each of `count` rows the number of one of the `available` rows of source `name`, or -1.

    Raises:
        ValueError: for another number of rows, or a row that is not there.
    """
    numbers = torch.tensor(whole_numbers(rows, f"row of source {name!r}"), dtype=torch.long)
    if len(numbers) != count:
        raise ValueError(f"source {name!r} has {len(numbers)} row(s), and the data {count}")
    if count and not -1 <= int(numbers.min()) <= int(numbers.max()) < available:
        raise ValueError(f"source {name!r} names rows outside -1 to {available - 1} of its batch")
    return numbers


def in_one(sources: Sequence[tuple[Source | None, int]]) -> tuple[list[Any], Int[Tensor, " rows"]]:
    """The batches of the sources of one variable, and the rows in all of them together; of so many rows that have no
    source, -1."""
    rows, parts, begins = list[Tensor](), [], 0
    for source, count in sources:
        if source is None:
            rows.append(torch.full((count,), -1))
            continue
        rows.append(torch.where(source.rows >= 0, source.rows + begins, -1))
        parts.append(source.batch)
        begins += len(source.batch)
    return parts, torch.cat(rows)
