"""Figures as inline SVG: in the page's colours, with a text for screen readers, and the same every time."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from markupsafe import Markup

from reftlens import figures

_INK = "#010203"
"""Stands for the page's text colour; a black that a figure asks for on a coloured ground stays black."""
_VARIABLES = {
    _INK: "currentColor",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
    "#009e73": "var(--green)",
    "#8a8a8a": "var(--grey)",
    "#dddddd": "var(--grid)",
}
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "reftlens",  # ids are the same every time
    "font.size": 10.0,
    "axes.unicode_minus": True,
}


class Chart(NamedTuple):
    """What stands inside an `<svg>` element, and its size."""

    drawing: Markup
    width: str
    """In points, as is the height."""
    height: str

    @property
    def pixels(self) -> int:
        """The width at which text has its size on paper."""
        return round(float(self.width) * 4 / 3)


def chart(plot: Callable[[], figures.Axes], name: str) -> Chart:
    """What `plot` draws on axes of its own, to stand in a page; matplotlib has escaped its texts.

    Args:
        name: begins every id in the figure; no two figures of a page may share it.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the font
        figure = figures.figure_of(plot())
        _colour_black_lines(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return _inline(out.getvalue(), name)


def _colour_black_lines(figure: figures.Figure) -> None:
    """Black lines take the text colour, but for those on a heat map, whose colours stay as they are."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D

    for axes in figure.axes:
        for line in axes.findobj(Line2D) if not axes.images else ():
            if isinstance(line, Line2D) and to_hex(line.get_color()) == "#000000":
                line.set_color(_INK)


def _inline(svg: str, name: str) -> Chart:
    """A stand-alone SVG file as a part of a page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'style="[^"]*"', lambda m: _styled(m[0]), svg)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-').replace("xlink:href", "href")
    head = re.search(r'<svg[^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', svg)
    assert head is not None
    body = svg[head.end() :].strip().removesuffix("</svg>")
    return Chart(Markup(re.sub(r"\s*\n\s*", " ", body).strip()), head[1], head[2])


def _styled(style: str) -> str:
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, variable)
    style = re.sub(r" ?font-family: [^;]*;?", "", style)
    return re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", style)
