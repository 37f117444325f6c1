"""Examples of text, and the batches of tokens made of them.

The prompt is tokenised exactly as it will be at generation time, the completion continues it, and the boundary
between them is checked. Templates are applied once, a BOS token appears once, and nothing is cut unless asked.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from reftlens.bridge.protocol import Bridge
from reftlens.text.batch import Batch, Example, Messages, Prompt, batch_from_rows
from reftlens.text.view import Role


def load_examples(
    source: str | Path | Iterable[Mapping[str, Any]], *, prompt: str = "prompt", completion: str = "completion"
) -> list[Example]:
    """Examples from a JSONL file or from any iterable of records, such as a Hugging Face data set.

    `prompt` and `completion` name the fields.
    """
    examples = []
    for place, record in _records(source):
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


def _records(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Each record with its place in the source, for messages."""
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


def encode(
    model: Bridge,
    examples: Sequence[Example],
    *,
    chat: bool = False,
    system: str | None = None,
    end: bool = True,
    max_length: int | None = None,
    truncate: Literal["prompt", "completion"] | None = None,
    boundary: Literal["check", "split"] = "check",
) -> Batch:
    """Tokenise prompts with their completions; the completions are the targets.

    Args:
        chat: apply the tokenizer's chat template; `system` then adds a system message.
        end: learn to stop, too: the end-of-turn token of the template, or the EOS token, is a target.
        max_length: longest row in tokens, by default the model's context.
        truncate: what a longer row loses: the start of the prompt or the end of the completion. Without it a
            longer row is an error. `Batch.truncated` and a warning report which rows were cut.
        boundary: "check" refuses a row in which prompt and completion merge into one token at the boundary;
            "split" tokenises them apart.

    Raises:
        ValueError: naming the row (from 0), for an empty prompt, an empty completion, a row that is too long, a
            merged boundary, or a template that changes the completion.
    """
    tokenizer = _tokenizer(model)
    _one_of("truncate", truncate, None, "prompt", "completion")
    _one_of("boundary", boundary, "check", "split")
    limit = model.cfg.n_ctx if max_length is None else max_length
    ids, roles, cut = [], [], []
    for i, example in enumerate(_some(examples)):
        _check_example(example, i)
        if not example.completion:
            raise ValueError(f"row {i} has an empty completion, so there is nothing to learn or score in it")
        head, tail = _split_row(tokenizer, example, i, chat, system, end, boundary)
        if len(head) + len(tail) > limit:
            head, tail = _cut(head, tail, limit, truncate, i, tokenizer)
            cut.append(i)
        ids.append(head + tail)
        roles.append([int(Role.PROMPT)] * len(head) + [int(Role.RESPONSE)] * len(tail))
    if cut:
        warnings.warn(f"{len(cut)} row(s) were cut to {limit} tokens at the {truncate}: {cut[:10]}", stacklevel=2)
    return batch_from_rows(ids, roles, examples=examples, tokenizer=tokenizer, truncated=tuple(cut))


def encode_prompts(model: Bridge, prompts: Sequence[Prompt], *, chat: bool = False, system: str | None = None) -> Batch:
    """Tokenise prompts that something is to be generated for; there are no targets."""
    tokenizer = _tokenizer(model)
    ids = []
    for i, prompt in enumerate(_some(prompts)):
        row = _tokenise(tokenizer, _prompt_text(tokenizer, prompt, i, chat, system), bos=not chat)
        if len(row) > model.cfg.n_ctx:
            raise ValueError(f"row {i} has {len(row)} tokens, and the model's context is {model.cfg.n_ctx}")
        ids.append(row)
    roles = [[int(Role.PROMPT)] * len(row) for row in ids]
    return batch_from_rows(ids, roles, examples=[Example(p) for p in prompts], tokenizer=tokenizer)


def end_of_turn(tokenizer: Any) -> list[int]:
    """Token ids of the end of an assistant turn in the tokenizer's chat template, up to the special token."""
    mark = "reply"
    turn: Messages = [{"role": "user", "content": "x"}]
    full = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": mark}], tokenize=False)
    return _ending(tokenizer, full[full.rindex(mark) + len(mark) :])


def _ending(tokenizer: Any, suffix: str) -> list[int]:
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(suffix, add_special_tokens=False).input_ids
    stop = next((k for k, t in enumerate(ids) if t in special), None)
    return _eos(tokenizer) if stop is None else ids[: stop + 1]


