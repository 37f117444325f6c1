"""What the templates are given: sections with their figures and tables, in plain values."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from reftlens.errors import NotFinite
from reftlens.figures import Axes, DataFrame
from reftlens.generation.decoding import Decoding
from reftlens.reports.charts import Chart, chart

T = TypeVar("T")
_FEW = 50
_P_VALUES = " (p: by sign flips; holm: corrected for the number of tests, by Holm's rule)"


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report."""

    name: str
    """Of the anchor, and of the template that writes `values`, where that has no other."""
    title: str
    values: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, DataFrame] = field(default_factory=dict)
    """The numbers behind it, by name; the page holds them in full."""
    absent: str = ""
    """Why the section does not apply, which then stands in its place."""
    warnings: tuple[str, ...] = ()
    template: str = ""
    """Of another name than the section's, or ""."""


class Table(NamedTuple):
    """Rows of plain values under a caption."""

    caption: str
    columns: Sequence[tuple[str, bool]]
    """Name, and whether it holds numbers."""
    rows: Sequence[Sequence[Any]]


class Figure(NamedTuple):
    """A chart with its caption, which also is its text for screen readers; its numbers fold out below it."""

    chart: Chart
    caption: str
    numbers: Table | None
    wide: bool


def or_reason(what: str, make: Callable[[], T]) -> T | str:
    """What `make` gives; where it raises `ValueError` or `NotFinite`, a sentence that says why it does not apply."""
    try:
        return make()
    except (ValueError, NotFinite) as error:
        return f"{what}: not shown, because {error}."


def how_written(decoding: Decoding) -> dict[str, Any]:
    """How texts were written, for a sentence about them."""
    greedy = decoding.temperature == 0
    how = "greedily" if greedy else f"by sampling with seed {decoding.seed}"
    return {"how": how, "max_new_tokens": decoding.max_new_tokens}


def few_measured(count: int) -> Iterator[str]:
    """A warning, where so few examples were measured that their intervals are rough."""
    if count < _FEW:
        yield f"Only {count} example{'s were' if count != 1 else ' was'} measured: the intervals are rough."


def figure(
    plot: Callable[[], Axes], name: str, caption: str, frame: DataFrame | None = None, *, wide: bool = False
) -> Figure:
    """A figure of what `plot` draws; `name` tells its ids from those of the page's other figures."""
    return Figure(chart(plot, name), caption, None if frame is None else table(frame, caption), wide)


def table(frame: DataFrame, caption: str) -> Table:
    """A data frame as a table; its caption explains p-values."""
    whole = _whole(frame)
    columns = [(str(c), whole[c].dtype.kind in "if") for c in whole.columns]
    note = _P_VALUES if any(name.endswith("_holm") for name, _ in columns) else ""
    return Table(caption + note, columns, whole.to_dict("split")["data"])


def tabled(
    name: str,
    title: str,
    frames: dict[str, DataFrame],
    *,
    lead: Sequence[str] = (),
    care: Sequence[str] = (),
    drawn: Sequence[Figure] = (),
    captions: dict[str, str],
    folded: Sequence[str] = (),
) -> Section:
    """A section of sentences, warnings, figures and the frames that have a caption, as tables; some of them fold out.

    Args:
        care: warnings.
        folded: names of the frames that fold out.
    """
    tables = {key: table(frames[key], caption) for key, caption in captions.items()}
    values = {"lead": lead, "care": care, "figures": drawn}
    values["tables"] = [each for key, each in tables.items() if key not in folded]
    values["folded"] = [tables[key] for key in folded if key in tables]
    return Section(name, title, values, frames, template="compared")


def stacked(frames: Sequence[DataFrame], first: Sequence[str]) -> DataFrame:
    """The rows of all, with these columns in front."""
    import pandas as pd

    frame = pd.concat(list(frames), ignore_index=True)
    return frame.reindex(columns=[*first, *(column for column in frame.columns if column not in first)])


def records(frame: DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame for JSON: what is no finite number is null."""
    rows = _whole(frame).to_dict("records")
    return [{str(n): None if isinstance(v, float) and not math.isfinite(v) else v for n, v in r.items()} for r in rows]


def _whole(frame: DataFrame) -> DataFrame:
    """With its index as a column, if that has a name."""
    return frame.reset_index() if frame.index.name else frame


def number(value: Any) -> str:
    """A value as a reader wants it: numbers to four digits."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    return f"{value:.4g}"
