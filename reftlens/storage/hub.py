"""Share a saved intervention on the Hugging Face hub."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reftlens.editing.reft import ReFT
from reftlens.files import templates
from reftlens.interventions import Intervention
from reftlens.storage.folder import SETTINGS_FILE, load, save
from reftlens.training.result import FitResult

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def push_to_hub(
    reft: ReFT,
    repo_id: str,
    model: Any,
    *,
    run: FitResult | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Save `reft` with a model card to the hub repository `repo_id`, made if need be; returns its address."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = save(reft, scratch, model, run=run)
        (folder / "README.md").write_text(model_card(reft, repo_id, model, folder), encoding="utf-8")
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Save a reftlens intervention")
    return str(address)


def from_hub(
    repo_id: str,
    model: Any,
    *,
    revision: str | None = None,
    kinds: Mapping[str, type[Intervention]] | None = None,
    other_model: bool = False,
    token: str | None = None,
) -> ReFT:
    """Load what `push_to_hub` saved; the same checks as `load`, and nothing but JSON and safetensors is fetched."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, token=token)
    return load(folder, model, kinds=kinds, other_model=other_model)


def model_card(reft: ReFT, repo_id: str, model: Any, folder: Path) -> str:
    """A README for the hub: what it is, where it acts, how to load it."""
    record = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    base = record["model"]["name"]
    on_hub = _HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    card = templates(Path(__file__).parent, html=False).get_template("model_card.md.j2")
    return card.render(
        repo_id=repo_id,
        base=base if on_hub else Path(base).name,
        on_hub=on_hub,
        rows=zip(record["sites"], reft.items(), strict=True),
        parameters=reft.parameter_count(model),
        versions=record["versions"],
        chat=record["model"]["chat_template"] is not None,
    )
