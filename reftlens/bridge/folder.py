"""A folder with a model of transformers: whether all of it is there."""

import json
from pathlib import Path

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def complete(folder: Path) -> Path:
    """`folder`, if configuration, tokenizer and all weights are there; else `FileNotFoundError`, saying what is not."""
    wanted = ["config.json"]
    for index in folder.glob("*.index.json"):
        wanted += sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        missing.append("weights")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        missing.append("tokenizer")
    if missing:
        raise FileNotFoundError(f"incomplete, without {', '.join(missing[:4])}: {folder}")
    return folder
