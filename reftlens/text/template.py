"""How a prompt becomes the text that a model reads: as it stands, or as turns of the tokenizer's chat template."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from reftlens.text.view import token_spans

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages


@dataclass(frozen=True)
class Example:
    """A prompt (text, or chat messages with `role` and `content`) and the completion to learn or score."""

    prompt: Prompt
    completion: str = ""
    label: float | None = None
    """What a head is to say of it: the number of a class, or a value."""


@dataclass(frozen=True)
class Template:
    """How the prompts of a batch were written.

    Args:
        chat: as turns of the tokenizer's chat template; otherwise as they stand.
        system: a system message in front of the turns.
        arguments: what the chat template takes beside the messages, such as `{"enable_thinking": False}`.
        continue_last: every prompt ends in a turn of the assistant, which is left open to be continued.
    """

    chat: bool = False
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    continue_last: bool = False

    def __post_init__(self) -> None:
        if not self.chat and self.system is not None:
            raise ValueError("a system message needs chat=True")
        if not self.chat and self.arguments:
            raise ValueError(f"arguments of the chat template need chat=True: {', '.join(self.arguments)}")
        if not self.chat and self.continue_last:
            raise ValueError("continue_last=True continues a turn of a chat, and needs chat=True")

    def prompt(self, tokenizer: Any, prompt: Prompt, row: int) -> str:
        """The text that the model is to continue."""
        if prompt is None or (isinstance(prompt, str | Sequence) and not prompt):
            raise ValueError(f"row {row} has an empty prompt")
        chat = isinstance(prompt, Sequence) and isinstance(prompt[0], Mapping)
        if not isinstance(prompt, str) and not chat:
            raise TypeError(f"row {row}: the prompt is {prompt!r}, expected text, or a list of chat messages")
        if not self.chat:
            if not isinstance(prompt, str):
                raise ValueError(f"row {row} is a list of chat messages: pass chat=True")
            return prompt
        self._check_turns(prompt, row)
        self._check_arguments(tokenizer)
        turns = self.turns(prompt)
        text = self._render(tokenizer, turns, row, add_generation_prompt=not self.continue_last)
        _check_whole(turns, text, row)
        if not self.continue_last:
            return text
        last = turns[-1]["content"]
        if not isinstance(last, str) or last not in text:
            raise ValueError(
                f"row {row}: the chat template changes the last message, {str(last)[:40]!r}: {_tail(text)!r}"
            )
        return text[: text.rindex(last) + len(last)]

    def parts(self, tokenizer: Any, prompt: Prompt, completion: str, row: int) -> tuple[str, str]:
        """The text before `completion`, and the text that the template puts after it."""
        before = self.prompt(tokenizer, prompt, row)
        if not self.chat:
            return before, ""
        turns = self.turns(prompt)
        begun = turns.pop() if self.continue_last else _turn("assistant", "")
        full = self._render(tokenizer, [*turns, {**begun, "content": begun["content"] + completion}], row)
        if not full.startswith(before + completion):
            raise ValueError(f"row {row}: {_difference(before, completion, full)}")
        return before, full[len(before) + len(completion) :]

    def shortened(self, tokenizer: Any, prompt: Prompt, count: int) -> Prompt | None:
        """`prompt` with about `count` tokens fewer in its messages, the oldest first; None where that cannot be.

        System messages stay whole, and so do the last token of the last message and all that the template writes.
        """
        turns = [_turn("user", prompt)] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        left = count
        for i, turn in enumerate(turns):
            whole = turn["role"] == "system" or not isinstance(turn["content"], str)
            ids = [] if whole else tokenizer(turn["content"], add_special_tokens=False).input_ids
            drop = min(left, len(ids) - (i == len(turns) - 1))
            if drop > 0:
                text, spans = token_spans(tokenizer, ids)
                begins = [start for start, _ in spans[drop:] if start >= max(1, spans[drop - 1][1])]
                turns[i] = {**turn, "content": text[begins[0] :] if begins else ""}
                left -= drop
        if left == count or not turns[-1]["content"]:
            return None
        return turns[0]["content"] if isinstance(prompt, str) else turns

    def control_tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[str]:
        """Tokens that the tokenizer reads in the texts of a chat as its own marks, such as the end of a turn."""
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
        pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        return [mark[0] for text in texts if self.chat and marks and (mark := pattern.search(text))]

    def texts(self, prompt: Prompt) -> Iterator[str]:
        """What people wrote of a prompt: the content of its messages."""
        yield from (turn["content"] for turn in self.turns(prompt) if isinstance(turn["content"], str))

    def _check_turns(self, prompt: Prompt, row: int) -> None:
        turns: Messages = [] if isinstance(prompt, str) else prompt
        for turn in turns:
            if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
                raise ValueError(f"row {row}: {turn!r} is no chat message, expected {{'role': …, 'content': …}}")
        if self.system is not None and any(turn["role"] == "system" for turn in turns):
            raise ValueError(f"row {row} has a system message of its own: drop it, or system=")
        last = turns[-1]["role"] if turns else "user"
        if last == "assistant" and not self.continue_last:
            raise ValueError(
                f"row {row} ends in a turn of the assistant, which would be closed and a second one opened: encode "
                "with continue_last=True to have it continued, or end with what the user says"
            )
        if last != "assistant" and self.continue_last:
            raise ValueError(f"row {row} ends in a turn of {last!r}: continue_last=True continues one of the assistant")

    def _check_arguments(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("this tokenizer has no chat template: use chat=False")
        for name in self.arguments:
            unused = not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template))
            if unused or name in ("messages", "add_generation_prompt"):
                why = "does not use it" if unused else "gets it from the prompt"
                raise ValueError(f"template_arguments={{{name!r}: …}}: the chat template {why}, drop it")

    def end_of_turn(self, tokenizer: Any) -> list[int]:
        """Token ids of the end of an assistant turn in the tokenizer's chat template, up to the special token."""
        mark = "reply"
        full = self._render(tokenizer, [*self.turns("x"), _turn("assistant", mark)], 0)
        return ending(tokenizer, full[full.rindex(mark) + len(mark) :])

    def turns(self, prompt: Prompt) -> list[Mapping[str, str]]:
        """The messages that are rendered for a prompt."""
        turns: list[Mapping[str, str]] = list(prompt) if not isinstance(prompt, str) else [_turn("user", prompt)]
        return turns if self.system is None else [_turn("system", self.system), *turns]

    def _render(self, tokenizer: Any, turns: Messages, row: int, *, add_generation_prompt: bool = False) -> str:
        arguments = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **self.arguments}
        try:
            text = tokenizer.apply_chat_template(turns, **arguments)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(
                f"row {row}: the chat template refuses these messages, of {roles}: {error}; write them as it wants them"
            ) from error
        for content in (turn["content"] for turn in turns if turn["content"] and not isinstance(turn["content"], str)):
            if str(content) in text:
                raise ValueError(
                    f"this chat template reads text only, and writes out {str(content)[:60]}: give the text"
                )
        return text


