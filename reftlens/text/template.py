"""How a prompt becomes the text that a model reads: as it stands, or as turns of the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages


@dataclass(frozen=True)
class Template:
    """How the prompts of a batch were written.

    Args:
        chat: as turns of the tokenizer's chat template; otherwise as they stand.
        system: a system message in front of the turns.
        arguments: what the chat template takes beside the messages, such as `{"enable_thinking": False}`.
    """

    chat: bool = False
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.chat and self.system is not None:
            raise ValueError("a system message needs chat=True")
        if not self.chat and self.arguments:
            raise ValueError(f"arguments of the chat template need chat=True: {', '.join(self.arguments)}")

    def prompt(self, tokenizer: Any, prompt: Prompt, row: int) -> str:
        """The text that the model is to continue."""
        if not prompt:
            raise ValueError(f"row {row} has an empty prompt")
        if not isinstance(prompt, str | Sequence):
            raise TypeError(f"row {row}: the prompt is {prompt!r}, expected text, or a list of chat messages")
        if not self.chat:
            if not isinstance(prompt, str):
                raise ValueError(f"row {row} is a list of chat messages: pass chat=True")
            return prompt
        for turn in [] if isinstance(prompt, str) else prompt:
            if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
                raise ValueError(f"row {row}: {turn!r} is no chat message, expected {{'role': …, 'content': …}}")
        if tokenizer.chat_template is None:
            raise ValueError("this tokenizer has no chat template: use chat=False")
        if self.system is not None and not isinstance(prompt, str) and any(turn["role"] == "system" for turn in prompt):
            raise ValueError(f"row {row} has a system message of its own: drop it, or system=")
        return self._render(tokenizer, self._turns(prompt), add_generation_prompt=True)

    def parts(self, tokenizer: Any, prompt: Prompt, completion: str, row: int) -> tuple[str, str]:
        """The text before `completion`, and the text that the template puts after it."""
        before = self.prompt(tokenizer, prompt, row)
        if not self.chat:
            return before, ""
        full = self._render(tokenizer, [*self._turns(prompt), _turn("assistant", completion)])
        if not full.startswith(before + completion):
            raise ValueError(
                f"row {row}: the chat template changes the completion {completion[:40]!r} (does it start or end with "
                "white space?); write the completion as the template renders it"
            )
        return before, full[len(before) + len(completion) :]

    def end_of_turn(self, tokenizer: Any) -> list[int]:
        """Token ids of the end of an assistant turn in the tokenizer's chat template, up to the special token."""
        mark = "reply"
        full = self._render(tokenizer, [*self._turns("x"), _turn("assistant", mark)])
        return ending(tokenizer, full[full.rindex(mark) + len(mark) :])

    def _turns(self, prompt: Prompt) -> list[Mapping[str, str]]:
        turns: list[Mapping[str, str]] = list(prompt) if not isinstance(prompt, str) else [_turn("user", prompt)]
        return turns if self.system is None else [_turn("system", self.system), *turns]

    def _render(self, tokenizer: Any, turns: Messages, *, add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **self.arguments
        )


def _turn(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


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
