"""The card of a saved intervention: what it is, where it acts, how it was trained, and code that runs as it stands."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from reftlens.bridge.source import in_words
from reftlens.editing.reft import ReFT
from reftlens.files import templates, write_atomically
from reftlens.interventions import GATES, KINDS
from reftlens.storage.record import kinds_in
from reftlens.training.config import FitConfig
from reftlens.training.result import FitResult

CARD_FILE, LOSS_FILE, PICTURE_FILE = "README.md", "loss.png", "picture.png"
_HEAD = "---\nlibrary_name: reftlens\n"
_STREAM = re.compile(r"blocks\.\d+\.hook_(in|out|resid_pre|resid_post)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(
    reft: ReFT,
    record: Mapping[str, Any],
    model: Any,
    *,
    run: FitResult | None = None,
    scores: Mapping[str, Any] | None = None,
    shown: str | None = None,
    repo_id: str | None = None,
) -> str:
    """A README for the folder, or for the repository `repo_id`; `record` is what `reft.json` holds.

    `shown` is what the picture beside it shows, in words.
    """
    of_model, modules = record["model"], [module for _, module in reft.items()]
    base, source = of_model["name"], of_model["source"]
    on_hub = "hub" in source or "wheel" in source or (_HUB_ID.fullmatch(base) is not None and not Path(base).exists())
    own = sorted({k for spec in record["interventions"] for k in kinds_in(spec)} - KINDS.keys() - GATES.keys())
    encoding = run.encoding if run is not None else {}
    loadable = base if on_hub else "path/to/the/model"
    return _HEAD + templates(Path(__file__).parent, html=False).get_template("model_card.md.j2").render(
        repo_id=repo_id,
        base=base if on_hub else Path(base).name,
        on_hub=on_hub,
        loadable=source.get("wheel") or source.get("hub") or loadable,
        plain=None if "wheel" in source or not _of_stream(record) else source.get("hub") or loadable,
        weights_from=in_words(source),
        bos=of_model["bos"],
        rows=reft.items(),
        parameters=reft.parameter_count(model),
        versions=record["versions"],
        arguments="" if not own else ", kinds={" + ", ".join(f'"{kind}": {kind}' for kind in own) + "}",
        own=own,
        variables=sorted({name for m in modules for name in m.variables}),
        chat=of_model["chat_template"] is not None if reft.chat is None else reft.chat,
        system=encoding.get("system"),
        encoding=encoding,
        run=run,
        settings={} if run is None else _settings(run.config),
        scores=scores or {},
        metrics=_metrics(run, scores or {}),
        shown=shown,
    )


def _settings(config: FitConfig) -> dict[str, Any]:
    """The settings that had a say: `steps` overrides `epochs`."""
    told = {name: value for name, value in asdict(config).items() if value is not None}
    return {name: value for name, value in told.items() if name != "epochs" or config.steps is None}


def _of_stream(record: Mapping[str, Any]) -> bool:
    """Whether all is edited where a block is entered or left: what `attach` edits on a plain transformers model."""
    return all(_STREAM.fullmatch(site["hook"]) and site["heads"] is None for site in record["sites"])


def _metrics(run: FitResult | None, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the hub lists of a model: the scores that are numbers, and the best loss on validation data."""
    told = {name: float(value) for name, value in scores.items() if isinstance(value, Real) and isfinite(value)}
    metrics = [{"type": "score", "name": name, "value": value} for name, value in told.items()]
    if run is not None and run.validation:
        metrics.append({"type": "loss", "name": "validation loss", "value": min(loss for _, loss in run.validation)})
    return metrics


def write_card(
    folder: Path,
    reft: ReFT,
    record: Mapping[str, Any],
    model: Any,
    *,
    run: FitResult | None,
    scores: Mapping[str, Any] | None,
    result: Any,
    repo_id: str | None = None,
) -> None:
    """The card, and the picture of a result if there is one; a README.md of the user's own is not written over."""
    card, ours = folder / CARD_FILE, False
    if card.is_file():
        ours = card.read_text(encoding="utf-8", errors="replace").startswith(_HEAD)
        if not ours:
            return
    shown = None
    if result is not None:
        shown = re.sub(r"(?<!^)(?=[A-Z])", " ", type(result).__name__).capitalize()  # DoseResponse: Dose response
        write_atomically(folder / PICTURE_FILE, png_of(result))
    elif ours:  # the picture of what was here before goes
        (folder / PICTURE_FILE).unlink(missing_ok=True)
    text = model_card(reft, record, model, run=run, scores=scores, shown=shown, repo_id=repo_id)
    write_atomically(card, text.encode())


def check_picture(result: Any) -> None:
    """Raise `TypeError` for what cannot draw itself."""
    if result is not None and (isinstance(result, type) or not callable(getattr(result, "plot", None))):
        raise TypeError(f"picture={result!r}, expected a result that has .plot(), such as that of dose_response(…)")


def png_of(result: Any) -> bytes:
    """What `result.plot` draws, such as the loss curve of a run, as PNG; without a window."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(6.0, 3.6), layout="constrained"), BytesIO()
    result.plot(figure.subplots())
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
