"""Pieces of HTML. Whatever comes from data, a model or a tokenizer passes through `escape` here."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from reftlens.reports.charts import chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["Section", "escape", "figure", "listed", "number", "pairs", "paragraph", "script_json", "table"]


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report."""

    name: str
    """Of the anchor."""
    title: str
    html: str
    frames: Mapping[str, "DataFrame"] = field(default_factory=dict)
    """The numbers behind it, by name; the page holds them in full."""
    warnings: tuple[str, ...] = ()


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def listed(lines: Sequence[str], kind: str) -> str:
    """A list of plain texts."""
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


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


def table(frame: "DataFrame", caption: str, *, columns: Sequence[str] | None = None) -> str:
    """A data frame, the index left out unless it has a name; wide ones scroll by themselves."""
    shown = frame.reset_index() if frame.index.name else frame
    shown = shown if columns is None else shown[list(columns)]
    numeric = {c: shown[c].dtype.kind in "if" for c in shown.columns}
    head = "".join(_head(str(c), numeric[c]) for c in shown.columns)
    body = "".join(f"<tr>{''.join(_cell(v) for v in row)}</tr>" for row in shown.itertuples(index=False, name=None))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table><caption>'
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _head(name: str, numeric: bool) -> str:
    return f'<th scope="col"{" class=number" if numeric else ""}>{escape(name.replace("_", " "))}</th>'


def _cell(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<td class="number">{number(value)}</td>' if numeric else f"<td>{escape(str(value))}</td>"


def pairs(rows: Mapping[str, Any]) -> str:
    """Names and values."""
    cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(number(v))}</dd></div>" for k, v in rows.items())
    return f"<dl>{''.join(cells)}</dl>"


def figure(
    plot: "Callable[[], Axes]", name: str, caption: str, frame: "DataFrame | None" = None, *, wide: bool = False
) -> str:
    """A chart with its caption, which also is its text for screen readers; its numbers fold out below it."""
    numbers = "" if frame is None else f"<details><summary>Numbers</summary>{table(frame, caption)}</details>"
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{chart(plot, caption, name)}<figcaption>{escape(caption)}</figcaption>{numbers}</figure>"


def script_json(frames: Mapping[str, "DataFrame"]) -> str:
    """Data frames as JSON that can stand inside a script element; what is no number is null."""
    told = {}
    for name, frame in frames.items():
        whole = frame.reset_index() if frame.index.name else frame
        told[name] = [
            {str(c): _plain(v) for c, v in zip(whole.columns, row, strict=True)}
            for row in whole.itertuples(index=False, name=None)
        ]
    text = json.dumps(told, ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
