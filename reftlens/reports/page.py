"""`report`: everything about an intervention in one HTML file that needs no network."""

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import SupportsFloat

from tqdm.auto import tqdm

from reftlens.analysis.causal.control_table import Controls
from reftlens.bridge.protocol import Bridge, check_deterministic
from reftlens.editing.reft import ReFT
from reftlens.reports.directions import directions_section, geometry_section
from reftlens.reports.markup import Section, escape, script_json
from reftlens.reports.provenance import controls_section, provenance_section, training_section
from reftlens.reports.sections import joined, measured, strength_section, texts_section, where_section
from reftlens.reports.subject import Subject
from reftlens.reports.summary import summary, title_of, warnings_of
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt
from reftlens.training.result import FitResult
from reftlens.widgets.grid import SCRIPT, STRENGTHS, STYLE

_PROMPTS = 4
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What a browser may load: nothing that is not in the file."""


def report(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    path: str | Path,
    *,
    run: FitResult | None = None,
    prompts: Sequence[Prompt] | None = None,
    controls: Controls | None = None,
    heldout: Batch | None = None,
    unrelated: Batch | None = None,
    score: Callable[[str], float] | None = None,
    strengths: Sequence[SupportsFloat] = STRENGTHS,
    chat: bool = False,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    no_repeat_ngram: int = 0,
    seed: int = 0,
    progress: bool = True,
    now: datetime | None = None,
) -> Path:
    """Write one HTML file about `reft` to `path` and return the path.

    What it does at several strengths, with a slider; what it costs; which layers and positions carry it; its
    directions, beside the chance level; controls, training and provenance; and warnings in plain words. A section that
    does not apply says why. The same call writes the same bytes, but for the time in the element `stamp`.

    Args:
        data: what `reft` was trained on.
        run: the record of the training.
        prompts: texts are written from them; None takes the first four of the data that effects are measured on.
        controls: what `controls(…)` found, for an intervention that exchanges.
        heldout: effects are measured on it instead of `data`.
        unrelated: prompts with completions that the edit should leave alone.
        score: what a text is worth, such as the share of emoji in it.
        strengths: of the slider and the curves; 0 and 1 are added.
        chat: whether the prompts are put into the chat template.
        now: the time that the file says it was made at.
    """
    check_deterministic(model)
    scored = data if heldout is None else heldout
    asked = tuple(e.prompt for e in scored.examples[:_PROMPTS] if e.prompt) if prompts is None else tuple(prompts)
    subject = Subject(
        reft, model, data, heldout, asked if model.tokenizer is not None else (),
        tuple(sorted({0.0, 1.0, *(float(s) for s in strengths)})), run, controls, unrelated, score, chat,
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "no_repeat_ngram": no_repeat_ngram},
        seed, progress,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = datetime.now(timezone.utc) if now is None else now
    path.write_text(_page(subject, made), encoding="utf-8", newline="\n")
    return path


def _page(subject: Subject, made: datetime) -> str:
    found = measured(subject)
    makers: list[Callable[[], Section]] = [
        lambda: texts_section(subject, found), lambda: strength_section(subject, found),
        lambda: where_section(subject), lambda: geometry_section(subject), lambda: directions_section(subject),
        lambda: controls_section(subject), lambda: training_section(subject),
        lambda: provenance_section(subject, found),
    ]  # fmt: skip
    sections = [make() for make in tqdm(makers, desc="report", unit="section", disable=not subject.progress)]
    warnings = [*warnings_of(subject, found), *(w for s in sections for w in s.warnings)]
    first = Section("summary", "Summary", summary(subject, found, warnings))
    stamp = made.isoformat(timespec="seconds")
    frames = {name: frame for section in sections for name, frame in section.frames.items()}
    return (
        f'{_head(title_of(subject))}<body><a class="skip" href="#summary">Skip to the summary</a>'
        f"{_contents([first, *sections])}<header><h1>{escape(title_of(subject))}</h1><p>A report of reftlens, made at "
        f'<time id="stamp" datetime="{stamp}">{stamp}</time></p></header>\n<main><section id="summary" '
        f'aria-label="Summary">{first.html}</section>\n{joined(sections)}'
        f'<p><button id="download" type="button">Download the numbers (JSON)</button></p></main>\n'
        f'<script type="application/json" id="numbers">{script_json(frames)}</script>\n'
        f"<script>{SCRIPT}{_file('report.js')}</script></body></html>\n"
    )


def _head(title: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}{_file('report.css')}</style></head>\n"
    )


def _contents(sections: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
