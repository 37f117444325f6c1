"""What the edit does: texts at several strengths, the strength curve, and the places that carry the effect."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from reftlens.analysis.places.effect_tables import CellEffects
from reftlens.analysis.places.measuring import edited_positions, effects
from reftlens.analysis.strength.dose_results import MEASURES, DoseResponse
from reftlens.analysis.strength.doses import dose_response
from reftlens.analysis.strength.texts import Written, perplexity, repetition
from reftlens.reports.markup import Section, escape, figure, paragraph, table
from reftlens.reports.subject import Measured, Subject
from reftlens.widgets.grid import Grid, prompt_text, strength_grid

_BESIDE = (0.0, 0.5, 1.0, 2.0)
_MOST_POSITIONS = 16


def measured(subject: Subject) -> Measured:
    """The strength curve, and texts at every strength, on which fluency is then measured."""
    s = subject
    dose = dose_response(
        s.reft, s.model, s.data, s.strengths, unrelated=s.unrelated, seed=s.seed, progress=s.progress
    )  # fmt: skip
    kinds = {module.kind for _, module in s.reft.items() if module.variables}
    if kinds:
        return Measured(dose, None, f"{', '.join(sorted(kinds))} copies from a source, and writing has none to copy.")
    if not s.prompts:
        return Measured(dose, None, "No prompts were given to write from.")
    grid = strength_grid(
        s.reft, s.model, s.prompts, s.strengths, chat=s.chat, max_new_tokens=s.writing["max_new_tokens"],
        temperature=s.writing["temperature"], no_repeat_ngram=s.writing["no_repeat_ngram"], seed=s.seed,
        progress=s.progress,
    )  # fmt: skip
    return Measured(replace(dose, text=_written(subject, grid)), grid, "")


def _written(subject: Subject, grid: Grid) -> Written:
    """Fluency of the very texts that the report shows."""
    tables = [
        [perplexity(subject.model, made.batch()) for made in grid.generations],
        [torch.tensor([repetition(ids) for ids in made.ids], dtype=torch.float64) for made in grid.generations],
    ]
    score = subject.score
    if score is not None:
        tables.append([torch.tensor([float(score(t)) for t in made.texts]).double() for made in grid.generations])
    stacked = [torch.stack(rows) for rows in tables]
    texts = tuple(made.texts for made in grid.generations)
    return Written(grid.prompts, texts, stacked[0], stacked[1], stacked[2] if score else None, grid.computation)


def texts_section(subject: Subject, found: Measured) -> Section:
    """The slider, then some strengths side by side."""
    if found.grid is None:
        return Section("texts", "Texts", paragraph(f"There are no texts here. {found.no_grid}", "absent"))
    how = "greedily" if subject.writing["temperature"] == 0 else f"by sampling with seed {subject.seed}"
    said = (
        f"Each text was written {how}, up to {subject.writing['max_new_tokens']} tokens. Marked tokens were edited: "
        "first those of the prompt, as the model reads it. Strength 1 is the edit as trained, 0 the unedited model."
    )
    html = paragraph(said) + found.grid.html() + _beside(found.grid)
    return Section("texts", "Texts at several strengths", html, {"texts": found.grid.to_frame()})


def _beside(grid: Grid) -> str:
    """A table of prompts by strengths."""
    strengths = [s for s in _BESIDE if s in grid.strengths] or list(grid.strengths[:4])
    head = "".join(f'<th scope="col">{s:g}{" (unedited)" if s == 0 else ""}</th>' for s in strengths)
    rows = ""
    for row, prompt in enumerate(grid.prompts):
        cells = "".join(f"<td>{grid.cell(row, s)}</td>" for s in strengths)
        asked = f'{escape(prompt_text(prompt))}<div class="printed">{grid.read(row)}</div>'
        rows += f'<tr><th scope="row">{asked}</th>{cells}</tr>'
    caption = "The same prompts side by side, by strength"
    return (
        f'<div class="scroll reftlens-grid" role="region" tabindex="0" aria-label="{caption}"><table class="texts">'
        f'<caption>{caption}</caption><thead><tr><th scope="col">prompt</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def strength_section(subject: Subject, found: Measured) -> Section:
    """Effect, cost and fluency over strength, and the frontier of effect and cost."""
    dose = found.dose
    count = len(subject.data)
    said = paragraph(
        f"Measured on {count} example{'s' * (count != 1)}{_whose(subject)}. {_sentence(str(dose.slopes))} "
        f"{_sentence(_half(dose))}"
    )
    frames = {"strength": dose.by_strength(), "frontier": dose.frontier()}
    shown = [name for name in dose.measured if name not in ("accuracy", "edit_size")]
    figures = [
        figure(lambda n=name: dose.plot(measure=n), f"strength-{name}", f"{_capital(MEASURES[name])}, by strength.")
        for name in shown
    ]
    caption = "What is gained against what it costs: each point a strength; orange where no other strength beats it."
    figures.insert(2, figure(dose.plot_frontier, "frontier", caption, frames["frontier"]))
    numbers = table(frames["strength"], "Means by strength, with 95 % intervals over examples")
    html = f'{said}<div class="figures">{"".join(figures)}</div><details><summary>Numbers</summary>{numbers}</details>'
    return Section("strength", "Strength", html, frames)


def _half(dose: DoseResponse) -> str:
    try:
        return str(dose.ec50())
    except ValueError as error:
        return str(error)


def _whose(subject: Subject) -> str:
    if subject.heldout is not None:
        return " that were held out"
    trained = subject.run is not None and subject.run.data_hash == subject.data.fingerprint
    return " that it was trained on" if trained else ""


def where_section(subject: Subject) -> Section:
    """The effect of each position, of each site, and of each cell of the two."""
    s, html, frames = subject, "", {}
    every = edited_positions(s.reft, s.data)
    shown = dict(list(every.items())[-_MOST_POSITIONS:])
    if len(shown) < len(every):
        html += paragraph(f"{len(every)} positions are edited; the last {len(shown)} of them are shown.")
    found = {"position": effects(s.reft, s.model, s.data, positions=shown, seed=s.seed, progress=s.progress)}
    if len(s.reft) > 1:
        found["site"] = effects(s.reft, s.model, s.data, of="sites", seed=s.seed, progress=s.progress)
    for name, parts in found.items():
        frames[f"each {name}"] = parts.to_frame()
        caption = f"What the edit does at each {name} alone, and with that {name} left out; dashed: the whole edit."
        html += figure(parts.plot, f"each-{name}", caption, frames[f"each {name}"])
    cells = effects(s.reft, s.model, s.data, of="cells", positions=shown, seed=s.seed, progress=s.progress)
    frames["map"] = cells.to_frame()
    if isinstance(cells, CellEffects) and cells.mean.numel() > 1:
        caption = (
            "Log-probability gained by each layer and position alone; a dot: differs from 0 (sign flips, Holm, 5 %)."
        )
        html += figure(cells.plot, "map", caption, frames["map"])
    said = "Positions count from the end of the prompt: -1 is its last token."
    if len(s.reft) == 1:
        said += " One site is edited, so there is no comparison of sites."
    return Section("where", "Where", paragraph(said) + f'<div class="figures">{html}</div>', frames)


def _sentence(text: str) -> str:
    return _capital(text) + "." * (not text.endswith("."))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def joined(sections: Sequence[Section]) -> str:
    """The sections as HTML."""
    return "".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title"><h2 id="{s.name}-title">{escape(s.title)}</h2>'
        f"{s.html}</section>"
        for s in sections
    )
