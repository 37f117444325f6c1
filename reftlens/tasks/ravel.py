"""RAVEL: can one attribute of a city be exchanged, and the others left? (Huang et al. 2024, arXiv 2402.17700)"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, SupportsIndex

import torch

from reftlens.files import located
from reftlens.tasks.causal import any_of
from reftlens.tasks.pairs import Pair, Pairs, different_pairs
from reftlens.tasks.ravel_files import City, Template, from_files, from_hub
from reftlens.text.positions import Last, Positions, Tokens
from reftlens.text.template import Example

Split = Literal["train", "val", "test"]


def ravel_cities(folder: str | Path | None = None) -> "Ravel":
    """RAVEL's cities and prompts.

    Args:
        folder: with `city_entities.jsonl`, `city_prompts.jsonl` and `city_wikipedia_prompts.jsonl`; None reads
            `hij/ravel` from the Hugging Face hub, by the extra `reftlens[datasets]`.

    Raises:
        FileNotFoundError: naming the file that the folder lacks.
        ValueError: naming a row that lacks a field.
        OSError: if the hub cannot be read.
    """
    cities, templates = from_hub() if folder is None else from_files(located(folder))
    return Ravel(cities, templates)


@dataclass(frozen=True)
class Ravel:
    """Cities with their attributes, and prompts that ask for one; both belong to train, val or test."""

    cities: tuple[City, ...]
    templates: tuple[Template, ...]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Those that some template asks for."""
        return tuple(dict.fromkeys(t.attribute for t in self.templates if t.attribute is not None))

    @property
    def positions(self) -> Positions:
        """The last token of the city's name, in a prompt of any of the templates."""
        return entity_end([t.text for t in self.templates])

    def keep(
        self, *, cities: Callable[[City], bool] | None = None, templates: Callable[[Template], bool] | None = None
    ) -> "Ravel":
        """Those cities and those templates that the functions accept."""
        return Ravel(
            tuple(c for c in self.cities if cities is None or cities(c)),
            tuple(t for t in self.templates if templates is None or templates(t)),
        )

    def cause(self, attribute: str, count: int, *, split: Split = "train", seed: SupportsIndex = 0) -> Pairs:
        """`count` different pairs whose answer is to become the source city's; own and new answer always differ.

        Base and source each have a template of the split that asks for `attribute`, and a city of the split.

        Raises:
            ValueError: where so many different pairs cannot be found, or nothing asks for `attribute`.
        """

        def draw(generator: torch.Generator) -> Pair | None:
            base, source = (self._city(attribute, split, generator) for _ in range(2))
            if _alike(base, source, attribute):
                return None
            question, other = (self._template(attribute, split, generator) for _ in range(2))
            after = ask(replace(base, attributes=source.attributes), question).completion
            return _pair(attribute, ask(base, question), source, other, after)

        return different_pairs(draw, count, seed, about=f"about {attribute}")

    def isolate(
        self,
        attribute: str,
        count: int,
        *,
        others: Sequence[str] | None = None,
        split: Split = "train",
        wikipedia: bool = False,
        seed: SupportsIndex = 0,
    ) -> Pairs:
        """`count` different pairs whose answer is to stay, though the source city has another one.

        The base is asked for one of `others` (by default every other attribute), the source for `attribute`; the two
        cities differ in both.

        Args:
            wikipedia: sources are sentences from Wikipedia that ask for nothing.

        Raises:
            ValueError: as `cause`.
        """
        names = [a for a in self.attributes if a != attribute] if others is None else list(others)
        if not names or attribute in names:
            raise ValueError(f"others={names}, expected one or more attributes other than {attribute!r}")

        def draw(generator: torch.Generator) -> Pair | None:
            other = any_of(names, generator)
            base, source = self._city(other, split, generator), self._city(attribute, split, generator)
            if _alike(base, source, other) or _alike(base, source, attribute):
                return None
            example = ask(base, self._template(other, split, generator))
            template = self._template(None if wikipedia else attribute, split, generator)
            return _pair(attribute, example, source, template, example.completion)

        return different_pairs(draw, count, seed, about=f"about {attribute}")

    def _city(self, attribute: str, split: str, generator: torch.Generator) -> City:
        cities = [c for c in self.cities if c.split == split and attribute in c.known]
        if not cities:
            raise ValueError(f"no {split} city can be asked for {attribute!r}")
        return any_of(cities, generator)

    def _template(self, attribute: str | None, split: str, generator: torch.Generator) -> Template:
        own = [t for t in self.templates if t.split == split and t.attribute == attribute and t.city is None]
        if not own:
            raise ValueError(f"no {split} template asks for {attribute!r}, there are: {', '.join(self.attributes)}")
        return any_of(own, generator)


def ask(city: City, template: Template) -> Example:
    """The template filled in, with the city's own answer; a sentence that asks for nothing has none."""
    prompt = template.text.replace("%s", city.name)
    if template.attribute is None:
        return Example(prompt)
    space = "" if prompt[-1] in "\"'( " else " "
    return Example(prompt, space + city.answer(template.attribute))


def entity_end(texts: Sequence[str]) -> Positions:
    """The last token of what stands for `%s`, in prompts made of any of these texts.

    A pattern over the decoded prompt: the character before the text that follows `%s`. Where one such text ends
    another, the longer one counts.
    """
    ends = sorted({text.partition("%s")[2] for text in texts}, key=len, reverse=True)
    parts = []
    for end in ends:
        longer = [o[: len(o) - len(end)] for o in ends if len(o) > len(end) and o.endswith(end)]
        parts.append("".join(f"(?<!{re.escape(o)})" for o in longer) + f"(?={re.escape(end)}\\Z)")
    return Tokens(f"(?s:.)(?:{'|'.join(parts)})", regex=True) >> Last(1)


def _alike(a: City, b: City, attribute: str) -> bool:
    """Whether the answers begin with the same word, so that a first token may not tell them apart."""
    return a.answer(attribute).split()[0] == b.answer(attribute).split()[0]


def _pair(attribute: str, base: Example, source: City, template: Template, counterfactual: str) -> Pair:
    return Pair(base, {attribute: ask(source, template)}, counterfactual, {attribute: source.answer(attribute)})
