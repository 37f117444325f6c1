"""Save and load interventions: `reft.json` says what they are, `weights.safetensors` holds the numbers.

Only kinds in a closed table are loaded; a class of the user's own is added to it by the user, for one call.
Nothing is unpickled and nothing is imported by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from reftlens.checkpoint import write_atomically
from reftlens.fingerprint import Fingerprint, fingerprint
from reftlens.interventions import KINDS, Intervention
from reftlens.model import Bridge, device_of, resolve_hook
from reftlens.preflight import preflight
from reftlens.reft import ReFT
from reftlens.result import FitResult, library_versions
from reftlens.site import Site

FORMAT = 1
SETTINGS_FILE, WEIGHTS_FILE, RUN_FILE = "reft.json", "weights.safetensors", "run.json"


class StoreMismatch(ValueError):
    """What is on disk does not fit: another model, width, kind or format; the message names it."""


def save(reft: ReFT, folder: str | Path, model: Any, *, run: FitResult | None = None) -> Path:
    """Write `reft` to `folder` (made if need be) and return the folder.

    Args:
        model: the model it was trained on, whose fingerprint is stored.
        run: the record of its training, kept beside it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sites = [
        s.to_dict() | {"hook": _canonical(model, s), "intervention": i}
        for s, i in zip(reft.sites, reft.which, strict=True)
    ]
    record = {
        "format": FORMAT,
        "sites": sites,
        "interventions": [_described(m) for m in reft.interventions if isinstance(m, Intervention)],
        "model": fingerprint(model).to_dict(),
        "versions": library_versions(),
    }
    tensors = {n: t.detach().cpu().contiguous() for n, t in reft.interventions.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, safetensors_bytes(tensors))
    if run is not None:
        write_atomically(folder / RUN_FILE, json.dumps(run.to_dict(), indent=1).encode())
    write_atomically(folder / SETTINGS_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return folder


def load(
    folder: str | Path,
    model: Any,
    *,
    kinds: Mapping[str, type[Intervention]] | None = None,
    other_model: bool = False,
) -> ReFT:
    """Read what `save` wrote, onto the device of `model`, in eval mode.

    Args:
        model: a `TransformerBridge`, or a plain transformers model to be used with `on_transformers`.
        kinds: classes of your own, by the `kind` they were saved under, beside the built-in ones.
        other_model: accept a model that differs from the one it was trained on.

    Raises:
        StoreMismatch: if the format or a kind is unknown, a tensor is missing, or the model is another one.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS_FILE}: it is not a folder that save() wrote")
    record = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise StoreMismatch(f"{folder} has format {record.get('format')!r}, and this reftlens reads format {FORMAT}")
    differences = Fingerprint(**record["model"]).differences(fingerprint(model))
    if differences and not other_model:
        raise StoreMismatch(
            f"{folder} was trained on {record['model']['name']}, and this model differs: {'; '.join(differences)}. "
            "Pass other_model=True to load it all the same"
        )
    modules = [_built(spec, {**KINDS, **(kinds or {})}, folder) for spec in record["interventions"]]
    reft = ReFT({Site.from_dict(s): modules[s["intervention"]] for s in record["sites"]})
    _fill(reft, load_file(folder / WEIGHTS_FILE), folder)
    if isinstance(model, Bridge):
        preflight(reft, model)
    return reft.to(device_of(model)).eval()


def _canonical(model: Any, site: Site) -> str:
    name = resolve_hook(model, site.hook).name if isinstance(model, Bridge) else site.hook
    return name or site.hook


def _described(module: Intervention) -> dict[str, Any]:
    dtypes = {str(t.dtype).removeprefix("torch.") for t in module.state_dict().values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{module.kind} holds tensors of several dtypes, {sorted(dtypes)}: move it to one with .to(dtype)"
        )
    return {"kind": module.kind, "settings": module.settings(), "dtype": dtypes.pop() if dtypes else "float32"}


def _built(spec: dict[str, Any], kinds: Mapping[str, type[Intervention]], folder: Path) -> Intervention:
    if spec["kind"] not in kinds:
        raise StoreMismatch(
            f"{folder} holds an intervention of kind {spec['kind']!r}, and the known ones are {', '.join(kinds)}; if "
            f"it is a class of yours, pass kinds={{{spec['kind']!r}: YourClass}}"
        )
    return kinds[spec["kind"]](**spec["settings"]).to(getattr(torch, spec["dtype"]))


def _fill(reft: ReFT, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    expected = reft.interventions.state_dict()
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise StoreMismatch(f"{folder / WEIGHTS_FILE} and {SETTINGS_FILE} disagree about {odd[:4]}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise StoreMismatch(
                f"{folder / WEIGHTS_FILE}: {name} has shape {list(tensors[name].shape)}, and its settings say "
                f"{list(tensor.shape)}"
            )
    reft.interventions.load_state_dict(tensors)
