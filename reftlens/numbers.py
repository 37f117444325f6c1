"""Numbers as callers write them: of Python, numpy, torch or pandas, alone, in rows, or as a mask.

Everything that takes a place, a rank, a layer or a seed passes it through here once, and holds plain `int`s after
that: they can be compared, hashed and stored. A bool is no number: a mask among numbers would choose rows 0 and 1.
"""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Integers = Sequence[SupportsIndex] | Int[Tensor, " _"] | Iterable[Any]
"""Numbers in a row: a list, a range, a tensor, an array, a pandas Series (its own index is not looked at)."""
Choice = SupportsIndex | slice | Bool[Tensor, " _"] | Integers
"""One row, several, or a mask with a bool for each row."""


def whole(value: Any, name: str, least: int | None = None, *, hint: str = "") -> int:
    """`value` as an `int`.

    Raises:
        TypeError: if it is no whole number (a float, a bool, a tensor of several).
        ValueError: if it is less than `least`.
    """
    try:
        number = None if _is_bool(value) else index(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{name}={_shown(value)}, expected a whole number{hint}")
    if least is not None and number < least:
        raise ValueError(f"{name}={number}, expected {least} or more{hint}")
    return number


def real(value: Any, name: str) -> float:
    """`value` as it is, if Python's own number, or else as a `float`; `TypeError` if it is no number."""
    if isinstance(value, str) or _is_bool(value) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}={_shown(value)}, expected a number")
    return value if type(value) is int else float(value)


def reals(values: Any, name: str) -> tuple[float, ...]:
    """One number, or several, as `float`s; `TypeError` if one of them is no number."""
    return tuple(float(real(value, name)) for value in _listed(values))


def tensor_of(values: Any, name: str) -> Tensor:
    """`values` as a tensor: one as it is; lists, arrays and Series turned into one; `TypeError` for anything else."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.tensor(values.to_numpy() if hasattr(values, "to_numpy") else values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={_shown(values)}, expected a tensor of numbers") from None


def whole_numbers(values: SupportsIndex | Integers, name: str) -> tuple[int, ...]:
    """One number, or several, as `int`s.

    Raises:
        TypeError: if one of them is no whole number, as in a mask.
    """
    listed = _listed(values)
    hint = "" if not listed or not _is_bool(listed[0]) else " for each place: mask.nonzero() makes them of a mask"
    return tuple(whole(value, name, hint=hint) for value in listed)


def row_numbers(rows: Choice, count: int) -> list[int]:
    """The numbers, from 0, of the rows that `rows` chooses of `count`; negative ones count from the end.

    Raises:
        TypeError: for what is neither a whole number, a slice, numbers in a row nor a mask.
        ValueError: for a mask that has not one entry for each row.
        IndexError: for a number that no row has.
    """
    if isinstance(rows, slice):
        return list(range(count)[rows])
    listed = _listed(rows)
    if listed and not is_one(rows) and all(map(_is_bool, listed)):
        if len(listed) != count:
            raise ValueError(f"a mask of {len(listed)} for {count} rows: expected one entry for each row")
        return [number for number, wanted in enumerate(listed) if wanted]
    numbers = [whole(row, "row", hint=", or a mask with a bool for each row") for row in listed]
    if outside := [number for number in numbers if not -count <= number < count]:
        raise IndexError(f"no row {outside[0]}, there are {count}, from 0")
    return [number % count for number in numbers]


def seeded(seed: SupportsIndex) -> torch.Generator:
    """A generator of random numbers on the CPU that starts from `seed`."""
    return torch.Generator().manual_seed(whole(seed, "seed"))


def is_one(value: Any) -> bool:
    """Whether `value` stands for itself: no list, tensor, array or the like."""
    return isinstance(value, str) or getattr(value, "ndim", None) == 0 or not isinstance(value, Iterable)


def _listed(values: Any) -> list[Any]:
    if is_one(values):
        return [values]
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}" if len(repr(value)) > 60 else repr(value)
