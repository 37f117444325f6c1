"""Which skills hold in what is written, by which directions of one edit act: each alone, together, negated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from reftlens import figures
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.experiments.examples.subspaces import Skills
from reftlens.figures import Axes, DataFrame
from reftlens.generation.decoding import Decoding
from reftlens.generation.writing import generate
from reftlens.scoring.statistics import Estimate, share_of
from reftlens.text.template import Prompt

Strengths = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class SkillShares:
    """What was written under each choice of directions, and in which texts each skill holds."""

    skills: tuple[str, ...]
    strengths: tuple[Strengths, ...]
    """Of the skills that act, by name; the others are at 0."""
    texts: tuple[tuple[str, ...], ...]
    """For each of `strengths`, one for each prompt."""
    held: Bool[Tensor, "strengths skill text"]

    def shares(self, skill: str | None = None) -> list[Estimate]:
        """For each of `strengths` the share of texts in which a skill holds, or all do, with its exact 95 % interval.

        Raises:
            ValueError: for a skill that is not there.
        """
        if skill is not None and skill not in self.skills:
            raise ValueError(f"no skill {skill!r}, expected of {', '.join(self.skills)}")
        held = self.held.all(dim=1) if skill is None else self.held[:, self.skills.index(skill)]
        return [share_of(hits) for hits in held]

    def to_frame(self) -> DataFrame:
        """One row for each of `strengths`: a share for each skill, and for all in one text."""
        named = {**{name: self.shares(name) for name in self.skills}, "all": self.shares()}
        return figures.table(
            [
                {
                    "strengths": _named(each),
                    **{k: v for name, e in named.items() for k, v in e[i].as_columns(name).items()},
                }
                for i, each in enumerate(self.strengths)
            ],
            "strengths",
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The shares with their intervals, for each of `strengths` one point a skill and one for all."""
        ax = figures.axes(ax, width=2.0 + 1.1 * len(self.strengths))
        named: list[str | None] = [*self.skills, None]
        for i, name in enumerate(named):
            color = figures.CYCLE[i % len(figures.CYCLE)]
            for place, share in enumerate(self.shares(name)):
                label = None if place else "all in one text" if name is None else name
                figures.interval(ax, place + 0.15 * (i - len(self.skills) / 2), share, color=color, label=label)
        ax.set_xticks(range(len(self.strengths)), [_named(each).replace(", ", "\n") for each in self.strengths])
        ax.set(xlabel="directions that act", ylabel="share of texts", ylim=(-0.03, 1.03))
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(named))
        return ax

    def __repr__(self) -> str:
        lines = [f"share of {self.held.shape[-1]} texts in which each skill holds, and all do:"]
        for i, each in enumerate(self.strengths):
            shares = [f"{name} {self.shares(name)[i]}" for name in self.skills]
            lines.append(f"{_named(each)}: {', '.join(shares)}, all {self.shares()[i]}")
        return figures.screenful(lines)


def skill_shares(
    reft: ReFT,
    model: Bridge,
    skills: Skills,
    prompts: Sequence[Prompt],
    holds: Mapping[str, Callable[[str], bool]],
    *,
    strengths: Sequence[Strengths] | None = None,
    decoding: Decoding = Decoding(),
    chat: bool = False,
    progress: bool = False,
) -> SkillShares:
    """Write with each choice of directions, and say of every text which skills hold in it.

    Args:
        holds: for each skill, whether it holds in a text.
        strengths: as `Skills.variant` takes them by name; by default none, each skill alone, all, all at half
            strength, and all with one of them negated.

    Raises:
        ValueError: where `holds` does not name the skills, or there is no prompt.
    """
    names = tuple(skills.directions)
    if set(holds) != set(names) or not prompts:
        raise ValueError(f"holds of {sorted(holds)} and {len(prompts)} prompts, expected {sorted(names)}, and prompts")
    chosen = _usual(names) if strengths is None else tuple(strengths)
    variants = [skills.variant(each) for each in chosen]
    written = generate(reft, model, prompts, decoding, chat=chat, variant=variants, progress=progress)
    texts = tuple(tuple(each.texts) for each in written)
    held = torch.tensor([[[bool(holds[name](text)) for text in each] for name in names] for each in texts])
    return SkillShares(names, chosen, texts, held)


def _usual(names: Sequence[str]) -> tuple[Strengths, ...]:
    every = dict.fromkeys(names, 1.0)
    alone = [{name: 1.0} for name in names]
    return ({}, *alone, every, dict.fromkeys(names, 0.5), *({**every, name: -1.0} for name in names))


def _named(strengths: Strengths) -> str:
    """The choice as a reader sees it: "emoji, 0.5 greeting"."""
    return ", ".join(name if s == 1 else f"{s:g} {name}" for name, s in strengths.items()) or "none"
