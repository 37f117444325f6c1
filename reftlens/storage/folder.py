"""Save and load interventions: `reft.json` says what they are, `weights.safetensors` holds the numbers.

Only kinds in a closed table are loaded; a class of the user's own is added to it by the user, for one call.
Nothing is unpickled and nothing is imported by name.

A save that is cut off leaves the old intervention or the new one, never a mixture: the weights file carries a copy of
the record in its header and is replaced in one step, and `reft.json` names the weights that it belongs to. Where it
names others, the copy counts.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_tensors
from safetensors.torch import save as safetensors_bytes

from reftlens.bridge.fingerprint import Fingerprint, fingerprint
from reftlens.bridge.protocol import Bridge, device_of, is_bridge
from reftlens.bridge.source import in_words
from reftlens.editing.preflight import preflight
from reftlens.editing.reft import ReFT
from reftlens.errors import StoreMismatch, check_finite
from reftlens.files import digest, located, shape_of, write_atomically
from reftlens.storage.card import LOSS_FILE, check_picture, png_of, write_card
from reftlens.storage.record import FORMAT, Kinds, describe, rebuild
from reftlens.training.config import FitConfig
from reftlens.training.result import FitResult

SETTINGS_FILE, WEIGHTS_FILE, RUN_FILE = "reft.json", "weights.safetensors", "run.json"
_HEADER_KEY = "reftlens"


def save(
    reft: ReFT,
    folder: str | Path,
    model: Any,
    *,
    run: FitResult | None = None,
    scores: Mapping[str, Any] | None = None,
    picture: Any = None,
) -> Path:
    """Write `reft` with a card, README.md, to `folder` (made if need be) and return the folder.

    A README.md that is there and is no such card stays as it is.

    Args:
        model: the model it was trained on, whose fingerprint is stored.
        run: the record of its training, stored beside it with its loss curve.
        scores: what was measured, for the card: `{"share of emoji at strength 1": rate}`.
        picture: a result that draws itself, for the card: `dose_response(…)`, `effects(…)`.

    Raises:
        ValueError: if it could not be loaded again as it is: a class that takes the name of another kind, settings
            that do not make it again, tensors of several dtypes, or parameters shared between interventions; or if
            `run` ended with other weights.
        NotFinite: for weights that hold NaN or infinity.
    """
    folder = located(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected a folder to write to")
    check_picture(picture)
    record = describe(reft, model)
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in reft.interventions.state_dict().items()}
    for name, tensor in tensors.items():
        check_finite(tensor, name)
    record["weights_sha256"] = digest(tensors)
    if run is not None and run.weights and run.weights != record["weights_sha256"]:
        raise ValueError(
            "run= is the record of other weights than these: of another intervention, or of one that was changed or "
            "trained on since"
        )
    weights = safetensors_bytes(tensors, metadata={_HEADER_KEY: json.dumps(record, ensure_ascii=False)})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_FILE, weights)  # the one moment at which the new replaces the old
    write_atomically(folder / SETTINGS_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    _write_run(folder, run, record["weights_sha256"])
    write_card(folder, reft, record, model, run=run, scores=scores, result=picture)
    return folder


def _write_run(folder: Path, run: FitResult | None, digest_of_weights: str) -> None:
    """The record of a run with its loss curve; without one, what was here before goes."""
    if run is not None:
        told = {"weights_sha256": digest_of_weights, **run.to_dict()}
        write_atomically(folder / RUN_FILE, json.dumps(told, indent=1).encode())
        write_atomically(folder / LOSS_FILE, png_of(run))
    elif (folder / RUN_FILE).is_file():
        (folder / RUN_FILE).unlink()
        (folder / LOSS_FILE).unlink(missing_ok=True)


def load(folder: str | Path, model: Any, *, kinds: Kinds | None = None, other_model: bool = False) -> ReFT:
    """Read what `save` wrote, onto the device of `model`, in eval mode.

    Warns where the chat template is another one than it was trained with.

    Args:
        model: a `TransformerBridge`, or a plain transformers model, to be used with `attach`.
        kinds: classes of your own, by the `kind` they were saved under, beside the built-in ones.
        other_model: accept a model that differs from the one it was trained on.

    Raises:
        StoreMismatch: if the format or a kind is unknown, a tensor is missing, or the model is another one.
        ValueError: if a site cannot be used on this model, or has another width there.
    """
    if kinds is not None and not isinstance(kinds, Mapping):
        raise TypeError(f"kinds={kinds!r}, expected {{kind: class}}")
    if not isinstance(model, Bridge | torch.nn.Module):
        raise TypeError(f"model={model!r}, expected a model: load_model(…), or a plain transformers model")
    stored = _read(located(folder))
    _compare(stored, model, other_model)
    reft = rebuild(_as_written(stored.record, model), kinds or {}, stored.folder)
    _fill(reft, stored)
    if is_bridge(model):
        preflight(reft, model)
    return reft.to(device_of(model)).eval()


def model_of(folder: str | Path) -> Fingerprint:
    """The model that an intervention was trained on; raises as `load` where `save` did not write the folder."""
    return Fingerprint(**_read(located(folder)).record["model"])


def load_run(folder: str | Path) -> FitResult:
    """The record of the training that `save(…, run=…)` kept beside an intervention.

    Raises:
        FileNotFoundError: if none was kept.
        StoreMismatch: if it belongs to other weights than those in the folder.
    """
    path = located(folder) / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RUN_FILE}: save(…, run=…) was not given the record of a run")
    told = _table(path)
    if not {"weights_sha256", "validation", "losses", "config"} <= told.keys():
        raise StoreMismatch(f"{path} is damaged, or was not written by save(): copy it anew")
    if told.pop("weights_sha256") != _read(located(folder)).record["weights_sha256"]:
        raise StoreMismatch(f"{path} is the record of other weights than those in {WEIGHTS_FILE}")
    told["validation"] = tuple(tuple(pair) for pair in told["validation"])
    told |= {name: tuple(told[name]) for name in ("losses", "learning_rates", "gradient_norms")}
    return FitResult(**{**told, "config": FitConfig(**told["config"])})


@dataclass(frozen=True)
class _Stored:
    folder: Path
    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def _read(folder: Path) -> _Stored:
    """Record and tensors that belong together, of this format."""
    has_settings = (folder / SETTINGS_FILE).is_file()
    if not (folder / WEIGHTS_FILE).is_file():
        missing = WEIGHTS_FILE if has_settings else SETTINGS_FILE
        raise FileNotFoundError(f"{folder} holds no {missing}: give a folder that `rl.save` or `reftlens demo` wrote")
    weights = (folder / WEIGHTS_FILE).read_bytes()
    record = _table(folder / SETTINGS_FILE) if has_settings else {}
    if has_settings and not record:
        warnings.warn(f"{folder / SETTINGS_FILE} is damaged: the copy in {WEIGHTS_FILE} is read", stacklevel=3)
    if record.get("format", FORMAT) != FORMAT:
        raise StoreMismatch(f"{folder} has format {record['format']!r}, and this reftlens reads format {FORMAT}")
    try:
        tensors = safetensors_tensors(weights)
    except SafetensorError as error:
        raise StoreMismatch(f"{folder / WEIGHTS_FILE} is not a safetensors file, or damaged: {error}") from None
    actual = digest(tensors)
    if record.get("weights_sha256") != actual:
        record = _header_record(weights)
    if record.get("weights_sha256") != actual:
        raise StoreMismatch(f"{folder / WEIGHTS_FILE} are not the weights that {SETTINGS_FILE} was written with")
    if missing := [key for key in ("sites", "interventions", "model") if key not in record]:
        raise StoreMismatch(f"the record in {folder} is not as save() writes it: it has no {missing[0]!r}")
    return _Stored(folder, record, tensors)


def _table(path: Path) -> dict[str, Any]:
    """The table in a JSON file; nothing where it is damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _header_record(weights: bytes) -> dict[str, Any]:
    """The copy of the record in the header of a safetensors file (its length in 8 bytes, then JSON); or nothing."""
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get(_HEADER_KEY, "{}"))


