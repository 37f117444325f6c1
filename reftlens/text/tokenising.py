"""A prompt and what follows it become token ids: the prompt as it will be at generation, the rest continues it."""

from typing import Any

from reftlens.bridge.protocol import bos_of
from reftlens.text.template import Prompt, Template, ending


def tokenise(tokenizer: Any, text: str, *, bos: bool) -> list[int]:
    """Token ids of `text`; with `bos`, a BOS token in front if this tokenizer uses one, and never two."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    start = bos_of(tokenizer) if bos else None
    if start is not None and ids[:1] != [start]:
        ids = [start, *ids]
    return ids


def split_row(
    tokenizer: Any, prompt: Prompt, completion: str, row: int, template: Template, end: bool, boundary: str
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of what follows it."""
    text, suffix = template.parts(tokenizer, prompt, completion, row)
    plain_text(text + completion, row)
    last = ending(tokenizer, suffix) if end else []
    head = tokenise(tokenizer, text, bos=not template.chat)
    whole = tokenise(tokenizer, text + completion, bos=not template.chat)
    if whole[: len(head)] == head and len(whole) > len(head):
        return head, whole[len(head) :] + last
    if boundary != "split":
        raise ValueError(
            f"row {row}: prompt and completion merge at the boundary {text[-12:]!r} + {completion[:12]!r}, "
            'so the last prompt token would not be the one seen at generation; move the space, or pass boundary="split"'
        )
    return head, tokenise(tokenizer, completion, bos=False) + last


def plain_text(text: str, row: int) -> str:
    """`text` itself; raises where it cannot be written as UTF-8, so that no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"row {row}: {text[error.start]!r} is half of a character (a lone surrogate) and no text; join the halves "
            "with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
    return text
