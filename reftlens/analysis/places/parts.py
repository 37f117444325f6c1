"""What each edited position, or each site, does alone and what is missing without it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.statistics import Estimate, difference_of, mean_of, sign_flip_tests
from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.editing.site import Where
from reftlens.scoring.responses import Responses, responses
from reftlens.text.batch import Batch
from reftlens.text.positions import All, Nth, Positions, Response, as_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class PartEffects:
    """Effect of a whole edit, of each of its parts alone, and of the edit with that part left out.

    An effect is the log-probability of the targets gained over the unedited model: the mean over an example's targets,
    then over the examples, in nats per target token. A row in which a part edits no token is not counted for it.
    """

    kind: str
    """`"position"` or `"site"`."""
    parts: tuple[str, ...]
    edited: Bool[Tensor, "part example"]
    """Rows in which the part edits a token."""
    whole: Float[Tensor, " example"]
    alone: Float[Tensor, "part example"]
    left_out: Float[Tensor, "part example"]
    unedited_accuracy: Float[Tensor, " example"]
    """Share of an example's targets that are the most likely token, here and below."""
    whole_accuracy: Float[Tensor, " example"]
    alone_accuracy: Float[Tensor, "part example"]
    left_out_accuracy: Float[Tensor, "part example"]
    seed: int = 0
    """Of the permutation tests."""

    def effect(self, part: str) -> Estimate:
        """Of the part alone."""
        rows = self._rows(part)
        return mean_of(self.alone[self.parts.index(part), rows])

    def effect_without(self, part: str) -> Estimate:
        """Of the edit with the part left out."""
        rows = self._rows(part)
        return mean_of(self.left_out[self.parts.index(part), rows])

    def lost_without(self, part: str) -> Estimate:
        """Effect of the whole edit less that with the part left out, paired."""
        rows = self._rows(part)
        return difference_of(self.whole[rows], self.left_out[self.parts.index(part), rows])

    def _rows(self, part: str) -> Bool[Tensor, " example"]:
        if part not in self.parts:
            raise ValueError(f"no {self.kind} {part!r}, there are: {', '.join(map(repr, self.parts))}")
        return self.edited[self.parts.index(part)]

    @cached_property
    def tests(self) -> tuple[Float[Tensor, "two part"], Float[Tensor, "two part"]]:
        """Sign-flip p of each part alone (first row) and of what is lost without it; then the same after Holm."""
        lost = self.whole - self.left_out
        rows = [v[i, self.edited[i]] for v in (self.alone, lost) for i in range(len(self.parts))]
        p, corrected = sign_flip_tests(rows, seed=self.seed)
        return p.view(2, -1), corrected.view(2, -1)

    def to_frame(self) -> "DataFrame":
        """One row per part: its rows `n`, effects with intervals, mean accuracies, sign-flip p and Holm's p."""
        import pandas as pd

        p, corrected = self.tests
        records = []
        for i, part in enumerate(self.parts):
            rows = self.edited[i]
            accuracies = {"unedited": self.unedited_accuracy, "alone": self.alone_accuracy[i],
                          "left_out": self.left_out_accuracy[i], "whole": self.whole_accuracy}  # fmt: skip
            records.append(
                {self.kind: part, "n": int(rows.sum()), **self.effect(part).as_columns("alone"),
                 **self.effect_without(part).as_columns("left_out"), **self.lost_without(part).as_columns("lost"),
                 **mean_of(self.whole[rows]).as_columns("whole"),
                 **{f"{name}_accuracy": v[rows].mean().item() for name, v in accuracies.items()},
                 "p_alone": p[0, i].item(), "p_alone_holm": corrected[0, i].item(),
                 "p_lost": p[1, i].item(), "p_lost_holm": corrected[1, i].item()}
            )  # fmt: skip
        return pd.DataFrame(records)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Each part alone and left out with 95 % intervals, beside the whole edit (dashed, band: its interval)."""
        ax = figures.axes(ax, width=max(4.0, 2.0 + 0.45 * len(self.parts)))
        whole = mean_of(self.whole)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.axhspan(whole.low, whole.high, color=figures.GREY, alpha=0.15, linewidth=0)
        ax.axhline(whole.value, color=figures.GREY, linestyle="--", linewidth=1, label="whole edit")
        ways = (("alone", self.effect, figures.BLUE, -0.1), ("left out", self.effect_without, figures.ORANGE, 0.1))
        for name, estimate, colour, shift in ways:
            for x, part in enumerate(self.parts):
                one, label = estimate(part), name if x == 0 else None
                bars = [[one.value - one.low], [one.high - one.value]]
                ax.errorbar(x + shift, one.value, bars, fmt="o", color=colour, markersize=4, label=label)
        turned = 0 if self.kind == "position" else 20
        names = list(map(figures.short, self.parts))
        ax.set_xticks(range(len(names)), names, rotation=turned, ha="right" if turned else "center")
        ax.set(xlabel=self.kind, ylabel="log-probability gained\n(nats per target token)")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        wide = max(len(p) for p in self.parts)
        lines = [f"whole edit {mean_of(self.whole)} nats per target token, {len(self.whole)} examples"]
        for part in self.parts:
            alone, rest, n = self.effect(part), self.effect_without(part), int(self._rows(part).sum())
            lines.append(f"{part:<{wide}}  alone {alone}, left out {rest} ({n} examples)")
        return "\n".join(lines)


def position_effects(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    positions: Mapping[str, Where] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> PartEffects:
    """The effect of the edit at each position alone, and with that position left out.

    Args:
        positions: `{label: positions}`. None: every edited prompt token, counted from the end of the prompt ("-1" is
            the last), and "response" for all edited tokens after it. Each costs two more passes over the data.
        seed: of the permutation tests.

    Raises:
        ValueError: if a row has no target, or nothing is edited at a position in any row.
    """
    chosen = edited_positions(reft, data) if positions is None else as_labelled(positions)
    parts = {label: (where, All() - where) for label, where in chosen.items()}
    whole = Variant(strength)
    pairs = {
        label: (narrowed(reft, data, whole, among), narrowed(reft, data, whole, rest))
        for label, (among, rest) in parts.items()
    }
    edited = torch.stack([touched(reft, data, Variant(among=among)) for among, _ in parts.values()])
    for label in [name for name, rows in zip(parts, edited, strict=True) if not rows.any()]:
        raise ValueError(f"position {label!r} ({chosen[label]}) holds no edited token in any of {len(data)} row(s)")
    plans = [(reft, whole), *((reft, variant) for pair in pairs.values() for variant in pair)]
    found = responses(model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe="effects")
    return _parts("position", tuple(parts), edited, found, seed)


def site_effects(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> PartEffects:
    """The effect of the edit at each site alone, and with that site left out. `seed`: of the permutation tests.

    Raises:
        ValueError: if a row has no target, or a site chooses no token in any row.
    """
    every = range(len(reft))
    alone = [Variant(strength, sites=(i,)) for i in every]
    without = [
        Variant(strength, sites=[j for j in every if j != i]) if len(reft) > 1 else Variant(strength=0.0) for i in every
    ]
    plans = [(reft, v) for v in (Variant(strength), *(v for pair in zip(alone, without, strict=True) for v in pair))]
    edited = torch.stack([touched(reft, data, variant) for variant in alone])
    found = responses(model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe="effects")
    return _parts("site", site_labels(reft), edited, found, seed)


def _parts(kind: str, parts: tuple[str, ...], edited: Tensor, found: Responses, seed: int) -> PartEffects:
    """From responses to the whole edit, then of each part alone and left out."""
    gained, accuracy = found.effect, found.accuracy
    return PartEffects(kind, parts, edited, gained[0], gained[1::2], gained[2::2], found.unedited_accuracy,
                       accuracy[0], accuracy[1::2], accuracy[2::2], seed)  # fmt: skip


def site_labels(reft: ReFT) -> tuple[str, ...]:
    """The hook of each site; with its positions and heads where two sites share a hook."""
    hooks = [site.hook for site in reft.sites]
    return tuple(site.hook if hooks.count(site.hook) == 1 else str(site) for site in reft.sites)


def as_labelled(positions: Mapping[str, Where]) -> dict[str, Positions]:
    """What `positions` spell, by label."""
    if not isinstance(positions, Mapping):
        raise TypeError(f"positions={positions!r}, expected {{label: positions}}")
    if not positions:
        raise ValueError("positions={}, expected {label: positions}, or None for every edited token")
    return {label: as_positions(where) for label, where in positions.items()}


def edited_positions(reft: ReFT, data: Batch) -> dict[str, Positions]:
    """Every prompt token that a site edits in some row, by its place from the end; and what is edited after it."""
    masks = [site.positions.mask(data.view) for site in reft.sites]
    edited, prompt = torch.stack(masks).any(dim=0), data.prompt_mask
    place = prompt.long().flip(1).cumsum(dim=1).flip(1)  # 1 for the last token of a prompt
    places = place[edited & prompt].unique().flip(0).tolist()
    found: dict[str, Positions] = {str(-k): Nth(-k, missing="skip") for k in places}
    if (edited & ~prompt).any():
        found["response"] = Response()
    if not found:
        raise ValueError(f"no site chooses a token in any of {len(data)} row(s)")
    return found


def touched(reft: ReFT, data: Batch, variant: Variant) -> Bool[Tensor, " example"]:
    """Rows in which a token is edited."""
    sites = range(len(reft)) if variant.sites is None else variant.sites
    masks = [variant.mask(reft.sites[i], data.view).any(dim=1) for i in sites]
    return torch.stack(masks).any(dim=0).cpu()


def narrowed(reft: ReFT, data: Batch, variant: Variant, among: Positions) -> Variant:
    """`variant` at the tokens of `among` only: those of its sites that keep a token; strength 0 where none does."""
    sites = range(len(reft)) if variant.sites is None else variant.sites
    fewer = replace(variant, among=among)
    kept = tuple(i for i in sites if fewer.mask(reft.sites[i], data.view).any())
    return replace(fewer, sites=kept) if kept else replace(variant, strength=0.0)
