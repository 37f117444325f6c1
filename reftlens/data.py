"""Examples of text, and the batches of tokens made of them.

The prompt is tokenised exactly as it will be at generation time, the completion continues it, and the boundary
between them is checked. Templates are applied once, a BOS token appears once, and nothing is cut unless asked.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftlens.model import Bridge
from reftlens.positions import Role, TokenView

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages


@dataclass(frozen=True)
class Example:
    """A prompt (text, or chat messages with `role` and `content`) and the completion to learn or score."""

    prompt: Prompt
    completion: str = ""


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of several rows, right-padded, with the role of each token and which of them are targets."""

    tokens: Int[Tensor, "batch seq"]
    role: Int[Tensor, "batch seq"]
    target_mask: Bool[Tensor, "batch seq"]
    """Tokens that are predicted and scored; the logits one position to the left predict them."""
    examples: tuple[Example, ...] = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    truncated: tuple[int, ...] = ()
    """Rows that were cut, on request."""
    sources: Mapping[str, "Source"] = field(default_factory=dict, repr=False)
    """By the name of the variable that an interchange intervention takes from it."""

    def with_sources(self, sources: "Batch | Source | Mapping[str, Batch | Source]") -> "Batch":
        """The same rows with sources to exchange with: one (named `"source"`), or `{variable: one}`.

        A `Batch` as source has a row for each row of this one; a `Source` says which row goes with which.
        """
        given = {"source": sources} if isinstance(sources, Batch | Source) else dict(sources)
        if not given:
            raise ValueError("sources={}, expected a batch, or one for each variable")
        made = {name: s if isinstance(s, Source) else Source(s, torch.arange(len(s))) for name, s in given.items()}
        for name, one in made.items():
            if len(one.rows) != len(self):
                raise ValueError(f"source {name!r} has {len(one.rows)} row(s), and the data {len(self)}")
            if len(one.rows) and not -1 <= int(one.rows.min()) <= int(one.rows.max()) < len(one.batch):
                raise ValueError(f"source {name!r} names rows outside -1 to {len(one.batch) - 1} of its batch")
        return replace(self, sources=made)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        sources = f", sources for {', '.join(self.sources)}" if self.sources else ""
        longest = int(self.attention_mask.sum(dim=1).max()) if len(self) else 0
        return f"Batch({len(self)} rows of up to {longest} tokens, {int(self.target_mask.sum())} targets{sources})"

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "Batch":
        """The chosen rows, padding trimmed to the longest of them."""
        every = range(len(self))
        chosen = list(every[rows]) if isinstance(rows, slice) else [every[i] for i in _as_list(rows)]
        index = torch.tensor(chosen, dtype=torch.long, device=self.tokens.device)
        keep = (self.role[index] != Role.PAD).any(dim=0)
        return replace(
            self,
            tokens=self.tokens[index][:, keep],
            role=self.role[index][:, keep],
            target_mask=self.target_mask[index][:, keep],
            examples=tuple(self.examples[i] for i in chosen),
            truncated=tuple(new for new, old in enumerate(chosen) if old in self.truncated),
            sources={n: Source(s.batch, s.rows[index.to(s.rows.device)]) for n, s in self.sources.items()},
        )

    def to(self, device: torch.device | str) -> "Batch":
        moved = {k: getattr(self, k).to(device) for k in ("tokens", "role", "target_mask")}
        return replace(self, **moved)

    @property
    def attention_mask(self) -> Bool[Tensor, "batch seq"]:
        return self.role != Role.PAD

    @property
    def prompt_mask(self) -> Bool[Tensor, "batch seq"]:
        return self.role == Role.PROMPT

    @cached_property
    def view(self) -> TokenView:
        """What positions are chosen from."""
        return TokenView(self.tokens, self.role, self.tokenizer)

    @cached_property
    def target_ids(self) -> Int[Tensor, " targets"]:
        return self.tokens[self.target_mask]

    @cached_property
    def target_rows(self) -> Int[Tensor, " targets"]:
        """The row of each target."""
        return self.target_mask.nonzero()[:, 0]

    @cached_property
    def predicting(self) -> tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]:
        """Index `(row, column)` of the logits that predict the targets."""
        rows, columns = self.target_mask.nonzero().unbind(dim=1)
        first = rows[columns == 0].tolist()
        if first:
            raise ValueError(f"the first token of row(s) {first[:10]} is a target, and no logits predict it")
        return rows, columns - 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, roles and targets of all rows, and their sources; padding does not matter."""
        digest = hashlib.sha256()
        for ids, role, target in zip(self.tokens.tolist(), self.role.tolist(), self.target_mask.tolist(), strict=True):
            row = [(t, r, int(s)) for t, r, s in zip(ids, role, target, strict=True) if r != Role.PAD]
            digest.update(json.dumps(row).encode())
        for name, source in sorted(self.sources.items()):
            digest.update(json.dumps([name, source.batch.fingerprint, source.rows.tolist()]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """Rows to exchange with: `batch`, and for each row of the data which of its rows, or -1 for no exchange."""

    batch: Batch
    rows: Int[Tensor, " rows"]


def batch_from_rows(
    ids: Sequence[Sequence[int]],
    roles: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]] | None = None,
    *,
    examples: Sequence[Example] | None = None,
    tokenizer: Any = None,
    truncated: tuple[int, ...] = (),
) -> Batch:
    """A right-padded `Batch` from ragged rows; the pad id is never read, so any id serves."""
    longest = max(len(row) for row in ids)
    pad = getattr(tokenizer, "pad_token_id", None) or 0

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    targets = [[r == Role.RESPONSE for r in row] for row in roles] if targets is None else targets
    return Batch(
        tokens=padded(ids, pad),
        role=padded(roles, int(Role.PAD)),
        target_mask=padded(targets, False).bool(),
        examples=tuple(examples or [Example("")] * len(ids)),
        tokenizer=tokenizer,
        truncated=truncated,
    )


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


def _as_list(rows: int | Sequence[int]) -> list[int]:
    return [rows] if isinstance(rows, int) else list(rows)


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
