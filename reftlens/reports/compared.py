"""Sections of a comparison: what each edit is, what it writes, what it does at each strength."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from reftlens import figures
from reftlens.analysis.strength import DoseResponse, dose_response
from reftlens.figures import Axes
from reftlens.generation.result import Generation
from reftlens.generation.site_edits import check_writes
from reftlens.generation.writing import generate
from reftlens.reports.parts import Section, few_measured, figure, how_written, or_reason, stacked, tabled
from reftlens.reports.saved import Compared, SavedEdit
from reftlens.scoring.statistics import mean_of
from reftlens.text.batch import Batch
from reftlens.widgets.grid import marked_text, prompt_text


def summary_section(compared: Compared) -> Section:
    """What each edit is, site by site, and what speaks against a comparison."""
    edits = figures.table([_described(compared, edit) for edit in compared.edits])
    sites = figures.table(list(_sites(compared)))
    captions = {"edits": "The edits", "sites": "What acts where; – stands for nothing"}
    count = len(compared.edits)
    lead = [f"{count} saved edits of {compared.model.cfg.model_name}: {', '.join(compared.names)}."]
    return tabled(
        "summary", "Summary", {"edits": edits, "sites": sites}, lead=lead, care=list(_care(compared)), captions=captions
    )


def _described(compared: Compared, edit: SavedEdit) -> dict[str, Any]:
    modules, run = [module for _, module in edit.reft.items()], edit.run
    trained = {} if run is None else {"steps": len(run.losses), "first loss": run.losses[0], "last loss": run.loss}
    return {
        "edit": edit.name,
        "kinds": ", ".join(sorted({module.label for module in modules})),
        "ranks": ", ".join(map(str, sorted({module.rank for module in modules}))),
        "sites": len(edit.reft),
        "parameters": edit.reft.parameter_count(compared.model).stored,
        **({"steps": None, "first loss": None, "last loss": None} | trained),
        "seconds of training": None if run is None else run.seconds,
    }


def _sites(compared: Compared) -> Iterator[dict[str, Any]]:
    """One row for each hook and choice of positions: what each edit has there."""
    spots = {place.spot: place.site for edit in compared.edits for place in edit.places}
    for spot, site in spots.items():
        there = {edit.name: edit.at(spot) for edit in compared.edits}
        what = {
            name: "–" if place is None else f"{place.intervention.label}({place.intervention.extra_repr()})"
            for name, place in there.items()
        }
        yield {"hook": site.vectors, "positions": str(site.positions), **what}


def _care(compared: Compared) -> Iterator[str]:
    """What speaks against reading a difference as one between the edits."""
    runs = {edit.name: edit.run for edit in compared.edits}
    if missing := [name for name, run in runs.items() if run is None]:
        yield f"There is no record of training in the folder of {', '.join(missing)}: save(…, run=…) keeps it."
    known = {name: run for name, run in runs.items() if run is not None}
    if len({run.data_hash for run in known.values()}) > 1:
        yield "They were trained on different data: what differs may be of the data."
    if len({run.objective for run in known.values()}) > 1:
        yield "They were trained by different objectives: their losses are not on one scale."
    if len(known) > 1:
        yield "This is one training of each: what differs may be of the seed (train more with fit_many)."
    for a, b in combinations(compared.edits, 2):
        if a.weights == b.weights:
            yield f"{a.name} and {b.name} have the same weights."
    if compared.data is not None:
        fingerprint_here = compared.data.fingerprint
        if seen := [name for name, run in known.items() if run.data_hash == fingerprint_here]:
            yield f"Effects were measured on the data that {', '.join(seen)} was trained on, not on unseen prompts."
        yield from few_measured(len(compared.data))


def texts_section(compared: Compared) -> Section:
    """What each edit makes of the same prompts at strength 1, beside the unedited model."""
    title, prompts = "Texts side by side", compared.prompts
    if prompts is None:
        return Section("texts", title, absent="There are no prompts to write from: pass prompts=.")
    written = or_reason("Texts", partial(_written, compared))
    if isinstance(written, str):
        return Section("texts", title, absent=written)
    asked = [prompt_text(example.prompt) for example in prompts.examples]
    values = {
        **how_written(compared.decoding),
        "columns": [("prompt", False), *((name, False) for name in written)],
        "rows": [{"prompt": text, "texts": [_cell(g, i) for g in written.values()]} for i, text in enumerate(asked)],
    }
    records = [{"prompt": asked[i], "edit": n, "text": t} for n, g in written.items() for i, t in enumerate(g.texts)]
    return Section("texts", title, values, {"texts": figures.table(records)}, template="compared_texts")


def _written(compared: Compared) -> dict[str, Generation]:
    """By edit; the unedited model writes once."""
    for edit in compared.edits:
        check_writes(edit.reft)
    assert compared.prompts is not None
    write = partial(generate, prompts=compared.prompts, decoding=compared.decoding, progress=compared.progress)
    first, *others = compared.edits
    unedited, edited = write(first.reft, compared.model, variant=[0.0, 1.0])
    written = {"unedited": unedited, first.name: edited}
    return written | {edit.name: write(edit.reft, compared.model) for edit in others}


def _cell(generation: Generation, row: int) -> Markup:
    return marked_text(generation, row) or Markup("<em>(nothing)</em>")


def strength_section(compared: Compared) -> Section:
    """Effect and cost over strength, and the effect over its cost."""
    title, data = "Strength", compared.data
    if data is None:
        return Section(
            "strength", title, absent="No data were given to measure effects on: pass data=, or --data FILE."
        )
    doses, frames, absent = _dosed(compared, data)
    if not doses:
        return Section("strength", title, absent=" ".join(absent))
    frame = stacked(frames, ["edit"])
    effect = "Log-probability gained (nats per target token), by strength."
    cost = "KL(edited ‖ unedited) (nats per token), by strength."
    frontier = "What is gained against what it costs: each point a strength. At the same cost, higher is better."
    drawn = [
        figure(lambda: _curves(doses, "effect"), "compared-effect", effect),
        figure(lambda: _curves(doses, "kl"), "compared-kl", cost),
        figure(lambda: _frontier(doses), "compared-frontier", frontier),
    ]
    captions = {"strength": "Means by strength, with 95 % intervals over examples"}
    lead = [f"Measured on {len(data)} example{'s' * (len(data) != 1)}.", *_differences(doses)]
    return tabled(
        "strength",
        title,
        {"strength": frame},
        lead=lead,
        care=absent,
        drawn=drawn,
        captions=captions,
        folded=["strength"],
    )


def _dosed(compared: Compared, data: Batch) -> tuple[dict[str, DoseResponse], list[figures.DataFrame], list[str]]:
    """By edit, and their means; and why there are none of some."""
    doses, frames, absent = dict[str, DoseResponse](), list[figures.DataFrame](), list[str]()
    for edit in compared.edits:
        ask = partial(dose_response, edit.reft, compared.model, data, strengths=compared.strengths)
        found = or_reason(f"Effects of {edit.name}", lambda ask=ask: _tabled(ask(progress=compared.progress)))
        if isinstance(found, str):
            absent.append(found)
        else:
            doses[edit.name] = found[0]
            frames.append(found[1].assign(edit=edit.name))
    return doses, frames, absent


def _tabled(dose: DoseResponse) -> tuple[DoseResponse, figures.DataFrame]:
    """With its means, which are not there where nothing is finite."""
    return dose, dose.by_strength().reset_index()


def _differences(doses: dict[str, DoseResponse]) -> list[str]:
    """At strength 1, example by example, beside the first."""
    at = {name: dose.measure("effect")[dose.strengths.index(1.0)] for name, dose in doses.items()}
    (first, base), *others = at.items()
    return [_difference(f"the effect of {name} less that of {first}", effect - base) for name, effect in others]


def _difference(name: str, by_example: Float[Tensor, " example"]) -> str:
    known = by_example[~by_example.isnan()]
    if not len(known):
        return f"At strength 1 {name} is not known: no example has a finite effect of both."
    few = (
        "" if len(known) == len(by_example) else f" ({len(known)} of {len(by_example)}; of the others it is not finite)"
    )
    return f"At strength 1 {name} is {mean_of(known)} nats per target token, example by example{few}."


def _curves(doses: dict[str, DoseResponse], measure: str) -> Axes:
    ax = figures.axes()
    for name, dose in doses.items():
        figures.curve(ax, dose.strengths, dose.estimate(measure), name)
    figures.level(ax, 0.0)
    unit = next(iter(doses.values())).unit(measure)
    ax.set(xlabel="strength (0: unedited, 1: as trained)", ylabel=unit)
    ax.legend(frameon=False)
    return ax


def _frontier(doses: dict[str, DoseResponse]) -> Axes:
    ax = figures.axes()
    for name, dose in doses.items():
        gain, cost = ([e.value for e in dose.estimate(measure)] for measure in ("effect", "kl"))
        ax.plot(cost, gain, marker="o", markersize=4, label=figures.entry(ax, name))
    first = next(iter(doses.values()))
    ax.set(xlabel=first.unit("kl"), ylabel=first.unit("effect"))
    ax.legend(frameon=False)
    return ax
