"""What the edit does: texts at several strengths, the strength curve, and the places that carry the effect."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from reftlens.analysis.places.effect_tables import CellEffects
from reftlens.analysis.places.streams import stream_effects
from reftlens.analysis.strength.doses import MEASURES, DoseResponse
from reftlens.reports.parts import Section, figure, how_written, or_reason, table
from reftlens.reports.subject import Subject
from reftlens.widgets.grid import Grid, prompt_text

_BESIDE, _MOST_BESIDE = (0.0, 0.5, 1.0, 2.0), 5
_STREAM = "Change of the residual stream at each layer and token, at strength 1; a dot: edited there."
_MAP = "Log-probability gained by each layer and position alone; a dot: differs from 0 (sign flips, Holm, 5 %)."


def texts_section(subject: Subject) -> Section:
    """The slider, then some strengths side by side."""
    results, grid = subject.results, subject.results.grid
    if grid is None:
        return Section("texts", "Texts", absent=f"There are no texts here. {results.no_grid}")
    few = len(grid.strengths) <= _MOST_BESIDE
    strengths = [s for s in grid.strengths if few or s in _BESIDE]
    values = {
        **how_written(subject.decoding),
        "slider": Markup(grid.html()),
        "strengths": [(f"{s:g}{' (unedited)' * (s == 0)}", False) for s in strengths],
        "rows": [_row(grid, row, strengths) for row in range(len(grid.prompts))],
    }
    return Section("texts", "Texts at several strengths", values, {"texts": grid.to_frame()})


def _row(grid: Grid, row: int, strengths: Sequence[float]) -> dict[str, Any]:
    """A prompt and what was written from it; the grid escapes these texts itself, and marks their edited tokens."""
    return {
        "prompt": prompt_text(grid.prompts[row]),
        "tokens": Markup(grid.read(row)),
        "texts": [Markup(grid.cell(row, strength)) for strength in strengths],
    }


def strength_section(subject: Subject) -> Section:
    """Effect, cost and fluency over strength, and the frontier of effect and cost."""
    dose = subject.results.dose
    frames = {"strength": dose.by_strength(), "frontier": dose.frontier()}
    figures = [
        figure(lambda n=name: dose.plot(measure=n), f"strength-{name}", f"{_capital(MEASURES[name])}, by strength.")
        for name in dose.measured
        if name not in ("accuracy", "edit_size")
    ]
    caption = "What is gained against what it costs: each point a strength; orange where no other strength beats it."
    figures.insert(2, figure(dose.plot_frontier, "frontier", caption, frames["frontier"]))
    values = {
        "count": len(subject.data),
        "origin": _origin(subject),
        "slopes": _sentence(str(dose.slopes)),
        "half": " ".join(map(_sentence, [_half(dose), *map(str, dose.gates)])),
        "figures": figures,
        "numbers": table(frames["strength"], "Means by strength, with 95 % intervals over examples"),
    }
    return Section("strength", "Strength", values, frames)


def _half(dose: DoseResponse) -> str:
    try:
        return str(dose.ec50())
    except ValueError as error:
        return str(error)


def _origin(subject: Subject) -> str:
    if subject.heldout is not None:
        return " that were held out"
    trained = subject.run is not None and subject.run.data_hash == subject.data.fingerprint
    return " that it was trained on" if trained else ""


def where_section(subject: Subject) -> Section:
    """The effect of each position, of each site, and of each cell of the two."""
    frames, figures, parts = {}, [], dict(subject.sweep.effects)
    cells = parts.pop("cells")
    for name, part in ((name.removesuffix("s"), part) for name, part in parts.items()):
        frames[f"each {name}"] = part.to_frame()
        caption = f"What the edit does at each {name} alone, and with that {name} left out; dashed: the whole edit."
        figures.append(figure(part.plot, f"each-{name}", caption, frames[f"each {name}"]))
    frames["map"] = cells.to_frame()
    if isinstance(cells, CellEffects) and cells.mean.numel() > 1:
        figures.append(figure(cells.plot, "map", _MAP, frames["map"]))
    counts = {"sites": len(subject.reft), "edited": len(subject.positions), "shown": len(subject.shown_positions)}
    values = counts | {"figures": figures}
    return Section("where", "Where", values, frames)


def stream_section(subject: Subject) -> Section:
    """One text, token by token: what the edit changes at each layer, and in what is predicted next."""
    grid, title = subject.results.grid, "Token by token"
    text = subject.data[[0]] if grid is None else grid.at(1.0).batch()
    found = or_reason("What is changed at each token", partial(stream_effects, subject.reft, subject.model, text))
    if isinstance(found, str):
        return Section("stream", title, absent=found)
    frame = found.to_frame()
    frames = {"stream": frame.query("change > 0 or kl > 0")}
    drawn = figure(found.plot, "stream", _STREAM, wide=True)
    values = {"written": grid is not None, "view": Markup(found.html()), "figure": drawn}
    return Section("stream", title, values, frames)


def _sentence(text: str) -> str:
    return _capital(text) + "." * (not text.endswith("."))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
