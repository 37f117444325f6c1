"""How much text a constant in a subspace can hold: one edit at the last token of a prompt, and a text it is to give.

PyReFT's example of the power of ConsReFT (Wu et al. 2024, arXiv 2404.03592): by layer and by length of the text,
against the same tokens shuffled, which no knowledge of the language helps with.
"""

from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens import figures
from reftlens.bridge.protocol import Bridge
from reftlens.editing.engine import forward
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.site import resid_post
from reftlens.figures import Axes, DataFrame
from reftlens.interventions import ConsReFT
from reftlens.numbers import Integers, seeded, whole, whole_numbers
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode
from reftlens.text.template import Example
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit_many

PROMPT = "ALIC#ID1->"
SETTINGS = FitConfig(steps=1000, lr=4e-3, batch_size=1, schedule="linear")
"""Those of the example, at the length of its training."""
_TEXTS = ("text", "shuffled")


@dataclass(frozen=True, eq=False)
class Memorisation:
    """How many tokens were written verbatim, from the first one on."""

    layers: tuple[int, ...]
    lengths: tuple[int, ...]
    """Of the texts, in tokens."""
    recalled: Int[Tensor, "two layer length"]
    """Leading tokens that are right, in greedy writing; of the text, and of the shuffled one."""
    rank: int
    parameters: int
    """Numbers in each edit."""
    steps: int

    def longest(self, shuffled: bool = False) -> dict[int, int]:
        """By layer the longest text that was recalled whole; 0 where none was."""
        whole_texts = self.recalled[int(shuffled)] == torch.tensor(self.lengths)
        rows = zip(self.layers, whole_texts.tolist(), strict=True)
        return {at: max((n for n, all_ in zip(self.lengths, row, strict=True) if all_), default=0) for at, row in rows}

    def to_frame(self) -> DataFrame:
        """One row per kind of text, layer and length."""
        return figures.table(
            [
                {"text": text, "layer": layer, "length": length, "recalled": int(self.recalled[t, i, j])}
                for t, text in enumerate(_TEXTS)
                for i, layer in enumerate(self.layers)
                for j, length in enumerate(self.lengths)
            ]
        )

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """The longest text recalled whole over the layer; of the shuffled one dashed."""
        ax = figures.axes(ax)
        for text, style in ((0, "-"), (1, "--")):
            found = self.longest(shuffled=bool(text))
            name = figures.entry(ax, label, _TEXTS[text])
            line: Any = ax.plot(list(found), list(found.values()), style, marker="o", color=color, label=name)[0]
            color = line.get_color()
        ax.set(xlabel="block", ylabel="longest text recalled (tokens)", ylim=(0, None))
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        lines = [
            f"ConsReFT of rank {self.rank} at the last token of the prompt, {self.parameters} numbers, {self.steps} "
            f"steps; tokens recalled of texts of {', '.join(map(str, self.lengths))}, and of the same shuffled:"
        ]
        for i, layer in enumerate(self.layers):
            both = (" ".join(f"{n:>4}" for n in self.recalled[t, i].tolist()) for t in range(2))
            lines.append(f"block {layer:>2}: " + "   shuffled ".join(both))
        return figures.screenful(lines)


def memorisation(
    model: Bridge,
    text: str,
    *,
    layers: Integers,
    lengths: Integers,
    rank: SupportsIndex = 1,
    config: FitConfig = SETTINGS,
    prompt: str = PROMPT,
    seed: SupportsIndex = 0,
    progress: bool = True,
) -> Memorisation:
    """Train a ConsReFT for each block, length and text, those of all blocks in shared passes; count what each writes.

    Args:
        text: long enough for the longest of `lengths`, in tokens; it is cut behind each.

    Raises:
        ValueError: for a text that is too short, or no layer or length.
    """
    places = whole_numbers(layers, "layer")
    sizes = tuple(whole(size, "length", 1) for size in whole_numbers(lengths, "length"))
    if not places or not sizes:
        raise ValueError(f"layers={list(places)}, lengths={list(sizes)}: expected one or more of each")
    data = encode(model, [Example(prompt, text)], end=False, max_length=1 << 40)
    if int(data.target_mask.sum()) < max(sizes):
        raise ValueError(f"the text has {int(data.target_mask.sum())} tokens, expected {max(sizes)} or more")
    found = torch.zeros(2, len(places), len(sizes), dtype=torch.long)
    refts: dict[str, ReFT] = {}
    for j, size in enumerate(sizes):
        short = _first(data, size)
        for t, rows in enumerate((short, shuffled(short, seed))):
            refts = {f"block {i}": _edit(model, i, whole(rank, "rank", 1), seed) for i in places}
            fit_many(refts, model, rows, config.replace({"seed": whole(seed, "seed")}), progress=progress)
            found[t, :, j] = torch.tensor([recalled(reft, model, rows) for reft in refts.values()])
    size_of_one = next(iter(refts.values())).parameter_count(model).stored
    return Memorisation(places, sizes, found, whole(rank, "rank"), size_of_one, config.total_steps(1))


def recalled(reft: ReFT, model: Bridge, row: Batch) -> int:
    """How many of the targets of one row greedy writing gives, up to the first that it does not.

    That is told by one pass: as far as what was written is the text, the next token is chosen after the text.
    """
    with torch.no_grad(), training_mode(reft, training=False), reft.on(model, row):
        logits = forward(model, row.tokens, row.attention_mask)[row.predicting]
    return int((logits.argmax(dim=-1) == row.target_ids).long().cumprod(dim=0).sum())


def shuffled(row: Batch, seed: SupportsIndex = 0) -> Batch:
    """The same row with its targets in another order."""
    tokens, (at,) = row.tokens.clone(), row.target_mask[0].nonzero(as_tuple=True)
    tokens[0, at] = tokens[0, at[torch.randperm(len(at), generator=seeded(seed))]]
    return replace(row, tokens=tokens)


def _first(row: Batch, count: int) -> Batch:
    """The row up to so many targets."""
    last = int(row.target_mask[0].nonzero()[count - 1])
    return row.rearranged(lambda x: x[:, : last + 1])


def _edit(model: Bridge, layer: int, rank: int, seed: SupportsIndex) -> ReFT:
    return ReFT({resid_post(layer, "last"): ConsReFT(model.cfg.d_model, rank, generator=seeded(seed))})