def _check_whole(turns: Messages, text: str, row: int) -> None:
    """Raise where the template leaves out what the user or the system says."""
    for turn in turns:
        content = turn["content"]
        if turn["role"] in ("system", "user") and isinstance(content, str) and _letters(content) not in _letters(text):
            raise ValueError(
                f"row {row}: the chat template leaves out or changes what {turn['role']!r} says, {content[:40]!r}: "
                f"{_tail(text)!r}; write it into a message that the template keeps"
            )


def _letters(text: str) -> str:
    return text.strip().casefold()


def _turn(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


def _difference(before: str, completion: str, full: str) -> str:
    """Where the template writes a completion otherwise than behind the prompt, and what to do."""
    same = next((i for i, (a, b) in enumerate(zip(before, full, strict=False)) if a != b), min(len(before), len(full)))
    if same < len(before):
        return (
            f"the chat template writes the prompt in another way once it is answered: {before[same : same + 40]!r} "
            f"turns into {full[same : same + 40]!r} after {_tail(full[:same])!r}; see whether one of "
            "template_arguments= keeps it"
        )
    return (
        f"the chat template changes the completion: {completion[:40]!r} turns into {full[same : same + 60]!r}; write "
        "the completion so (without white space that is cut off, with the block that is put before it), or pass the "
        "template_arguments= under which the prompt ends with that block"
    )


def _tail(text: str) -> str:
    return text if len(text) <= 40 else f"…{text[-40:]}"


def ending(tokenizer: Any, suffix: str) -> list[int]:
    """Token ids of `suffix` up to its first special token; the EOS token where it has none."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(suffix, add_special_tokens=False).input_ids if suffix else []
    stop = next((k for k, t in enumerate(ids) if t in special), None)
    if stop is not None:
        return ids[: stop + 1]
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no EOS token to end a completion with: pass end=False")
    return [tokenizer.eos_token_id]
