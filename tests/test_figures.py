"""The house style of the figures."""

import math
from dataclasses import dataclass
from itertools import pairwise

import matplotlib as mpl
import pytest
from matplotlib.colors import same_color

from reftlens import figures

mpl.use("Agg")


@dataclass
class Number:
    value: float
    low: float
    high: float


@pytest.mark.parametrize("horizontal", [False, True])
def test_an_interval_is_a_point_with_a_bar_from_low_to_high(horizontal):
    ax = figures.axes()
    figures.interval(ax, 3, Number(0.5, 0.25, 0.75), horizontal=horizontal, label="mean")
    (drawn,) = ax.containers
    point, _, (bar,) = drawn.lines
    ends = [(3, 0.25), (3, 0.75)]
    assert bar.get_segments()[0].tolist() == (
        [list(end[::-1]) for end in ends] if horizontal else list(map(list, ends))
    )
    assert point.get_xydata().tolist() == ([[0.5, 3]] if horizontal else [[3, 0.5]])
    assert ax.get_legend_handles_labels()[1] == ["mean"]


def test_a_curve_is_a_line_in_the_band_of_its_intervals_in_the_next_colour_of_the_axes():
    ax = figures.axes()
    numbers = [Number(1.0, 0.5, 2.0), Number(3.0, 2.5, 3.0)]
    for color in (None, "red", None):
        figures.curve(ax, [0, 1], numbers, "mean", color)
    assert [line.get_color() for line in ax.lines] == [figures.BLUE, "red", figures.ORANGE]
    assert ax.get_legend_handles_labels()[1] == ["mean", "95 % interval", "mean (2)", "mean (3)"]
    for line, band in zip(ax.lines, ax.collections, strict=True):
        assert line.get_ydata().tolist() == [1.0, 3.0] and same_color(band.get_facecolor()[0][:3], line.get_color())
        assert {tuple(p) for p in band.get_paths()[0].vertices.tolist()} == {(0, 0.5), (0, 2), (1, 2.5), (1, 3)}


def test_what_is_compared_with_has_one_entry_however_often_it_is_drawn():
    ax = figures.axes()
    for value in (0.1, 0.1, 0.2):
        figures.level(ax, value, "chance")
    figures.level(ax, 0.3)
    assert ax.get_legend_handles_labels()[1] == ["chance"] and len(ax.lines) == 4
    assert figures.entry(ax, "chance") == "chance (2)" and figures.entry(ax, None, "loss") == "loss"
    assert figures.entry(ax, "mine", "loss") == "mine, loss"


def test_an_estimate_without_an_interval_has_a_bar_of_no_length():
    ax = figures.axes()
    figures.interval(ax, 0, Number(0.5, math.nan, math.nan))
    assert ax.containers[0].lines[2][0].get_segments()[0].tolist() == [[0, 0.5], [0, 0.5]]


@pytest.mark.parametrize("low", [0.1, 1e-6])
def test_numbers_on_a_logarithmic_axis_are_there_and_do_not_overlap(low):
    ax = figures.axes()
    ax.plot([low, 0.8], [1.0, 2.0])
    figures.logarithmic(ax, "x")
    figures.figure_of(ax).draw_without_rendering()
    left, right = ax.get_xlim()
    ticks = ax.xaxis.get_major_ticks() + ax.xaxis.get_minor_ticks()
    labels = [tick.label1 for tick in ticks if left <= tick.get_loc() <= right and tick.label1.get_text()]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) >= 3
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_names_are_drawn_as_they_are():
    """A dollar makes no formula of them, and a "_" hides none from the legend."""
    from reftlens import figures
    from reftlens.reports.charts import chart

    def plot():
        ax = figures.axes()
        for name in ("_a", "$b$"):
            ax.plot([0, 1], label=figures.entry(ax, name))
        ax.legend()
        return ax

    drawing = chart(plot, "names").drawing
    assert "_a</text>" in drawing and ">$b$</text>" in drawing
