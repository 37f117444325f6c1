"""The card of a saved intervention: what it is, where it acts, how it was trained, and code that runs as it stands."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reftlens.bridge.source import in_words
from reftlens.editing.reft import ReFT
from reftlens.files import templates
from reftlens.interventions import GATES, KINDS
from reftlens.storage.record import kinds_in
from reftlens.training.result import FitResult

CARD_FILE, PICTURE_FILE = "README.md", "loss.png"
_HEAD = "---\nlibrary_name: reftlens\n"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(
    reft: ReFT,
    record: Mapping[str, Any],
    model: Any,
    *,
    run: FitResult | None = None,
    scores: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> str:
    """A README for the folder, or for the repository `repo_id`; `record` is what `reft.json` holds."""
    of_model, modules = record["model"], [module for _, module in reft.items()]
    base, source = of_model["name"], of_model["source"]
    on_hub = "hub" in source or "wheel" in source or (_HUB_ID.fullmatch(base) is not None and not Path(base).exists())
    own = sorted({k for spec in record["interventions"] for k in kinds_in(spec)} - KINDS.keys() - GATES.keys())
    encoding = run.encoding if run is not None else {}
    return _HEAD + templates(Path(__file__).parent, html=False).get_template("model_card.md.j2").render(
        repo_id=repo_id,
        base=base if on_hub else Path(base).name,
        on_hub=on_hub,
        loadable=source.get("wheel") or source.get("hub") or (base if on_hub else "path/to/the/model"),
        weights_from=in_words(source),
        bos=of_model["bos"],
        rows=zip(record["sites"], reft.items(), strict=True),
        parameters=reft.parameter_count(model),
        versions=record["versions"],
        arguments="" if not own else ", kinds={" + ", ".join(f'"{kind}": {kind}' for kind in own) + "}",
        own=own,
        variables=sorted({name for m in modules for name in m.variables}),
        chat=encoding.get("chat", of_model["chat_template"] is not None and not encoding),
        system=encoding.get("system"),
        encoding=encoding,
        run=run,
        settings={} if run is None else {k: v for k, v in asdict(run.config).items() if v is not None},
        scores=scores or {},
    )


def is_card(path: Path) -> bool:
    """Whether the file is a card that this module wrote: one of the user's own is not written over."""
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(_HEAD)


def picture(run: FitResult) -> bytes:
    """The loss curve as PNG, drawn without a window."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(6.0, 3.6), layout="constrained"), BytesIO()
    run.plot(figure.subplots())
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
