"""Sections of a comparison that are read from what was saved: subspaces, training, settings, provenance."""

import json
from dataclasses import asdict
from typing import Any

from reftlens import figures
from reftlens.analysis.subspaces.geometry import Overlap, columns_of, overlap
from reftlens.bridge.fingerprint import fingerprint
from reftlens.bridge.source import in_words
from reftlens.figures import Axes, DataFrame
from reftlens.reports.parts import Section, figure, or_reason, stacked, tabled
from reftlens.reports.saved import Compared
from reftlens.training.result import FitResult, library_versions

_ANGLES = (
    "Overlap is the mean squared cosine of the principal angles: 1 where one span contains the other, and the chance "
    "level on average for random ones (grey: two standard deviations). It compares spans: not signs, nor how strongly "
    "each direction is used."
)


def subspaces_section(compared: Compared) -> Section:
    """Overlap and principal angles of each two sites that edit the same vectors."""
    title, overlaps, reasons, rows = "Subspaces", list[tuple[str, Overlap]](), list[str](), list[DataFrame]()
    for a, here, b, there in compared.pairs():
        columns = {a.name: here.intervention, b.name: there.intervention}
        name = f"{a.name} | {b.name}, {here.site.vectors}" if len(compared.edits) > 2 else here.site.vectors
        found = or_reason(f"Overlap at {name}", lambda c=columns: overlap({n: columns_of(m) for n, m in c.items()}))
        if isinstance(found, str):
            reasons.append(found)
            continue
        overlaps.append((name, found))
        positions = (str(place.site.positions) for place in (here, there))
        where = " | ".join(dict.fromkeys(positions))
        rows.append(found.to_frame().assign(hook=here.site.vectors, positions=where))
    if not overlaps:
        absent = " ".join(reasons) or "No two of them edit the same vectors: one hook, and there the same heads."
        return Section("subspaces", title, absent=absent)
    frame = stacked(rows, ["hook", "positions", "a", "b"])
    caption = "Overlap of the two edits at each hook that both have."
    drawn = [figure(lambda: _overlaps(overlaps), "compared-overlap", caption)]
    captions = {"overlap": "Overlap and principal angles (degrees); z in standard deviations of random subspaces"}
    return tabled("subspaces", title, {"overlap": frame}, lead=[_ANGLES, *reasons], drawn=drawn, captions=captions)


def _overlaps(overlaps: list[tuple[str, Overlap]]) -> Axes:
    ax = figures.axes(height=1.4 + 0.35 * len(overlaps))
    for y, (_, found) in enumerate(overlaps):
        chance = found.chance(0, 1)
        low, high = max(0.0, chance.mean - 2 * chance.spread), min(1.0, chance.mean + 2 * chance.spread)
        ax.plot([low, high], [y, y], color=figures.GREY, linewidth=6, alpha=0.5, solid_capstyle="butt")
        ax.plot(found.overlap[0, 1].item(), y, "o", color=figures.BLUE)
    ax.set_yticks(range(len(overlaps)), [figures.plain(figures.short(name)) for name, _ in overlaps])
    ax.set(xlabel="overlap (grey: chance)", xlim=(-0.03, 1.03))
    ax.invert_yaxis()
    return ax


def training_section(compared: Compared) -> Section:
    """Losses on one pair of axes, and the settings, those that differ first."""
    runs = {edit.name: edit.run for edit in compared.edits if edit.run is not None}
    if not runs:
        absent = "No record of a training is in these folders: save(…, run=…) keeps it."
        return Section("training", "Training", absent=absent)
    losses = stacked([run.to_frame().reset_index().assign(edit=name) for name, run in runs.items()], ["edit"])
    caption = "Training loss at each optimizer step; dashed: validation loss."
    drawn = [figure(lambda: _losses(runs), "compared-losses", caption)]
    settings = {name: _settings(run) for name, run in runs.items()}
    frames, captions = {"training": losses}, {}
    for key, caption, alike in (("differing", "Settings that differ", False), ("alike", "Settings alike", True)):
        keys = dict.fromkeys(key for each in settings.values() for key in each)
        chosen = [k for k in keys if (len({each.get(k) for each in settings.values()}) == 1) == alike]
        if chosen:
            frames[key] = figures.table([{"setting": k, **{n: s.get(k) for n, s in settings.items()}} for k in chosen])
            captions[key] = caption
    return tabled("training", "Training", frames, drawn=drawn, captions=captions, folded=["alike"])


def _losses(runs: dict[str, FitResult]) -> Axes:
    ax = figures.axes()
    for name, run in runs.items():
        run.plot(ax, label=name)
    return ax


def _settings(run: FitResult) -> dict[str, str]:
    """What was asked of a training, as text."""
    told = {"objective": run.objective, "data": run.data_hash[:16], **asdict(run.config)}
    told |= {f"encoding: {name}": value for name, value in run.encoding.items()}
    return {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in told.items()}


def provenance_section(compared: Compared) -> Section:
    """Model, folders and versions."""
    model = fingerprint(compared.model)
    here: dict[str, Any] = {"model": model.name, "weights read from": in_words(model.source)}
    here |= {f"folder of {edit.name}": edit.folder.name for edit in compared.edits}
    here |= {f"weights of {edit.name} (SHA-256)": edit.weights[:16] for edit in compared.edits}
    if compared.data is not None:
        here |= {
            "effects measured on": f"{len(compared.data)} examples",
            "data (SHA-256)": compared.data.fingerprint[:16],
        }
    here |= {f"version of {name}": version for name, version in library_versions().items()}
    frame = figures.table([{"what": name, "value": value} for name, value in here.items()])
    return tabled("provenance", "Provenance", {"provenance": frame}, captions={"provenance": "Where it comes from"})
