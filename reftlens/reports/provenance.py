"""Where it comes from: controls, training, model, data, settings and versions."""

from dataclasses import asdict
from typing import Any

from reftlens import figures
from reftlens.bridge.fingerprint import fingerprint
from reftlens.bridge.source import in_words
from reftlens.editing.reft import ReFT
from reftlens.reports.parts import Section, figure, table
from reftlens.reports.subject import Subject
from reftlens.training.result import library_versions


def controls_section(subject: Subject) -> Section:
    """The control battery, or why there is none."""
    controls = subject.controls
    if controls is None:
        warnings = ("No controls were given for a causal claim.",) if subject.exchanges else ()
        return Section("controls", "Controls", absent=_why_no_controls(subject), warnings=warnings)
    frame = controls.to_frame()
    caption = "Interchange accuracy of the trained subspace beside everything it has to beat, on held-out pairs."
    values = {"warnings": controls.warnings, "figure": figure(controls.plot, "controls", caption, frame)}
    warnings = tuple(f"Controls: {w}." for w in controls.warnings)
    return Section("controls", "Controls", values, {"controls": frame}, warnings=warnings)


def _why_no_controls(subject: Subject) -> str:
    if subject.exchanges:
        return (
            "None were given: run controls(…) on held-out pairs and pass controls=. Without them, nothing here says "
            "that the subspace carries the variable."
        )
    kinds = ", ".join(sorted({module.label for _, module in subject.reft.items()}))
    return (
        "The control battery is for interventions that exchange a subspace with that of a source; "
        f"{kinds} copies from none. In its place: effects on held-out data, and the chance levels beside geometry and "
        "tokens."
    )


def training_section(subject: Subject) -> Section:
    """The loss curve and the settings."""
    run = subject.run
    if run is None:
        absent = "No record of the training was given: pass run=, what fit returned or load_run read."
        return Section("training", "Training", absent=absent)
    frame = run.to_frame()
    caption = "Training loss at each optimizer step" + (", and validation loss." if run.validation else ".")
    curve = figure(run.plot, "training", caption, frame)
    values = {"run": run, "figure": curve, "settings": asdict(run.config)}
    return Section("training", "Training", values, {"training": frame})


def provenance_section(subject: Subject) -> Section:
    """Model, intervention, data, settings of this report, versions."""
    frame = figures.table([_site_record(subject.reft, i) for i in range(len(subject.reft))])
    facts = _of_model(subject) | _of_data(subject) | _of_report(subject) | _versions(subject)
    values = {"sites": table(frame, "The interventions, site by site"), "facts": facts}
    return Section("provenance", "Provenance", values, {"sites": frame})


def _of_model(subject: Subject) -> dict[str, Any]:
    model = fingerprint(subject.model)
    return {
        "model": model.name,
        "weights read from": in_words(model.source),
        "BOS in front of text": model.bos or "none",
        "parameters of the model": subject.reft.parameter_count(subject.model).model,
        "compatibility mode of TransformerLens": "on" if model.compatibility_mode else "off",
        "vocabulary (SHA-256)": (model.tokenizer or "no tokenizer")[:16],
        "chat template (SHA-256)": (model.chat_template or "none")[:16],
    }


def _of_data(subject: Subject) -> dict[str, Any]:
    facts = {
        "trained on": f"{len(subject.trained_on)} examples",
        "data (SHA-256)": subject.trained_on.fingerprint,
        "data of the training record": "no record" if subject.run is None else subject.run.data_hash,
    }
    if subject.heldout is not None:
        facts["held out"] = f"{len(subject.heldout)} examples"
        facts["held-out data (SHA-256)"] = subject.heldout.fingerprint
    return facts


def _of_report(subject: Subject) -> dict[str, Any]:
    texts = {f"of the texts: {name}": str(value) for name, value in asdict(subject.decoding).items()}
    template = None if subject.prompts is None else subject.prompts.template
    if template is not None:
        texts |= {f"of the prompts: {name}": str(value) for name, value in asdict(template).items()}
    return texts | {"seed of resampling": str(subject.seed), "computation": subject.results.dose.computation}


def _versions(subject: Subject) -> dict[str, Any]:
    """Of the libraries now, and at the time of the training where they differ."""
    before = {} if subject.run is None else subject.run.versions
    return {
        f"version of {name}": now + (f" (training: {before[name]})" if before.get(name, now) != now else "")
        for name, now in library_versions().items()
    }


def _site_record(reft: ReFT, i: int) -> dict[str, Any]:
    site, module, first = reft.sites[i], reft[i], reft.which.index(reft.which[i])
    return {
        "site": i,
        "hook": site.hook,
        "positions": str(site.positions),
        "kind": module.label,
        "rank": module.rank,
        "width": module.d,
        "parameters": module.stored_parameters,
        "weights_of": "its own" if first == i else f"site {first}",
    }
