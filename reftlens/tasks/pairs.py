"""Pairs of prompts, with the answer after an exchange: what a network is compared with a causal model on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, SupportsIndex

import torch

from reftlens.bridge.protocol import Bridge
from reftlens.numbers import seeded
from reftlens.tasks.tables import check_parts, checked_columns
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode, encode_prompts
from reftlens.text.loading import Source
from reftlens.text.template import Example

_TRIES = 2_000
"""Draws in a row that may bring no new pair."""


class Pair(NamedTuple):
    """A row of `Pairs`."""

    base: Example
    sources: Mapping[str, Example]
    counterfactual: str
    values: Mapping[str, Any]

    @property
    def changes(self) -> bool:
        """Whether the exchange changes the answer."""
        return self.base.completion != self.counterfactual


@dataclass(frozen=True)
class Pairs:
    """Bases, the sources of one or more variables, and what the causal model answers after the exchange."""

    base: tuple[Example, ...]
    """Prompt and the base's own answer."""
    sources: Mapping[str, tuple[Example, ...]]
    """For each variable that is exchanged: the source's prompt and its own answer."""
    counterfactual: tuple[str, ...]
    """The answer after the exchange."""
    values: Mapping[str, tuple[Any, ...]]
    """For each variable its value in the source, where that is known."""
    others: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Further columns of the table that the pairs were read from, such as a template to split by."""

    def __post_init__(self) -> None:
        columns = {"counterfactual": self.counterfactual, **self.sources, **self.values, **self.others}
        for name, column in columns.items():
            if len(column) != len(self.base):
                raise ValueError(f"{name} has {len(column)} rows, and there are {len(self.base)} bases")
        if not self.sources:
            raise ValueError("the pairs exchange no variable")

    @staticmethod
    def of(pairs: "Iterable[Pair]") -> "Pairs":
        """Pairs given one by one; all exchange the same variables."""
        base, sources, counterfactual, values = zip(*pairs, strict=True)
        columns = ({name: tuple(row[name] for row in rows) for name in rows[0]} for rows in (sources, values))
        return Pairs(base, next(columns), counterfactual, next(columns))

    @staticmethod
    def from_frame(
        table: Source,
        *,
        base: str = "base",
        source: str | Mapping[str, str] = "source",
        answer: str = "answer",
        base_answer: str | None = None,
        source_answer: str | Mapping[str, str] | None = None,
    ) -> "Pairs":
        """Pairs out of a `DataFrame`, or of a file or records as `load_examples` takes them, in the order of its rows.

        `pairs.encode(model)` is what DAS is trained on, with `first_token=True` what `controls` and `interchange_map`
        take; `pairs[:80]` and `pairs[80:]` are train and test. Columns that have no part in this are `pairs.others`.

        Args:
            base: the column that holds the prompts, text or chat messages.
            source: likewise; of several variables `{variable: column of its source}`.
            answer: the column with the answer after the exchange, with the space that it begins with. It is
                the source's own answer where the exchange carries all that the answer depends on.
            base_answer: the column with the answer to the base itself; without it there is no `encode_base`.
            source_answer: the column (or columns, by variable) with the answer to the source itself; they are
                `pairs.values`, too.

        Raises:
            ValueError: naming row and column, for a column that is not there or has two parts, a value that is missing,
                an answer that is no text or empty, and a prompt that is neither text nor messages.
        """
        by_name = {"source": source} if isinstance(source, str) else dict(source)
        own = {next(iter(by_name)): source_answer} if isinstance(source_answer, str) else dict(source_answer or {})
        prompts, texts = [base, *by_name.values()], [answer, *own.values(), *([base_answer] if base_answer else [])]
        check_parts(by_name, own, prompts, texts)
        columns = checked_columns(table, prompts, texts)
        nothing = ("",) * len(columns[answer])

        def examples(prompt: str, completion: str | None) -> tuple[Example, ...]:
            return tuple(map(Example, columns[prompt], nothing if completion is None else columns[completion]))

        sources = {name: examples(column, own.get(name)) for name, column in by_name.items()}
        values = {name: columns[column] for name, column in own.items()}
        others = {name: column for name, column in columns.items() if name not in {*prompts, *texts}}
        return Pairs(examples(base, base_answer), sources, columns[answer], values, others)

    def __repr__(self) -> str:
        others = f"; {', '.join(map(str, self.others))} in others" if self.others else ""
        changes = sum(map(str.__ne__, (e.completion for e in self.base), self.counterfactual))
        changed = f"the exchange changes {changes} answers" if self._has_own_answers else "without the bases' answers"
        return f"Pairs({len(self)} rows, sources of {', '.join(self.sources)}; {changed}{others})"

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Pairs":
        index = range(len(self))[rows] if isinstance(rows, slice) else rows

        def at_rows(column: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(column[i] for i in index)

        sources, values, others = (
            {k: at_rows(c) for k, c in columns.items()} for columns in (self.sources, self.values, self.others)
        )
        return Pairs(at_rows(self.base), sources, at_rows(self.counterfactual), values, others)

    @property
    def _has_own_answers(self) -> bool:
        return any(example.completion for example in self.base)

    def encode(self, model: Bridge, *, chat: bool = False, first_token: bool = False) -> Batch:
        """Base prompts with the answers after the exchange as targets, and their sources.

        The source of a single variable is called `"source"`, as `DAS(d, rank=…)` wants it; several keep their names.

        Args:
            first_token: only the first token of each answer is a target.

        Raises:
            ValueError: with `first_token`, where an answer and the base's own differ and begin with one token.
        """
        rows = [replace(b, completion=c) for b, c in zip(self.base, self.counterfactual, strict=True)]
        data = _answered(model, rows, chat, first_token)
        if first_token and self._has_own_answers:
            self._check_told_apart(data, self.encode_base(model, chat=chat, first_token=True))
        prompts = {name: [e.prompt for e in column] for name, column in self.sources.items()}
        sources = {name: encode_prompts(model, column, chat=chat) for name, column in prompts.items()}
        return data.with_sources(next(iter(sources.values())) if len(sources) == 1 else sources)

    def encode_base(self, model: Bridge, *, chat: bool = False, first_token: bool = False) -> Batch:
        """The same prompts with the base's own answers as targets.

        Raises:
            ValueError: for pairs that were read without them.
        """
        if not self._has_own_answers:
            raise ValueError("the base's own answers are not known: Pairs.from_frame(…, base_answer=…) reads them")
        return _answered(model, list(self.base), chat, first_token)

    def encode_source(self, model: Bridge, *, chat: bool = False, first_token: bool = False) -> Batch:
        """The prompts of the sources with their own answers as targets, of pairs that exchange one variable.

        Raises:
            ValueError: for several variables, or pairs that were read without these answers.
        """
        if len(self.sources) != 1:
            raise ValueError(f"the pairs have sources of {', '.join(self.sources)}, expected those of one variable")
        (rows,) = self.sources.values()
        if not any(example.completion for example in rows):
            raise ValueError("the sources' own answers are not known: Pairs.from_frame(…, source_answer=…) reads them")
        return _answered(model, list(rows), chat, first_token)

    def _check_told_apart(self, data: Batch, base: Batch) -> None:
        same = data.target_ids == base.target_ids
        for row in same.nonzero().flatten().tolist():
            own, other = self.base[row].completion, self.counterfactual[row]
            if own != other:
                raise ValueError(f"row {row}: {own!r} and {other!r} begin with the same token: drop first_token=True")


def _answered(model: Bridge, rows: Sequence[Example], chat: bool, first_token: bool) -> Batch:
    data = encode(model, rows, chat=chat, end=False)
    if not first_token:
        return data
    return replace(data, target_mask=data.target_mask & (data.target_mask.cumsum(dim=1) == 1))


def different_pairs(
    draw: Callable[[torch.Generator], Pair | None],
    count: int,
    seed: SupportsIndex,
    *,
    about: str,
    changed: float | None = None,
) -> Pairs:
    """`count` pairs with different prompts; `draw` gives one, or None where it met none.

    Args:
        about: what they are of, for the message.
        changed: the share in which the exchange changes the answer; any, if None.

    Raises:
        ValueError: for a count below 1, or where 2,000 draws in a row bring no new pair.
    """
    if count < 1 or not 0 <= (changed or 0.0) <= 1:
        raise ValueError(f"count={count} and changed={changed}, expected 1 or more, and a share from 0 to 1")
    generator = seeded(seed)
    changing = count if changed is None else round(count * changed)
    room = {True: changing, False: count if changed is None else count - changing}
    pairs: dict[Any, Pair] = {}
    in_vain = 0
    while len(pairs) < count and in_vain < _TRIES:
        pair, in_vain = draw(generator), in_vain + 1
        if pair is not None and room[pair.changes]:
            prompts = tuple(str(example.prompt) for example in (pair.base, *pair.sources.values()))
            if prompts not in pairs:
                pairs[prompts], in_vain = pair, 0
                room[pair.changes] -= 1
    if len(pairs) < count:
        raise ValueError(f"{len(pairs)} different pairs {about} were found where {count} were asked for: ask for fewer")
    return Pairs.of(pairs.values())
