"""Examples out of files and data sets."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from reftlens.errors import check_one_of
from reftlens.files import located
from reftlens.text.chats import chat_examples
from reftlens.text.template import Example

Source = str | Path | Iterable[Any]
"""A file, or records: dictionaries, the rows of a `DataFrame`, or of a split of a Hugging Face data set."""


def load_examples(
    source: Source,
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    messages: str = "messages",
    turns: Literal["last", "every"] = "last",
) -> list[Example]:
    """Examples from a file (JSON lines, a JSON array, CSV or TSV), a `DataFrame`, or any iterable of records.

    An iterable of records is a list of dictionaries, say, or a Hugging Face data set. Files are UTF-8, or UTF-16 with
    its mark at the beginning, and may be packed with gzip. A record is a prompt and its completion, or a chat,
    `{"messages": [{"role": "user", "content": …}, …, {"role": "assistant", …}]}`: the assistant's last turn completes
    what stands before it. `encode(model, examples, chat=True)` then writes what the tokenizer's chat template makes of
    the whole chat.

    Args:
        prompt: the name of the field.
        completion: likewise.
        messages: likewise, of chats.
        turns: "every" makes an example of each turn of the assistant, after all that precedes it, as it is generated.

    Raises:
        ValueError: naming the line or row, for what cannot be read, lacks a field, has no text as its completion, or
            is a chat that is not one or does not end with the assistant.
    """
    check_one_of("turns", turns, ("last", "every"))
    examples, chats = [], 0
    for place, record in records(source):
        if not isinstance(record, Mapping):
            raise ValueError(f"{place} is no record with fields {prompt!r} and {completion!r}: {str(record)[:60]!r}")
        if _is_chat(record, messages, (prompt, completion), place):
            examples += chat_examples(record[messages], place, every=turns == "every")
            chats += 1
        else:
            examples.append(_example(record, prompt, completion, place))
    if not examples:
        raise ValueError(f"no examples in {source if isinstance(source, str | Path) else type(source).__name__}")
    if turns == "every" and not chats:
        raise ValueError(f"turns='every' is of chats, and no record has a field {messages!r}: drop it, or name theirs")
    return examples


def _is_chat(record: Mapping[str, Any], messages: str, others: tuple[str, str], place: str) -> bool:
    if messages in others:
        return False
    if messages in record and all(name in record for name in others):
        raise ValueError(f"{place} has {', '.join(others)} and {messages}, too: drop the field that is not meant")
    return messages in record


def _example(record: Mapping[str, Any], prompt: str, completion: str, place: str) -> Example:
    missing = [f for f in (prompt, completion) if f not in record]
    if missing:
        raise ValueError(
            f"{place} has no field {missing[0]!r}, it has: {', '.join(map(str, record))}: say which are the prompts "
            "and the completions, load_examples(…, prompt='question', completion='answer') (prompts without "
            "completions: encode_prompts)"
        )
    if not isinstance(record[completion], str):
        raise ValueError(
            f"{place}: {completion} is {record[completion]!r}, expected text: what the model is to write there"
        )
    return Example(record[prompt], record[completion])


def records(source: Source) -> Iterator[tuple[str, Any]]:
    """Each record of a file, or of any iterable, with its place in the source, for messages."""
    if isinstance(source, str | Path):
        yield from _records_of_file(located(source))
        return
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, source))
        raise ValueError(
            f"the source is a {type(source).__name__} of {keys[:200]}, expected records one by one: a list of "
            "{'prompt': …, 'completion': …}, a DataFrame, or one split of a data set, source['train']"
        )
    rows: Any = source
    names = list(getattr(rows, "columns", ()))
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"the table has two columns called {twice[0]!r}: rename one of them")
    for i, record in enumerate(rows.to_dict("records") if hasattr(rows, "columns") else rows):
        yield f"row {i}", record


def _records_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    text = _text(path)
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ",")
        yield from ((f"{path}, line {reader.line_num}", record) for record in reader)
    elif text.lstrip().startswith("["):
        yield from ((f"{path}, record {i}", record) for i, record in enumerate(_parsed(text, str(path))))
    else:
        # Not splitlines(): JSON may hold U+2028 and other line ends inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of examples: one of those in it")
    payload = path.read_bytes()
    if payload.startswith(b"\x1f\x8b"):
        try:
            payload = gzip.decompress(payload)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: it cannot be unpacked ({error})") from None
    wide = payload.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return payload.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8; of another format, "
            "pass what pandas reads, such as load_examples(pandas.read_parquet(path))"
        ) from None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
