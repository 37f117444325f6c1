"""A causal model with prompts: balanced pairs, train and test apart over entities and over templates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex

import torch

from reftlens.errors import check_one_of
from reftlens.tasks.causal import CausalModel, Setting, any_of
from reftlens.tasks.pairs import Pair, Pairs, different_pairs
from reftlens.text.template import Example

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """What is asked of a network, and what the causal model says the answer is.

    Args:
        causal: its variables.
        pools: for each split the values that some inputs take there; inputs without a pool take any value.
        templates: for each split, prompts with `{input}` in them, or functions from a setting to a prompt.
        answer: the text of an output, with the space before it where the network would write one.
        fits: which settings make sense; all, if None.
        rebalance: changes a setting that was drawn uniformly, so that a rare case (two inputs alike) is not rare.
    """

    name: str
    causal: CausalModel
    pools: Mapping[Split, Mapping[str, Sequence[Any]]]
    templates: Mapping[Split, Sequence[str | Callable[[Setting], str]]]
    answer: Callable[[Any], str]
    fits: Callable[[Setting], bool] | None = None
    rebalance: Callable[[dict[str, Any], torch.Generator], dict[str, Any]] | None = None

    def draw(self, generator: torch.Generator, split: Split = "train") -> dict[str, Any]:
        """A setting of one split.

        Raises:
            ValueError: if 10,000 draws make no sense.
        """
        pools = {name: self.pools[split].get(name, values) for name, values in self.causal.inputs.items()}
        causal = replace(self.causal, inputs=pools)
        for _ in range(10_000):
            setting = causal.sample(generator)
            setting = setting if self.rebalance is None else self.rebalance(setting, generator)
            if self.fits is None or self.fits(setting):
                return setting
        raise ValueError(f"{self.name}: none of 10,000 settings drawn from the {split} pools fits")

    def example(self, setting: Setting, template: str | Callable[[Setting], str]) -> Example:
        """The prompt of a setting with its own answer."""
        prompt = template.format(**setting) if isinstance(template, str) else template(setting)
        return Example(prompt, self.answer(self.causal.run(setting)[self.causal.output]))

    def pairs(
        self,
        count: int,
        variables: str | Sequence[str],
        *,
        split: Split = "train",
        seed: SupportsIndex = 0,
        changed: float = 0.5,
    ) -> Pairs:
        """`count` different pairs; in a share `changed` of them the exchange changes the answer.

        Base and sources of a pair have one template. Each variable named has a source of its own.

        Raises:
            ValueError: for an unknown variable or split, or where so many different pairs cannot be found.
        """
        names = (variables,) if isinstance(variables, str) else tuple(variables)
        unknown = [n for n in names if n not in self.causal.variables]
        if unknown or not names:
            raise ValueError(f"{self.name} has no variable {unknown}: there are {', '.join(self.causal.variables)}")
        check_one_of("split", split, self.templates)
        about = f"of the {split} split of {self.name} with changed={changed}"
        return different_pairs(lambda g: self._pair(names, split, g), count, seed, about=about, changed=changed)

    def _pair(self, names: Sequence[str], split: Split, generator: torch.Generator) -> Pair:
        template = any_of(self.templates[split], generator)
        base, sources = self.draw(generator, split), {n: self.draw(generator, split) for n in names}
        after = self.causal.interchange(base, sources)[self.causal.output]
        values = {n: self.causal.run(setting)[n] for n, setting in sources.items()}
        examples = {n: self.example(setting, template) for n, setting in sources.items()}
        return Pair(self.example(base, template), examples, self.answer(after), values)


def halves(values: Mapping[str, Sequence[Any]]) -> dict[Split, dict[str, Sequence[Any]]]:
    """Pools that have nothing in common: every other value for train, the rest for test."""
    return {
        "train": {name: pool[::2] for name, pool in values.items()},
        "test": {name: pool[1::2] for name, pool in values.items()},
    }
