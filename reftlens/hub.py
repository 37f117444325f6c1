"""Share a saved intervention on the Hugging Face hub."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reftlens.interventions import Intervention
from reftlens.reft import ReFT
from reftlens.result import FitResult
from reftlens.store import SETTINGS_FILE, load, save


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

    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(reft, scratch, model, run=run)
        (folder / "README.md").write_text(model_card(reft, repo_id, folder), encoding="utf-8")
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Save a reftlens intervention")
    return str(address)


def from_hub(
    repo_id: str,
    model: Any,
    *,
    revision: str | None = None,
    kinds: Mapping[str, type[Intervention]] | None = None,
    token: str | None = None,
) -> ReFT:
    """Load what `push_to_hub` saved; the same checks as `load`."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, token=token)
    return load(folder, model, kinds=kinds)


def model_card(reft: ReFT, repo_id: str, folder: Path) -> str:
    """A README for the hub: what it is, where it acts, how to load it."""
    record = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    base = record["model"]["name"]
    rows = "\n".join(
        f"| `{site.hook}` | `{site.positions}` | {module.kind}, rank {module.rank} |" for site, module in reft.items()
    )
    return f"""---
library_name: reftlens
base_model: {base}
tags: [reft, interpretability, representation-finetuning]
---
# {repo_id}

An intervention on the hidden states of `{base}`, trained with reftlens; the model's own weights are unchanged.

| hook | positions | intervention |
|---|---|---|
{rows}

```python
import reftlens as rl

model = rl.load_model("{base}")
reft = rl.from_hub("{repo_id}", model)
print(rl.generate(reft, model, ["…"], chat=True))
```
"""
