"""What a model knows of RAVEL's cities, and RAVEL cut to that: an answer it does not have cannot be exchanged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from reftlens import figures
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.editing.engine import forward
from reftlens.figures import DataFrame
from reftlens.scoring.statistics import Estimate, share_of
from reftlens.tasks.ravel import Ravel, ask
from reftlens.tasks.ravel_files import City, Template
from reftlens.text.encoding import encode


@dataclass(frozen=True, eq=False)
class Known:
    """For each question asked of the unedited model: whether the answer's first token is the most likely one."""

    ravel: Ravel
    questions: tuple[tuple[City, Template], ...]
    hits: Bool[Tensor, " question"]

    def accuracy(self, attribute: str) -> Estimate:
        """Share of right answers over cities and templates."""
        return share_of(self.hits[[t.attribute == attribute for _, t in self.questions]])

    def of_template(self, template: Template) -> float:
        """Share of cities that the model answers right with this template; NaN if it was not asked."""
        return self.hits[[t == template for _, t in self.questions]].double().mean().item()

    def best(self, count: int) -> Ravel:
        """The `count` best templates of each attribute and split, with sentences from Wikipedia and all cities."""
        ranked = sorted(dict.fromkeys(t for _, t in self.questions), key=lambda t: -self.of_template(t))
        groups: dict[tuple[str | None, str | None], list[Template]] = {}
        for template in ranked:
            groups.setdefault((template.attribute, template.split), []).append(template)
        best = {template for group in groups.values() for template in group[:count]}
        return self.ravel.keep(templates=lambda t: t.attribute is None or t in best)

    def keep(self, least: float = 1.0) -> Ravel:
        """Cities may be asked for what the model answers right with a share `least` of the templates, or more."""
        answers: dict[tuple[str, str | None], list[bool]] = {}
        for (city, template), hit in zip(self.questions, self.hits.tolist(), strict=True):
            answers.setdefault((city.name, template.attribute), []).append(hit)
        known: dict[str, set[str]] = {}
        for (name, attribute), hits in answers.items():
            if attribute is not None and sum(hits) >= least * len(hits):
                known.setdefault(name, set()).add(attribute)
        cities = tuple(replace(c, known=frozenset(known[c.name])) for c in self.ravel.cities if c.name in known)
        return Ravel(cities, self.ravel.templates)

    def to_frame(self) -> DataFrame:
        """One row per question."""
        pairs = zip(self.questions, self.hits.tolist(), strict=True)
        places = [
            {"city": city.name, "attribute": t.attribute, "split": t.split, "template": t.text, "hit": hit}
            for (city, t), hit in pairs
        ]
        return figures.table(places, "question")


def known(
    model: Bridge,
    ravel: Ravel,
    *,
    cities: Sequence[City] | None = None,
    attributes: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Known:
    """Ask the unedited model for attributes of cities.

    Args:
        cities: those asked about with every template. By default, each city with the templates of its own split.
        attributes: by default all.

    Raises:
        ValueError: if nothing is left to ask.
    """
    names = ravel.attributes if attributes is None else tuple(attributes)
    templates = [t for t in ravel.templates if t.attribute in names and t.city is None and t.split is not None]
    pool = ravel.cities if cities is None else cities
    questions = [
        (c, t) for t in templates for c in pool if t.attribute in c.known and (cities is not None or c.split == t.split)
    ]
    if not questions:
        raise ValueError(f"no city can be asked for {', '.join(names)}: there are {len(pool)} cities")
    questions.sort(key=lambda q: len(q[1].text) + len(q[0].name))  # rows of a batch are about as long
    starts = tqdm(range(0, len(questions), batch_size), desc="known", unit="batch", disable=not progress)
    hits = [_right(model, questions[start : start + batch_size]) for start in starts]
    return Known(ravel, tuple(questions), torch.cat(hits))


@torch.no_grad()
def _right(model: Bridge, questions: Sequence[tuple[City, Template]]) -> Bool[Tensor, " question"]:
    data = encode(model, [ask(c, t) for c, t in questions], end=False, boundary="split").to(device_of(model))
    last = data.prompt_mask.sum(dim=1) - 1
    rows = torch.arange(len(data), device=last.device)
    short = int(last.max()) + 1
    logits = forward(model, data.tokens[:, :short], data.prompt_mask[:, :short])
    return (logits[rows, last].argmax(dim=-1) == data.tokens[rows, last + 1]).cpu()
