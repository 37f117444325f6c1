"""High-level causal models: variables and how they depend on each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch

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
