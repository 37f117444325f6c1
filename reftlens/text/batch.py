"""Rows of tokens: what each token is (prompt, response, generated), which are targets, and what to exchange with."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reftlens.numbers import Choice, Integers, row_numbers, seeded
from reftlens.text.sources import Source, in_one, row_numbers_of
from reftlens.text.targets import answer_ids, columns_of, require_targets
from reftlens.text.template import Example, Template
from reftlens.text.view import TokenRole, TokenView


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
    sources: Mapping[str, Source] = field(default_factory=dict, repr=False)
    """By the name of the variable that an interchange intervention takes from it."""
    turn: Int[Tensor, "batch seq"] | None = field(default=None, repr=False)
    """In which message of a chat each token stands, as `text.turns` marks it."""
    template: Template | None = field(default=None, repr=False)
    """How the prompts were written; None for rows of tokens that were not encoded from text."""
    answers: tuple[int, ...] = ()
    """Tokens among which targets are scored: logits have a column for each. Without them, among all tokens."""

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
        if other := [b.answers for b in batches if b.answers != first.answers]:
            raise ValueError(f"the batches are scored among different answers: {first.answers} and {other[0]}")

        def rows_of(name: str, fill: int = 0) -> Tensor:
            return pad_sequence([row for b in batches for row in getattr(b, name)], True, padding_value=fill)

        offsets = [sum(len(b) for b in batches[:i]) for i in range(len(batches))]
        names = dict.fromkeys(name for b in batches for name in b.sources)
        joined = {name: in_one([(b.sources.get(name), len(b)) for b in batches]) for name in names}
        return replace(
            first,
            tokens=rows_of("tokens"),
            role=rows_of("role", int(TokenRole.PAD)),
            target_mask=rows_of("target_mask"),
            turn=None if first.turn is None else rows_of("turn"),
            examples=tuple(example for b in batches for example in b.examples),
            truncated=tuple(offset + i for b, offset in zip(batches, offsets, strict=True) for i in b.truncated),
            sources={name: Source(Batch.join(parts), rows) for name, (parts, rows) in joined.items()},
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
        checked = {n: Source(b, row_numbers_of(n, rows, len(b), len(self))) for n, (b, rows) in pairs.items()}
        return replace(self, sources=checked)

    def among_answers(self, labels: Sequence[str | int] | None) -> "Batch":
        """The same rows, scored among these answers alone: `softmax(logits[labels])` in place of that of all tokens.

        Losses, accuracies and maps then are those among the answers, and the unembedding has one row for each.

        Args:
            labels: texts of one token, as a completion would be written (`" yes"`), or token ids; None for all tokens.

        Raises:
            ValueError: for fewer than two, one of several tokens, two of one token, or a target that is none of them.
        """
        prompt = self.examples[0].prompt if self.examples else ""
        ids = () if labels is None else answer_ids(labels, self.tokenizer, self.template, prompt)
        batch = replace(self, answers=ids)
        columns_of(batch.tokens[batch.target_mask], ids, self.tokenizer)
        return batch

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        sources = f", sources for {', '.join(self.sources)}" if self.sources else ""
        longest = int(self.attention_mask.sum(dim=1).max()) if len(self) else 0
        targets = f"{int(self.target_mask.sum())} targets{self.among}"
        return f"Batch({len(self)} rows of up to {longest} tokens, {targets}{sources})"

    @property
    def among(self) -> str:
        """Among what targets are scored, in words; "" for all tokens."""
        return f" among {len(self.answers)} answers" if self.answers else ""

    def __getitem__(self, rows: Choice) -> "Batch":
        """Some of the rows, by number, slice or mask, padding trimmed to the longest of them."""
        numbers = row_numbers(rows, len(self))
        index = torch.tensor(numbers, dtype=torch.long, device=self.tokens.device)
        columns = (self.role[index] != TokenRole.PAD).any(dim=0)
        return replace(
            self.rearranged(lambda x: x[index][:, columns]),
            examples=tuple(self.examples[i] for i in numbers),
            truncated=tuple(new for new, old in enumerate(numbers) if old in self.truncated),
            sources={n: Source(s.batch, s.rows[index.to(s.rows.device)]) for n, s in self.sources.items()},
        )

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with tokens, roles and target mask changed alike: moved, cut, or in another order."""
        columns = {name: getattr(self, name) for name in ("tokens", "role", "target_mask", "turn")}
        return replace(self, **{name: change(column) for name, column in columns.items() if column is not None})

    def right_padded(self) -> "Batch":
        """The same rows, padded on the right."""
        order = (~self.attention_mask).long().argsort(dim=1, stable=True)
        return self.rearranged(lambda x: x.gather(1, order))

    def to(self, device: torch.device | str) -> "Batch":
        return self.rearranged(lambda x: x.to(device))

    @property
    def attention_mask(self) -> Bool[Tensor, "batch seq"]:
        return self.role != TokenRole.PAD

    @property
    def prompt_mask(self) -> Bool[Tensor, "batch seq"]:
        return self.role == TokenRole.PROMPT

    @cached_property
    def view(self) -> TokenView:
        """What positions are chosen from."""
        return TokenView(self.tokens, self.role, self.tokenizer, self.turn)

    @cached_property
    def target_ids(self) -> Int[Tensor, " targets"]:
        """The column of each target in the logits: its token id, or its place among the `answers`."""
        return columns_of(self.tokens[self.target_mask], self.answers, self.tokenizer)

    @cached_property
    def target_rows(self) -> Int[Tensor, " targets"]:
        """The row of each target."""
        return self.target_mask.nonzero()[:, 0]

    def require_targets(self, name: str = "data") -> None:
        """Raise `ValueError` where a row has no target, or one that no logits predict; `name` is what the rows are."""
        require_targets(self.target_mask, name)

    @cached_property
    def predicting(self) -> tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]:
        """Index `(row, column)` of the logits that predict the targets."""
        rows, columns = self.target_mask.nonzero().unbind(dim=1)
        if not columns.all():
            self.require_targets()
        return rows, columns - 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, roles, targets and labels of all rows, their sources and answers, whatever the padding."""
        digest = hashlib.sha256()
        for ids, role, target in zip(self.tokens.tolist(), self.role.tolist(), self.target_mask.tolist(), strict=True):
            row = [(t, r, int(s)) for t, r, s in zip(ids, role, target, strict=True) if r != TokenRole.PAD]
            digest.update(json.dumps(row).encode())
        for name, source in sorted(self.sources.items()):
            digest.update(json.dumps([name, source.batch.fingerprint, source.rows.tolist()]).encode())
        if self.answers:
            digest.update(json.dumps(self.answers).encode())
        labels = [example.label for example in self.examples]
        if any(label is not None for label in labels):
            digest.update(json.dumps(labels).encode())
        return digest.hexdigest()


def batch_from_rows(
    ids: Sequence[Sequence[int]],
    roles: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]] | None = None,
    *,
    examples: Sequence[Example] | None = None,
    tokenizer: Any = None,
    turns: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """A right-padded `Batch` from ragged rows; the pad id is never read, so any id serves."""
    longest = max(len(row) for row in ids)
    pad = getattr(tokenizer, "pad_token_id", None) or 0

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    targets = [[r == TokenRole.RESPONSE for r in row] for row in roles] if targets is None else targets
    return Batch(
        tokens=padded(ids, pad),
        role=padded(roles, int(TokenRole.PAD)),
        target_mask=padded(targets, False).bool(),
        examples=tuple(examples or [Example("")] * len(ids)),
        tokenizer=tokenizer,
        turn=padded(turns, 0) if turns else None,
    )
