"""High-level causal models, and the pairs of prompts on which a network is compared with one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple, SupportsIndex

import torch

from reftlens.bridge.protocol import Bridge
from reftlens.numbers import seeded
from reftlens.text.batch import Batch, Example
from reftlens.text.encoding import encode, encode_prompts

Setting = Mapping[str, Any]
"""A value for each input variable."""
Origin = Setting | tuple[Setting, Mapping[str, "Origin"]]
"""Where a variable's value comes from: a setting, or a setting with interchanges of its own (nested)."""
_TRIES = 2_000
"""Draws in a row that may bring no new pair."""


@dataclass(frozen=True)
class Derived:
    """A variable that is computed: `function(*values of parents)`."""

    parents: tuple[str, ...]
    function: Callable[..., Any]


@dataclass(frozen=True)
class CausalModel:
    """Variables and how they depend on each other (Pearl 2009; Geiger et al. 2021, arXiv 2106.02997).

    Args:
        inputs: the values that each input variable may take.
        derived: the variables that are computed, in any order.
        output: the one that is answered.

    Raises:
        ValueError: for a name used twice, an unknown parent, a cycle, an input without values or an unknown output.
    """

    inputs: Mapping[str, Sequence[Any]]
    derived: Mapping[str, Derived]
    output: str

    def __post_init__(self) -> None:
        twice = sorted(set(self.inputs) & set(self.derived))
        if twice:
            raise ValueError(f"{', '.join(twice)}: both an input and computed")
        empty = [name for name, values in self.inputs.items() if not values]
        if empty:
            raise ValueError(f"input {', '.join(empty)} has no value to take")
        for name, variable in self.derived.items():
            unknown = [p for p in variable.parents if p not in self.variables]
            if unknown:
                raise ValueError(f"{name} depends on {', '.join(unknown)}, which no variable is called")
        if self.output not in self.derived:
            raise ValueError(f"the output is {self.output!r}, expected one of: {', '.join(self.derived)}")
        try:
            self._order()
        except CycleError as error:
            raise ValueError(f"variables depend on each other in a circle: {' → '.join(error.args[1])}") from None

    @property
    def variables(self) -> tuple[str, ...]:
        return (*self.inputs, *self.derived)

    def _order(self) -> list[str]:
        return list(TopologicalSorter({name: v.parents for name, v in self.derived.items()}).static_order())

    def run(self, setting: Setting, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The value of every variable; those in `fixed` have the value given there, whatever their parents say.

        Raises:
            ValueError: if an input is missing, a name is unknown, or a function fails on its parents' values.
        """
        fixed = dict(fixed or {})
        self._check_names(fixed)
        missing = [name for name in self.inputs if name not in setting]
        if missing:
            raise ValueError(f"the setting has no value for {', '.join(missing)}")
        values = {name: setting[name] for name in self.inputs}
        for name in self._order():
            if name in fixed:
                values[name] = fixed[name]
            elif name in self.derived:
                values[name] = self._computed(name, values)
        return values

    def _computed(self, name: str, values: Mapping[str, Any]) -> Any:
        parents = {parent: values[parent] for parent in self.derived[name].parents}
        try:
            return self.derived[name].function(*parents.values())
        except Exception as error:
            shown = ", ".join(f"{parent}={value!r}" for parent, value in parents.items())
            raise ValueError(f"{name} could not be computed from {shown}: {type(error).__name__}: {error}") from error

    def interchange(self, base: Setting, sources: Mapping[str, Origin]) -> dict[str, Any]:
        """What the model says where each variable named in `sources` has the value it has in its source."""
        self._check_names(sources)
        return self.run(base, {name: self._values(origin)[name] for name, origin in sources.items()})

    def _values(self, origin: Origin) -> dict[str, Any]:
        return self.interchange(*origin) if isinstance(origin, tuple) else self.run(origin)

    def _check_names(self, names: Mapping[str, Any]) -> None:
        unknown = [name for name in names if name not in self.variables]
        if unknown:
            raise ValueError(f"no variable {', '.join(unknown)}, there are: {', '.join(self.variables)}")

    def sample(self, generator: torch.Generator) -> dict[str, Any]:
        """A value for each input, uniformly."""
        return {name: any_of(values, generator) for name, values in self.inputs.items()}


def any_of(values: Sequence[Any], generator: torch.Generator) -> Any:
    """One of the values, each as likely."""
    return values[int(torch.randint(len(values), (), generator=generator))]


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
    """For each variable its value in the source."""

    def __post_init__(self) -> None:
        for name, column in {"counterfactual": self.counterfactual, **self.sources, **self.values}.items():
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

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Pairs":
        index = range(len(self))[rows] if isinstance(rows, slice) else rows

        def at_rows(column: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(column[i] for i in index)

        sources, values = ({k: at_rows(c) for k, c in columns.items()} for columns in (self.sources, self.values))
        return Pairs(at_rows(self.base), sources, at_rows(self.counterfactual), values)

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
        if first_token:
            self._check_told_apart(data, self.encode_base(model, chat=chat, first_token=True))
        prompts = {name: [e.prompt for e in column] for name, column in self.sources.items()}
        sources = {name: encode_prompts(model, column, chat=chat) for name, column in prompts.items()}
        return data.with_sources(next(iter(sources.values())) if len(sources) == 1 else sources)

    def encode_base(self, model: Bridge, *, chat: bool = False, first_token: bool = False) -> Batch:
        """The same prompts with the base's own answers as targets."""
        return _answered(model, list(self.base), chat, first_token)

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
