"""Rows of tokens: what each token is (prompt, response, generated), which are targets, and what to exchange with."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reftlens.numbers import Choice, Integers, row_numbers, seeded, whole_numbers
from reftlens.text.template import Prompt, Template
from reftlens.text.view import Role, TokenView


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
    template: Template | None = field(default=None, repr=False)
    """How the prompts were written; None for rows of tokens that were not encoded from text."""

    @staticmethod
    def join(batches: "Sequence[Batch]") -> "Batch":
        """All rows of several batches, with their sources; a variable that one of them does not exchange stays there.

        Cause pairs and isolate pairs joined are the data of multi-task DAS (Huang et al. 2024, arXiv 2402.17700): the
        answer follows the source in the first, and stays the base's in the second.

        Raises:
            ValueError: where there is no batch, or they differ in tokenizer or template.
        """
        if not batches:
            raise ValueError("no batches to join")
        first = batches[0]
        if any(b.tokenizer is not first.tokenizer for b in batches):
            raise ValueError("the batches were encoded by different tokenizers")
        if other := [b.template for b in batches if b.template != first.template]:
            raise ValueError(f"the batches were encoded differently: {first.template} and {other[0]}")

        def rows_of(name: str, fill: int = 0) -> Tensor:
            return pad_sequence([row for b in batches for row in getattr(b, name)], True, padding_value=fill)

        offsets = [sum(len(b) for b in batches[:i]) for i in range(len(batches))]
        names = dict.fromkeys(name for b in batches for name in b.sources)
        return replace(
            first,
            tokens=rows_of("tokens"),
            role=rows_of("role", int(Role.PAD)),
            target_mask=rows_of("target_mask"),
            examples=tuple(example for b in batches for example in b.examples),
            truncated=tuple(offset + i for b, offset in zip(batches, offsets, strict=True) for i in b.truncated),
            sources={name: _joined_source(batches, name) for name in names},
        )

    def resampled(self, seed: SupportsIndex = 0) -> "Batch":
        """The same rows, each with another of them as source: resample ablation, once `Interchange` is applied.

        No row is its own source: rows are shuffled, and each takes the one after it; `ValueError` for fewer than two.
        """
        if len(self) < 2:
            raise ValueError(f"{len(self)} row(s): resampling needs another row to take from")
        order = torch.randperm(len(self), generator=seeded(seed))
        rows = torch.empty_like(order).scatter(0, order, order.roll(-1))
        return self.with_sources((replace(self, sources={}), rows))

    def with_sources(
        self, sources: "Batch | tuple[Batch, Integers] | Mapping[str, Batch | tuple[Batch, Integers]]"
    ) -> "Batch":
        """The same rows with sources to exchange with: one (named `"source"`), or one for each variable by its name.

        A source is a `Batch` with a row for each row of this one, or a pair `(batch, rows)`: for each row of this one
        the number of the row to take from, or -1 for no exchange. `encode_prompts(model, texts)` makes a batch of
        texts, `tasks.Pairs.from_frame` all of it from a table of counterfactual pairs.

        Raises:
            TypeError: for a source that is neither.
            ValueError: for no source, or one with another number of rows.
        """
        named = dict(sources) if isinstance(sources, Mapping) else {"source": sources}
        if not named:
            raise ValueError("sources={}, expected a batch, or one for each variable")
        pairs = {name: (s, range(len(s))) if isinstance(s, Batch) else s for name, s in named.items()}
        for name, pair in pairs.items():
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Batch)):
                raise TypeError(
                    f"source {name!r} is a {type(pair).__name__}, expected a Batch or a pair (batch, rows): "
                    "encode_prompts(model, texts) makes a Batch"
                )
        checked = {
            name: Source(batch, torch.tensor(whole_numbers(rows, f"row of source {name!r}"), dtype=torch.long))
            for name, (batch, rows) in pairs.items()
        }
        for name, (batch, rows) in checked.items():
            if len(rows) != len(self):
                raise ValueError(f"source {name!r} has {len(rows)} row(s), and the data {len(self)}")
            if len(rows) and not -1 <= int(rows.min()) <= int(rows.max()) < len(batch):
                raise ValueError(f"source {name!r} names rows outside -1 to {len(batch) - 1} of its batch")
        return replace(self, sources=checked)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        sources = f", sources for {', '.join(self.sources)}" if self.sources else ""
        longest = int(self.attention_mask.sum(dim=1).max()) if len(self) else 0
        return f"Batch({len(self)} rows of up to {longest} tokens, {int(self.target_mask.sum())} targets{sources})"

    def __getitem__(self, rows: Choice) -> "Batch":
        """Some of the rows, by number, slice or mask, padding trimmed to the longest of them."""
        numbers = row_numbers(rows, len(self))
        index = torch.tensor(numbers, dtype=torch.long, device=self.tokens.device)
        columns = (self.role[index] != Role.PAD).any(dim=0)
        return replace(
            self.rearranged(lambda x: x[index][:, columns]),
            examples=tuple(self.examples[i] for i in numbers),
            truncated=tuple(new for new, old in enumerate(numbers) if old in self.truncated),
            sources={n: Source(s.batch, s.rows[index.to(s.rows.device)]) for n, s in self.sources.items()},
        )

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with tokens, roles and target mask changed alike: moved, cut, or in another order."""
        return replace(self, **{name: change(getattr(self, name)) for name in ("tokens", "role", "target_mask")})

    def right_padded(self) -> "Batch":
        """The same rows, padded on the right."""
        order = (~self.attention_mask).long().argsort(dim=1, stable=True)
        return self.rearranged(lambda x: x.gather(1, order))

    def to(self, device: torch.device | str) -> "Batch":
        return self.rearranged(lambda x: x.to(device))

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

    def require_targets(self, name: str = "data") -> None:
        """Raise `ValueError` where a row has no target, or one that no logits predict; `name` is what the rows are."""
        empty = (~self.target_mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"row(s) {empty[:10]} of {name} have no target: nothing to learn or score there")
        first = self.target_mask[:, 0].nonzero().flatten().tolist()
        if first:
            raise ValueError(f"the first token of row(s) {first[:10]} of {name} is a target, and no logits predict it")

    @cached_property
    def predicting(self) -> tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]:
        """Index `(row, column)` of the logits that predict the targets."""
        rows, columns = self.target_mask.nonzero().unbind(dim=1)
        if not columns.all():
            self.require_targets()
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


class Source(NamedTuple):
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
    )


def _joined_source(batches: Sequence[Batch], name: str) -> Source:
    """The sources of one variable; rows that have none count as -1."""
    rows, parts, begins = [], [], 0
    for batch in batches:
        if name not in batch.sources:
            rows.append(torch.full((len(batch),), -1))
            continue
        source = batch.sources[name]
        rows.append(torch.where(source.rows >= 0, source.rows + begins, -1))
        parts.append(source.batch)
        begins += len(source.batch)
    return Source(Batch.join(parts), torch.cat(rows))
