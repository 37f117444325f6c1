"""`comparison`: saved edits side by side in one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import SupportsFloat

from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_deterministic, check_model
from reftlens.files import destination
from reftlens.generation.decoding import Decoding
from reftlens.numbers import reals
from reftlens.reports.compared import strength_section, summary_section, texts_section
from reftlens.reports.compared_records import provenance_section, subspaces_section, training_section
from reftlens.reports.layout import page_of
from reftlens.reports.page import encoded
from reftlens.reports.saved import Compared, check_one_model, named, opened
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt
from reftlens.text.vocabulary import check_vocabulary

_STRENGTHS = (0.0, 0.5, 1.0, 1.5)


def comparison(
    folders: Mapping[str, str | Path] | Sequence[str | Path],
    model: Bridge,
    path: str | Path,
    *,
    data: Batch | None = None,
    prompts: Sequence[Prompt] | Batch | None = None,
    strengths: SupportsFloat | Sequence[SupportsFloat] = _STRENGTHS,
    decoding: Decoding = Decoding(),
    progress: bool = True,
    now: datetime | None = None,
) -> Path:
    """Write one HTML file that compares edits of one model, as `save` wrote them, to `path` and return the path.

    What acts where; the same prompts continued by each, beside the unedited model; effect and KL over strength, and
    the paired difference at strength 1; overlap and principal angles of the subspaces at hooks that two of them edit,
    beside chance; losses on one pair of axes, settings that differ; and warnings in plain words. What cannot be
    compared says why.

    Args:
        folders: two or more, by name, `{"rank 1": "runs/a", "rank 4": "runs/b"}`; a list is named by its folders.
        model: the model that all of them were trained on.
        data: prompts with completions to measure effects on, best those that none was trained on; None measures none.
        prompts: texts are written from them, put as those of `data` are, unless they are a `Batch`; None takes the
            first four of `data`.
        strengths: of the curves; 0 and 1 are added.
        decoding: how texts are written.
        now: the time that the file says it was made at.

    Raises:
        FileNotFoundError: for a folder that holds no edit.
        StoreMismatch: where they were trained on different models, or on another than this one.
        ValueError: for fewer than two folders, a name that a column of the tables has, or a path that cannot be written
            to.
    """
    by_name = named(folders)
    check_one_model(by_name)
    check_model(model)
    check_deterministic(model)
    if data is not None:
        check_vocabulary(model, data)
    path = destination(path)
    compared = Compared(
        edits=opened(by_name, model),
        model=model,
        data=data,
        prompts=_prompts(prompts, model, data),
        strengths=tuple(sorted({0.0, 1.0, *reals(strengths, "strengths")})),
        decoding=decoding,
        progress=progress,
    )
    makers = (summary_section, texts_section, strength_section, subspaces_section, training_section, provenance_section)
    sections = [make(compared) for make in tqdm(makers, desc="comparison", unit="section", disable=not progress)]
    page = page_of(" beside ".join(compared.names), sections, datetime.now(timezone.utc) if now is None else now)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _prompts(prompts: Sequence[Prompt] | Batch | None, model: Bridge, data: Batch | None) -> Batch | None:
    if data is not None:
        return encoded(prompts, model, data)
    if prompts is None or isinstance(prompts, Batch):
        return prompts
    return encode_prompts(model, prompts)