def _eos(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no EOS token to end a completion with: pass end=False")
    return [tokenizer.eos_token_id]


def _some(rows: Sequence[Any]) -> Sequence[Any]:
    if isinstance(rows, str | Example):
        raise TypeError(f"expected a list, got one {type(rows).__name__}: write [{rows!r}]")
    if not len(rows):
        raise ValueError(f"expected a list with at least one row, got {rows!r}")
    return rows


def _check_example(example: Any, row: int) -> None:
    if not isinstance(example, Example):
        raise TypeError(
            f"row {row} is a {type(example).__name__}, expected an Example(prompt, completion); load_examples makes "
            "them of records"
        )
    if not isinstance(example.completion, str):
        raise TypeError(f"row {row}: the completion is {example.completion!r}, expected text")


def _one_of(name: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(map(repr, allowed))}")


def _tokenizer(model: Bridge) -> Any:
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: boot the bridge with tokenizer=…")
    return model.tokenizer


def _tokenise(tokenizer: Any, text: str, *, bos: bool) -> list[int]:
    """Token ids of `text`; with `bos`, a BOS token in front if this tokenizer uses one, and never two."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    start = tokenizer.bos_token_id
    if bos and start is not None and ids[:1] != [start] and tokenizer("a").input_ids[:1] == [start]:
        ids = [start, *ids]
    return ids


def _prompt_text(tokenizer: Any, prompt: Prompt, row: int, chat: bool, system: str | None) -> str:
    if not prompt:
        raise ValueError(f"row {row} has an empty prompt")
    if not isinstance(prompt, str | Sequence):
        raise TypeError(f"row {row}: the prompt is {prompt!r}, expected text, or a list of chat messages")
    if not chat:
        if not isinstance(prompt, str):
            raise ValueError(f"row {row} is a list of chat messages: pass chat=True")
        if system is not None:
            raise ValueError("a system message needs chat=True")
        return prompt
    for turn in [] if isinstance(prompt, str) else prompt:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(f"row {row}: {turn!r} is no chat message, expected {{'role': …, 'content': …}}")
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template: use chat=False")
    if system is not None and not isinstance(prompt, str) and any(turn["role"] == "system" for turn in prompt):
        raise ValueError(f"row {row} has a system message of its own: drop it, or system=")
    return tokenizer.apply_chat_template(_messages(prompt, system), tokenize=False, add_generation_prompt=True)


def _messages(prompt: Prompt, system: str | None) -> list[Mapping[str, str]]:
    turns: list[Mapping[str, str]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _split_row(
    tokenizer: Any, example: Example, row: int, chat: bool, system: str | None, end: bool, boundary: str
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of what follows it."""
    text = _prompt_text(tokenizer, example.prompt, row, chat, system)
    ending = _eos(tokenizer) if end and not chat else []
    if chat:
        turns = [*_messages(example.prompt, system), {"role": "assistant", "content": example.completion}]
        full = tokenizer.apply_chat_template(turns, tokenize=False)
        if not full.startswith(text + example.completion):
            raise ValueError(
                f"row {row}: the chat template changes the completion {example.completion[:40]!r} (does it start "
                "or end with white space?); write the completion as the template renders it"
            )
        ending = _ending(tokenizer, full[len(text) + len(example.completion) :]) if end else []
    head = _tokenise(tokenizer, text, bos=not chat)
    whole = _tokenise(tokenizer, text + example.completion, bos=not chat)
    if whole[: len(head)] == head and len(whole) > len(head):
        return head, whole[len(head) :] + ending
    if boundary != "split":
        raise ValueError(
            f"row {row}: prompt and completion merge at the boundary {text[-12:]!r} + {example.completion[:12]!r}, "
            'so the last prompt token would not be the one seen at generation; move the space, or pass boundary="split"'
        )
    return head, _tokenise(tokenizer, example.completion, bos=False) + ending


def _cut(
    head: list[int], tail: list[int], limit: int, truncate: str | None, row: int, tokenizer: Any
) -> tuple[list[int], list[int]]:
    if truncate is None:
        raise ValueError(
            f'row {row} has {len(head) + len(tail)} tokens, more than {limit}: pass truncate="prompt" or "completion"'
        )
    if truncate == "completion":
        room = limit - len(head)
        if room < 1:
            raise ValueError(
                f"row {row}: the prompt alone has {len(head)} tokens, so nothing of the completion is left"
            )
        return head, tail[:room]
    bos = head[:1] if head[0] == tokenizer.bos_token_id else []
    room = limit - len(tail) - len(bos)
    if room < 1:
        raise ValueError(f"row {row}: the completion alone has {len(tail)} tokens, so nothing of the prompt is left")
    return bos + head[len(head) - room :], tail
