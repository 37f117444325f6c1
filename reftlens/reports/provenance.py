"""Where it comes from: controls, training, model, data, settings and versions."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from reftlens.bridge.fingerprint import fingerprint
from reftlens.reports.markup import Section, figure, listed, pairs, paragraph, table
from reftlens.reports.subject import Measured, Subject
from reftlens.training.result import library_versions

if TYPE_CHECKING:
    from pandas import DataFrame


def controls_section(subject: Subject) -> Section:
    """The control battery that was given, or why there is none."""
    found = subject.controls
    if found is None:
        why = (
            "None were given: run controls(…) on held-out pairs and pass controls=. Without them, nothing here says "
            "that the subspace carries the variable."
            if subject.exchanges
            else "The control battery is for interventions that exchange a subspace with that of a source; "
            f"{', '.join(sorted({m.kind for _, m in subject.reft.items()}))} copies from none. In its place: effects "
            "on held-out data, and the chance levels beside geometry and tokens."
        )
        warned = ("No controls were given for a causal claim.",) if subject.exchanges else ()
        return Section("controls", "Controls", paragraph(why, "absent"), warnings=warned)
    frame = found.to_frame()
    caption = "Interchange accuracy of the trained subspace beside everything it has to beat, on held-out pairs."
    said = listed(found.warnings, "warnings") if found.warnings else paragraph("The claim survives these controls.")
    html = f'{said}<div class="figures">{figure(found.plot, "controls", caption, frame)}</div>'
    return Section("controls", "Controls", html, {"controls": frame}, tuple(f"Controls: {w}." for w in found.warnings))


def training_section(subject: Subject) -> Section:
    """The loss curve and the settings."""
    run = subject.run
    if run is None:
        why = "No record of the training was given: pass run=, what fit returned or load_run read."
        return Section("training", "Training", paragraph(why, "absent"))
    frame = run.to_frame()
    said = f"{len(run.losses)} steps in {run.seconds:.0f} s on {run.device}: loss {run.losses[0]:.3f} → {run.loss:.3f}."
    said += " It was stopped early." if run.stopped_early else ""
    caption = "Training loss at each optimizer step" + (", and validation loss." if run.validation else ".")
    figures = figure(run.plot, "training", caption, frame)
    html = paragraph(said) + f'<div class="figures">{figures}</div>' + pairs(asdict(run.config))
    return Section("training", "Training", html, {"training": frame})


def provenance_section(subject: Subject, found: Measured) -> Section:
    """Model, intervention, data, settings of this report, versions."""
    model, run = fingerprint(subject.model), subject.run
    told = {
        "model": model.name,
        "parameters of the model": subject.reft.parameter_count(subject.model).model,
        "compatibility mode of TransformerLens": "on" if model.compatibility_mode else "off",
        "vocabulary (SHA-256)": (model.tokenizer or "no tokenizer")[:16],
        "chat template (SHA-256)": (model.chat_template or "none")[:16],
        "trained on": f"{len(subject.trained_on)} examples",
        "data (SHA-256)": subject.trained_on.fingerprint,
        "data of the training record": "no record" if run is None else run.data_hash,
    }
    if subject.heldout is not None:
        told["held out"] = f"{len(subject.heldout)} examples"
        told["held-out data (SHA-256)"] = subject.heldout.fingerprint
    told |= {f"of this report: {name}": str(value) for name, value in subject.writing.items()}
    told |= {"of this report: seed": str(subject.seed), "chat template applied to prompts": str(subject.chat)}
    told["computation"] = found.dose.computation
    now = library_versions()
    then = {} if run is None else run.versions
    told |= {f"version of {k}": v + (f" (training: {then[k]})" if then.get(k, v) != v else "") for k, v in now.items()}
    frame = sites_frame(subject)
    html = table(frame, "The interventions, site by site") + pairs(told)
    return Section("provenance", "Provenance", html, {"sites": frame})


def sites_frame(subject: Subject) -> "DataFrame":
    """One row per site."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"site": i, "hook": site.hook, "positions": str(site.positions), "kind": module.kind, "rank": module.rank,
             "width": module.d, "parameters": module.stored_parameters,
             "weights_of": "its own" if subject.reft.which.index(subject.reft.which[i]) == i
             else f"site {subject.reft.which.index(subject.reft.which[i])}"}
            for i, (site, module) in enumerate(subject.reft.items())
        ]
    )  # fmt: skip
