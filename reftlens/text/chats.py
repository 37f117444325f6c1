"""Chats as data sets hold them: records of messages, of which the assistant's turns are what is learned."""

from collections.abc import Mapping, Sequence
from typing import Any

from reftlens.text.template import Example


def chat_examples(messages: Any, place: str, *, every: bool) -> list[Example]:
    """The last turn of the assistant as completion of all messages before it; with `every`, each of its turns so.

    Args:
        messages: dictionaries with `role` and `content`, the last one of the assistant.
        place: of the record in its source, for messages.

    Raises:
        ValueError: naming place and message, for what is no message, a chat that does not end with the assistant or
            begins with it, and a turn of the assistant that is more than text.
    """
    turns = _listed(messages, place)
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(
                f"{place}, message {number} is {str(turn)[:80]}, expected {{'role': …, 'content': …}}: name the keys so"
            )
    roles = [turn["role"] for turn in turns]
    if roles[-1] != "assistant":
        raise ValueError(
            f"{place} ends in a turn of {roles[-1]!r}, after which nothing is learned: end it with the assistant's"
        )
    if roles[0] == "assistant":
        raise ValueError(f"{place} begins with the assistant: there is no prompt that this could be the answer to")
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    wanted = answers if every else answers[-1:]
    return [Example(turns[:i], _answer(turns[i], f"{place}, message {i}")) for i in wanted]


def _listed(messages: Any, place: str) -> list[Any]:
    rows = messages.tolist() if hasattr(messages, "tolist") else messages  # what pandas reads out of parquet
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"{place} has {str(rows)[:60]!r} as its messages, expected a list of them")
    return list(rows)


def _answer(turn: Mapping[str, Any], where: str) -> str:
    """The text of a turn that is learned, where it is nothing but text."""
    more = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if more or not isinstance(turn["content"], str) or not turn["content"]:
        what = f"{', '.join(map(str, more))} beside its text" if more else f"{str(turn['content'])[:60]!r} as content"
        raise ValueError(
            f"{where} has {what}, and text alone is learned of a turn of the assistant: leave such rows out, or write "
            "as text what the model is to write"
        )
    return turn["content"]
