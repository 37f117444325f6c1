"""The house style of the figures."""

import math
from dataclasses import dataclass

import matplotlib as mpl
import pytest

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


def test_an_estimate_without_an_interval_has_a_bar_of_no_length():
    ax = figures.axes()
    figures.interval(ax, 0, Number(0.5, math.nan, math.nan))
    assert ax.containers[0].lines[2][0].get_segments()[0].tolist() == [[0, 0.5], [0, 0.5]]
