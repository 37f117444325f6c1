"""`report`: everything about an intervention in one HTML file that needs no network."""

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import SupportsFloat

from tqdm.auto import tqdm

from reftlens.analysis.causal.control_table import Controls
from reftlens.bridge.protocol import Bridge, check_deterministic
from reftlens.editing.reft import ReFT, check_types
from reftlens.files import destination
from reftlens.generation.decoding import Decoding
from reftlens.numbers import reals
from reftlens.reports.directions import directions_section, geometry_section
from reftlens.reports.layout import page_of
from reftlens.reports.provenance import controls_section, provenance_section, training_section
from reftlens.reports.sections import stream_section, strength_section, texts_section, where_section
from reftlens.reports.subject import Subject
from reftlens.reports.summary import summary_section, title_of, warnings_of
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt, Template
from reftlens.training.result import FitResult
from reftlens.widgets.grid import STRENGTHS

_PROMPTS = 4


def report(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    path: str | Path,
    *,
    run: FitResult | None = None,
    prompts: Sequence[Prompt] | Batch | None = None,
    controls: Controls | None = None,
    heldout: Batch | None = None,
    unrelated: Batch | None = None,
    score: Callable[[str], float] | None = None,
    strengths: SupportsFloat | Sequence[SupportsFloat] = STRENGTHS,
    decoding: Decoding = Decoding(),
    seed: int = 0,
    progress: bool = True,
    now: datetime | None = None,
) -> Path:
    """Write one HTML file about `reft` to `path` and return the path.

    What it does at several strengths, with a slider; what it costs; which layers and positions carry it; a text,
    token by token; its directions, beside the chance level; controls, training and provenance; and warnings in plain
    words. A section that does not apply says why. Where the same is remembered (`forget`), the same call writes the
    same bytes, but for the time in the element `stamp`.

    Args:
        data: what `reft` was trained on; of an edit that was not, prompts with completions to measure it on.
        run: the record of the training.
        prompts: texts are written from them. They are put as the prompts of that data are on which effects are
            measured (chat template, system message), unless they are a `Batch`; None takes its first four.
        controls: what `controls(…)` found, for an intervention that exchanges.
        heldout: effects are measured on it instead of `data`.
        unrelated: prompts with completions that the edit should leave alone.
        score: what a text is worth, such as the share of emoji in it.
        strengths: of the slider and the curves; 0 and 1 are added.
        decoding: how texts are written.
        seed: of resampling tests and random directions.
        now: the time that the file says it was made at.

    Raises:
        ValueError: before anything is computed, for a path that cannot be written to; then as `dose_response`.
        TypeError: for a record, or controls, that are none.
    """
    check_types(reft, model, data)
    for name, value, kind, maker in (("run", run, FitResult, "fit"), ("controls", controls, Controls, "controls")):
        if not isinstance(value, kind | None):
            raise TypeError(f"{name} is a {type(value).__name__}, expected the {kind.__name__} that {maker}(…) gave")
    check_deterministic(model)
    path = destination(path)
    subject = Subject(
        reft=reft,
        model=model,
        trained_on=data,
        heldout=heldout,
        prompts=encoded(prompts, model, data if heldout is None else heldout),
        strengths=tuple(sorted({0.0, 1.0, *reals(strengths, "strengths")})),
        run=run,
        controls=controls,
        unrelated=unrelated,
        score=score,
        decoding=decoding,
        seed=seed,
        progress=progress,
    )
    page = _page(subject, datetime.now(timezone.utc) if now is None else now)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def encoded(prompts: Sequence[Prompt] | Batch | None, model: Bridge, data: Batch) -> Batch | None:
    """What texts are written from, put as the prompts of the data are; None where there is nothing to write from."""
    if isinstance(prompts, Batch):
        return prompts
    texts = [e.prompt for e in data.examples[:_PROMPTS] if e.prompt] if prompts is None else prompts
    if model.tokenizer is None or not len(texts):
        return None
    template = data.template or Template()
    return encode_prompts(
        model,
        texts,
        chat=template.chat,
        system=template.system,
        template_arguments=template.arguments,
        continue_last=template.continue_last and prompts is None,
    )


def _page(subject: Subject, stamp: datetime) -> str:
    makers = (texts_section, strength_section, where_section, stream_section, geometry_section)
    makers = (*makers, directions_section, controls_section, training_section, provenance_section)
    sections = [make(subject) for make in tqdm(makers, desc="report", unit="section", disable=not subject.progress)]
    warnings = [*warnings_of(subject, subject.results), *(w for s in sections for w in s.warnings)]
    return page_of(title_of(subject), [summary_section(subject, warnings), *sections], stamp)
