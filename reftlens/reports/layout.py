"""The page that sections stand in: one HTML file that loads nothing."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from reftlens.analysis.places import stream_results
from reftlens.files import templates
from reftlens.reports.parts import Section, number, records
from reftlens.widgets.grid import SCRIPT, STYLE


def page_of(title: str, sections: Sequence[Section], stamp: datetime) -> str:
    """The sections under a title, the first as the summary; made at `stamp`, as the page says."""
    return (
        page_templates()
        .get_template("page.html.j2")
        .render(
            title=title,
            stamp=stamp.isoformat(timespec="seconds"),
            sections=sections,
            numbers={name: records(frame) for section in sections for name, frame in section.frames.items()},
            style=Markup(STYLE + stream_results.STYLE + _file("report.css")),
            script=Markup(SCRIPT + stream_results.SCRIPT + _file("report.js")),
        )
    )


def page_templates() -> Environment:
    """The page and its sections."""
    environment = templates(Path(__file__).parent)
    environment.filters["number"] = number
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    return environment


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
