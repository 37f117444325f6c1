"""A causal model with prompts: balanced pairs, train and test apart over entities and over templates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reftlens.tasks.causal import CausalModel, Pairs, Setting
from reftlens.text.batch import Example

Split = Literal["train", "test"]
_TRIES = 2_000
"""Draws in a row that may bring no new pair."""


@dataclass(frozen=True)
class Task:
    """What is asked of a network, and what the causal model says the answer is.

    Args:
        causal: its variables.
        pools: for each split the values that some inputs take there; inputs without a pool take any value.
        templates: for each split, prompts with `{input}` in them, or functions from a setting to a prompt.
        answer: the text of an output, with the space before it where the network would write one.
        fits: which settings make sense; all, if None.
        tilt: changes a setting that was drawn uniformly, so that a rare case (two inputs alike) is not rare.
    """

    name: str
    causal: CausalModel
    pools: Mapping[Split, Mapping[str, Sequence[Any]]]
    templates: Mapping[Split, Sequence[str | Callable[[Setting], str]]]
    answer: Callable[[Any], str]
    fits: Callable[[Setting], bool] | None = None
    tilt: Callable[[dict[str, Any], torch.Generator], dict[str, Any]] | None = None

    def draw(self, generator: torch.Generator, split: Split = "train") -> dict[str, Any]:
        """A setting of one split.

        Raises:
            ValueError: if 10,000 draws make no sense.
        """
        pools = {name: self.pools[split].get(name, values) for name, values in self.causal.inputs.items()}
        for _ in range(10_000):
            setting = {n: v[int(torch.randint(len(v), (), generator=generator))] for n, v in pools.items()}
            setting = setting if self.tilt is None else self.tilt(setting, generator)
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
        seed: int = 0,
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
        if split not in self.templates:
            raise ValueError(f"split={split!r}, expected one of {', '.join(self.templates)}")
        if count < 1 or not 0 <= changed <= 1:
            raise ValueError(f"count={count} and changed={changed}, expected 1 or more, and a share from 0 to 1")
        generator = torch.Generator().manual_seed(seed)
        left = {True: round(count * changed), False: count - round(count * changed)}
        rows: list[tuple[Example, dict[str, Example], str, dict[str, Any]]] = []
        seen: set[Any] = set()
        in_vain = 0
        while len(rows) < count and in_vain < _TRIES:
            row = self._pair(names, split, generator)
            key = (row[0].prompt, *(source.prompt for source in row[1].values()))
            differs = row[0].completion != row[2]
            in_vain += 1
            if left[differs] and key not in seen:
                in_vain = 0
                left[differs] -= 1
                seen.add(key)
                rows.append(row)
        if len(rows) < count:
            raise ValueError(
                f"{self.name}: {len(rows)} different {split} pairs were found where {count} were asked for "
                f"(changed={changed}); ask for fewer, or for another share"
            )
        return Pairs(
            tuple(r[0] for r in rows), {n: tuple(r[1][n] for r in rows) for n in names}, tuple(r[2] for r in rows),
            {n: tuple(r[3][n] for r in rows) for n in names},
        )  # fmt: skip

    def _pair(
        self, names: Sequence[str], split: Split, generator: torch.Generator
    ) -> tuple[Example, dict[str, Example], str, dict[str, Any]]:
        """Base, sources, the answer after the exchange, and the sources' values."""
        templates = self.templates[split]
        template = templates[int(torch.randint(len(templates), (), generator=generator))]
        base, sources = self.draw(generator, split), {n: self.draw(generator, split) for n in names}
        after = self.causal.interchange(base, sources)[self.causal.output]
        values = {n: self.causal.run(setting)[n] for n, setting in sources.items()}
        shown = {n: self.example(setting, template) for n, setting in sources.items()}
        return self.example(base, template), shown, self.answer(after), values
