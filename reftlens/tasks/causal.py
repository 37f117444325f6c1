"""High-level causal models, and the pairs of prompts on which a network is compared with one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch

from reftlens.bridge.protocol import Bridge
from reftlens.text.batch import Batch, Example
from reftlens.text.encoding import encode, encode_prompts

Setting = Mapping[str, Any]
"""A value for each input variable."""
Origin = Setting | tuple[Setting, Mapping[str, "Origin"]]
"""Where a variable's value comes from: a setting, or a setting with interchanges of its own (nested)."""


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
        for name, one in self.derived.items():
            unknown = [p for p in one.parents if p not in self.variables]
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
        return list(TopologicalSorter({name: one.parents for name, one in self.derived.items()}).static_order())

    def run(self, setting: Setting, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The value of every variable; those in `fixed` have the value given there, whatever their parents say.

        Raises:
            ValueError: if an input is missing, a name is unknown, or a function fails on its parents' values.
        """
        fixed = dict(fixed or {})
        self._known(fixed)
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
        given = [values[p] for p in self.derived[name].parents]
        try:
            return self.derived[name].function(*given)
        except Exception as error:
            said = ", ".join(f"{p}={v!r}" for p, v in zip(self.derived[name].parents, given, strict=True))
            raise ValueError(f"{name} could not be computed from {said}: {type(error).__name__}: {error}") from error

    def interchange(self, base: Setting, sources: Mapping[str, Origin]) -> dict[str, Any]:
        """What the model says where each variable named in `sources` has the value it has in its source."""
        self._known(sources)
        return self.run(base, {name: self._read(origin)[name] for name, origin in sources.items()})

    def _read(self, origin: Origin) -> dict[str, Any]:
        return self.interchange(*origin) if isinstance(origin, tuple) else self.run(origin)

    def _known(self, names: Mapping[str, Any]) -> None:
        unknown = [name for name in names if name not in self.variables]
        if unknown:
            raise ValueError(f"no variable {', '.join(unknown)}, there are: {', '.join(self.variables)}")

    def sample(self, generator: torch.Generator) -> dict[str, Any]:
        """A value for each input, uniformly."""
        return {n: v[int(torch.randint(len(v), (), generator=generator))] for n, v in self.inputs.items()}


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

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Pairs":
        index = range(len(self))[rows] if isinstance(rows, slice) else rows
        chosen = {k: tuple(column[i] for i in index) for k, column in self.sources.items()}
        values = {k: tuple(column[i] for i in index) for k, column in self.values.items()}
        return Pairs(
            tuple(self.base[i] for i in index), chosen, tuple(self.counterfactual[i] for i in index), values
        )  # fmt: skip

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
        made = {n: encode_prompts(model, [e.prompt for e in column], chat=chat) for n, column in self.sources.items()}
        return data.with_sources({"source": next(iter(made.values()))} if len(made) == 1 else made)

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
