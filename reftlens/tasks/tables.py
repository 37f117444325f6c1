"""The columns of a table that pairs are read from, checked value by value."""

from collections.abc import Mapping, Sequence
from typing import Any

from reftlens.text.loading import Source, records


def check_parts(
    sources: Mapping[str, str], own: Mapping[str, str], prompts: Sequence[str], texts: Sequence[str]
) -> None:
    """Raise where columns are named in a way that cannot be meant."""
    if not sources:
        raise ValueError("source={}, expected a column, or one for each variable")
    if unknown := [name for name in own if name not in sources]:
        raise ValueError(f"source_answer names {unknown[0]!r}, and the sources are of: {', '.join(sources)}")
    if twice := [name for name in sources.values() if name == prompts[0]] or [n for n in prompts if n in texts]:
        raise ValueError(f"column {twice[0]!r} is named for two parts of a pair: base, source and answers differ")


def checked_columns(table: Source, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """All columns of a table by name, those of prompts and answers checked row by row."""
    rows = list(records(table))
    if not rows:
        raise ValueError("no rows, expected pairs: one row for each base and source")
    for place, record in rows:
        if not isinstance(record, Mapping):
            raise ValueError(f"{place} is no record with columns {', '.join(prompts)}: {str(record)[:60]!r}")
        if absent := [name for name in (*prompts, *texts) if name not in record]:
            there = ", ".join(map(str, record))
            raise ValueError(f"{place} has no column {absent[0]!r}, it has: {there}: name the one that is meant")
        for name in (*prompts, *texts):
            _check_value(record[name], place, name, text=name in texts)
    return {name: tuple(record.get(name) for _, record in rows) for name in rows[0][1]}


def _check_value(value: Any, place: str, column: str, *, text: bool) -> None:
    if isinstance(value, str) and value:
        return
    if value is None or not isinstance(value, str | Sequence) or not len(value):
        empty = "empty" if isinstance(value, str | Sequence) else "missing" if _is_missing(value) else ""
        wanted = "expected text" if text else "expected text, or a list of chat messages"
        advice = "drop or fill such rows" if empty else f"make it text, ' ' + table[{column!r}].astype(str)"
        raise ValueError(f"{place}, column {column!r} is {empty or repr(value)}, {wanted}: {advice}")
    if text:
        raise ValueError(f"{place}, column {column!r} is {str(value)[:60]}, expected text")


def _is_missing(value: Any) -> bool:
    """Whether a table has nothing there: None, NaN, NaT or pandas' NA, none of which is equal to itself."""
    return value is None or str(value) == "<NA>" or value != value
