"""Share a saved intervention on the Hugging Face hub."""

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from reftlens.editing.reft import ReFT
from reftlens.storage.card import check_picture, write_card
from reftlens.storage.folder import SETTINGS_FILE, load, save
from reftlens.storage.record import Kinds
from reftlens.training.result import FitResult


def push_to_hub(
    reft: ReFT,
    repo_id: str,
    model: Any,
    *,
    run: FitResult | None = None,
    scores: Mapping[str, Any] | None = None,
    picture: Any = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Save `reft` with a model card to the hub repository `repo_id`, made if need be; returns its address.

    `run`, `scores` and `picture` are those of `save`: the card shows the loss curve, a table of the scores, those that
    are numbers as metrics of the hub too, what the result draws, and code that runs.
    """
    from huggingface_hub import HfApi

    check_picture(picture)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(reft, scratch, model, run=run)
        record = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        write_card(folder, reft, record, model, run=run, scores=scores, result=picture, repo_id=repo_id)
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Save a reftlens intervention")
    return str(address)


def from_hub(
    repo_id: str,
    model: Any,
    *,
    revision: str | None = None,
    kinds: Kinds | None = None,
    other_model: bool = False,
    token: str | None = None,
) -> ReFT:
    """Load what `push_to_hub` saved; the same checks as `load`, and nothing but JSON and safetensors is fetched."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, token=token)
    return load(folder, model, kinds=kinds, other_model=other_model)
