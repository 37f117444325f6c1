"""House style of the figures: colours that colour-blind readers can tell apart, units on every axis, no `show()`."""

import textwrap
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:  # what results are drawn on and tabled as: matplotlib and pandas are imported only where they are used
    Axes = Figure = DataFrame = Any

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
"""From the Okabe-Ito palette."""
CYCLE = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
"""Colours of several lines, in this order, on new axes; axes that are given keep their own."""
_LINES, _WIDTH = 40, 160
"""Of a screen."""


def axes(ax: Axes | None = None, *, width: float = 6.0, height: float = 3.6) -> Axes:
    """The given axes, or new ones, in the house style."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(width, height), layout="constrained")[1]
        ax.set_prop_cycle(color=CYCLE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def look(number: int) -> tuple[str, str]:
    """Colour and marker of the `number`-th of many series: a colour comes back with another marker."""
    return CYCLE[number % len(CYCLE)], "osD^vPX"[number // len(CYCLE) % 7]


def interval(
    ax: Axes,
    place: float,
    estimate: Any,
    *,
    color: str = BLUE,
    marker: str = "o",
    horizontal: bool = False,
    label: str | None = None,
) -> None:
    """Draw a number's `value` as a point and `low` to `high` as a bar (no bar where they are NaN).

    Args:
        place: where on the x-axis; where on the y-axis, if the bar is horizontal.
        estimate: anything with `value`, `low` and `high`, such as an `Estimate`.
    """
    reach = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
    x, y = (estimate.value, place) if horizontal else (place, estimate.value)
    bars = (None, reach) if horizontal else (reach, None)
    ax.errorbar(x, y, *bars, fmt=marker, color=color, markersize=5, label=label)


def curve(ax: Axes, x: Sequence[float], estimates: Sequence[Any], name: str, color: str | None = None) -> None:
    """Draw numbers over `x`, each with `value`, `low` and `high`, as a line in a band, named in the legend.

    Args:
        color: by default the next one of the axes.
    """
    low, value, high = zip(*((e.low, e.value, e.high) for e in estimates), strict=True)
    (line,) = ax.plot(x, value, color=color, marker="o", markersize=4, label=entry(ax, name))
    interval = None if "95 % interval" in ax.get_legend_handles_labels()[1] else "95 % interval"
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0, label=interval)


def entry(ax: Axes, *names: str | None) -> str:
    """The names that there are as an entry of the legend, with a number where the axes have that entry already."""
    text, taken = plain(", ".join(filter(None, names))), ax.get_legend_handles_labels()[1]
    numbered = (text if n == 1 else f"{text} ({n})" for n in count(1))
    return next(name for name in numbered if name not in taken)


def plain(text: str) -> str:
    """A text that matplotlib draws as it is: dollars make no formula, and a first "_" hides no entry of a legend."""
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")


def level(ax: Axes, value: float, label: str | None = None, *, horizontal: bool = True) -> None:
    """A dashed grey line at a value to compare with: the unedited model's, or that of chance; one entry for all."""
    label = None if label in ax.get_legend_handles_labels()[1] else label
    line = ax.axhline if horizontal else ax.axvline
    line(value, color=GREY, linestyle="--", linewidth=1, label=label)


def logarithmic(ax: Axes, name: Literal["x", "y"]) -> None:
    """Make the axis of what is drawn logarithmic; of few decades 1, 2 and 5 of each are named."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis = ax.xaxis if name == "x" else ax.yaxis
    ax.set(**{f"{name}scale": "log"})
    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def colour_bar(ax: Axes, image: Any, label: str) -> Axes:
    """The axes of a new colour bar for what is drawn on `ax`."""
    return figure_of(ax).colorbar(image, ax=ax, label=label).ax


def figure_of(ax: Axes) -> Figure:
    """The figure that `ax` is part of."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def short(label: object) -> str:
    """A label that fits into a figure: its middle is left out where it is long."""
    text = str(label)
    return text if len(text) <= 44 else f"{text[:32]} … {text[-9:]}"


def screenful(lines: Sequence[str]) -> str:
    """Lines that fit a screen: long ones go on in the next line, and the last says how many more there are."""
    rows = [row for line in lines for row in textwrap.wrap(line, _WIDTH, subsequent_indent="    ") or [""]]
    if len(rows) > _LINES:
        rows = [*rows[: _LINES - 1], f"… and {len(rows) - _LINES + 1} more lines: to_frame() has it all"]
    return "\n".join(rows)


def table(data: Any, index: str | None = None) -> DataFrame:
    """Rows as dictionaries, or columns by name, as a data frame.

    Args:
        index: a column that names the rows; or what their numbers are called, where there is no such column.
    """
    import pandas as pd

    frame = pd.DataFrame(data)
    if index is None:
        return frame
    return frame.set_index(index) if index in frame else frame.rename_axis(index)


def write(ax: Axes, path: Path) -> None:
    """Write the figure that `ax` is part of to a file, and close it."""
    import matplotlib.pyplot as plt

    figure_of(ax).savefig(path, dpi=150)
    plt.close(figure_of(ax))