def _compare(stored: _Stored, model: Any, other_model: bool) -> None:
    then, now = Fingerprint(**stored.record["model"]), fingerprint(model)
    differences = then.differences(now)
    if differences and not other_model:
        raise StoreMismatch(
            f"{stored.folder} was trained on {then.name}, and this model differs: {'; '.join(differences)}. "
            f"It was trained with weights of {in_words(then.source)}. Pass other_model=True to load it all the same"
        )
    if then.tokenizer and then.bos != now.bos:
        here = f"puts {now.bos or 'none'} there" if now.tokenizer else "has no tokenizer to compare"
        warnings.warn(
            f"{stored.folder} was trained with {then.bos or 'no BOS token'} in front of text outside chat templates, "
            f"and this model {here}: other tokens give other results, so give it those of encode(…), or the same start",
            stacklevel=3,
        )
    if then.template_changed(now):
        warnings.warn(
            f"the tokenizer's chat template is not the one that {stored.folder} was trained with: with chat=True the "
            "prompts will be written in another way",
            stacklevel=3,
        )


def _as_written(record: dict[str, Any], model: Any) -> dict[str, Any]:
    """The record with hooks under the names that the user gave, where those still mean the same hooks."""
    if not is_bridge(model):
        return record
    hooks = model.hook_dict
    sites = [
        spec | {"hook": spec["written"]} if hooks.get(spec["written"]) is hooks.get(spec["hook"]) else spec
        for spec in record["sites"]
    ]
    return record | {"sites": sites}


def _fill(reft: ReFT, stored: _Stored) -> None:
    expected, tensors, path = reft.interventions.state_dict(), stored.tensors, stored.folder / WEIGHTS_FILE
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise StoreMismatch(f"{path} has no tensor {name!r}, which {SETTINGS_FILE} calls for")
        if name not in expected:
            raise StoreMismatch(f"{path} has a tensor {name!r}, which {SETTINGS_FILE} does not call for")
        theirs, ours = tensors[name], expected[name]
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise StoreMismatch(f"{path}: {name} is {shape_of(theirs)}, and {SETTINGS_FILE} calls for {shape_of(ours)}")
    reft.interventions.load_state_dict(tensors)
