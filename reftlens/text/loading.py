"""Examples out of files and data sets."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reftlens.text.batch import Example


def load_examples(
    source: str | Path | Iterable[Mapping[str, Any]], *, prompt: str = "prompt", completion: str = "completion"
) -> list[Example]:
    """Examples from a JSONL file or from any iterable of records, such as a Hugging Face data set.

    `prompt` and `completion` name the fields.
    """
    examples = []
    for place, record in records(source):
        if not isinstance(record, Mapping):
            raise ValueError(f"{place} is no record with fields {prompt!r} and {completion!r}: {str(record)[:60]!r}")
        missing = [f for f in (prompt, completion) if f not in record]
        if missing:
            raise ValueError(f"{place} has no field {missing[0]!r}, it has: {', '.join(record)}")
        if not isinstance(record[completion], str):
            raise ValueError(f"{place}: {completion} is {record[completion]!r}, expected text")
        examples.append(Example(record[prompt], record[completion]))
    if not examples:
        raise ValueError(f"no examples in {source}")
    return examples


def records(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Each record of a JSONL file, or of any iterable, with its place in the source, for messages."""
    if not isinstance(source, str | Path):
        for i, record in enumerate(source):
            yield f"row {i}", record
        return
    # Not splitlines(): JSON may hold U+2028 and other line ends inside a string.
    for number, line in enumerate(Path(source).read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield f"{source}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}, line {number} is not JSON: {error}") from None
