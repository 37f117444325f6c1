"""Which settings of a method are tried: spaces of nine, so that searches of all methods cost the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from reftlens.experiments.methods.adapters import Lora
from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.refts import Reft

Choices = Mapping[str, Sequence[Any]]
"""Values to try, by the name of a field of the method, or `lr`."""


@dataclass(frozen=True)
class Space:
    """Which settings are tried.

    Args:
        method: with the settings that are not searched.
        choices: values by field; `lr` is a field, too.
        staged: one field after the other, in the order of `choices`, the best value of each kept from then on; else
            every combination. The first value of each field is where a staged search begins.
    """

    method: Method
    choices: Choices = field(hash=False)
    staged: bool = False

    def __post_init__(self) -> None:
        names = [*asdict(self.method), "lr"]
        for name, values in self.choices.items():
            if name not in names:
                raise ValueError(f"{self.method.name} has no setting {name!r}, expected of {', '.join(names)}")
            if not values or isinstance(values, str):
                raise ValueError(f"{name}={values!r}, expected one or more values to try")
        if "lr" not in self.choices:
            raise ValueError("choices name no lr: give the learning rates to try, or the one to use")

    @property
    def trials(self) -> int:
        """How many settings are trained."""
        sizes = [len(values) for values in self.choices.values()]
        if self.staged:
            return sum(sizes) - len(sizes) + 1
        return len(list(product(*map(range, sizes))))

    def settings(self, best: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each setting to try once; `best` says which of some that were tried is."""
        if not self.staged:
            yield from (dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values()))
            return
        now, tried = {name: values[0] for name, values in self.choices.items()}, list[dict[str, Any]]()
        for name, values in self.choices.items():
            stage = [{**now, name: value} for value in values]
            for setting in stage:
                if setting not in tried:
                    tried.append(setting)
                    yield setting
            now = best(stage)


def lora_space(method: Lora = Lora()) -> Space:
    """Rank 2, 8, 32 by learning rate 1e-4, 3e-4, 1e-3: nine settings."""
    return Space(method, {"rank": (2, 8, 32), "lr": (1e-4, 3e-4, 1e-3)})


def reft_space(method: Reft = Reft(), depth: int | None = None) -> Space:
    """Nine settings over learning rate, positions, rank and, given the model's `depth`, layers, one after the other.

    In the order of the paper's advice (appendix D.2: several positions on all layers first, then a low rank and fewer
    layers), after the learning rate, without which none can be told. Fewer layers are the middle half, and every third.
    """
    choices: dict[str, Sequence[Any]] = {"lr": (3e-3, 1e-3, 1e-2)}
    more = {"positions": ("f7+l7", "f3+l3", "f1+l1", "f11+l11"), "rank": (8, 2, 32, 16)}
    if method.kind in ("RED", "SteeringVector"):
        del more["rank"]
        choices["lr"] = (*choices["lr"], 3e-4, 3e-2, 1e-4)[: 6 if depth is None else 5]
    if depth is not None:
        few = (tuple(range(depth // 4, depth - depth // 4)), tuple(range(1, depth, 3)))
        more = {name: values[:3] for name, values in more.items()} | {"layers": ("all", *few)}
    for name, values in more.items():
        now = getattr(method, name)
        choices[name] = (now, *(v for v in values if v != now))[: len(values)]
    return Space(method, choices, staged=True)


def with_settings(method: Method, setting: Mapping[str, Any]) -> Method:
    """The method with values of its fields, a learning rate left out."""
    return replace(method, **{name: value for name, value in setting.items() if name != "lr"})
