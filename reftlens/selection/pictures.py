"""A search in pictures: score against cost, and the best score at each place."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import torch

from reftlens import figures
from reftlens.analysis.strength.curves import not_dominated
from reftlens.figures import Axes
from reftlens.selection.space import Candidate
from reftlens.selection.trials import Setting, Trial


def frontier(settings: Sequence[Setting], unedited: float, label: str, ax: Axes | None) -> Axes:
    """Score over KL of every setting at every strength; undominated ones joined, the recommended one orange."""
    ax = figures.axes(ax)
    kl, score = [s.kl for s in settings], [s.score for s in settings]
    figures.level(ax, unedited, "unedited model")
    ax.plot(kl, score, "o", color=figures.GREY, markersize=4, alpha=0.6, label="setting and strength")
    best = not_dominated(torch.tensor([[k, -s] for k, s in zip(kl, score, strict=True)], dtype=torch.float64))
    edge = sorted((k, s) for k, s, good in zip(kl, score, best.tolist(), strict=True) if good)
    ax.plot(
        *zip(*edge, strict=True), color=figures.BLUE, marker="o", markersize=4, label="no other is better and cheaper"
    )
    chosen = next(setting for setting in settings if setting.chosen)
    ax.plot([chosen.kl], [chosen.score], "*", color=figures.ORANGE, markersize=13, label="recommended")
    ax.set(xlabel="KL from the unedited model (nats per token, dev)", ylabel=fill(label, 40))
    ax.legend(frameon=False)
    return ax


def place_map(trials: Sequence[Trial], chosen: Candidate, label: str, ax: Axes | None) -> Axes:
    """Best score of any candidate at each layer and hook (rows) and positions (columns), all at equal steps."""
    steps, best = min(trial.steps for trial in trials), dict[tuple[str, str], float]()
    for trial in (t for t in trials if t.steps == steps and t.within):
        best[_cell(trial.candidate)] = max(best.get(_cell(trial.candidate), -torch.inf), trial.score)
    cells = [_cell(candidate) for candidate in sorted(dict.fromkeys(t.candidate for t in trials), key=_order)]
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    table = torch.tensor([[best.get((r, c), torch.nan) for c in columns] for r in rows])
    ax = figures.axes(ax, width=3.0 + 0.6 * len(columns), height=2.4 + 0.22 * len(rows))
    image = ax.imshow(table, origin="lower", aspect="auto", cmap="viridis")
    figures.colour_bar(ax, image, fill(f"{label}, after {steps} steps", 28))
    row, column = _cell(chosen)
    ax.plot(columns.index(column), rows.index(row), "*", color=figures.ORANGE, markersize=13)
    ax.set_xticks(range(len(columns)), list(map(figures.short, columns)), rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel="positions", ylabel="layer and hook")
    ax.grid(visible=False)
    return ax


def _cell(candidate: Candidate) -> tuple[str, str]:
    axes = candidate.axes
    return f"{axes['layer']} {axes['hook'].removeprefix('hook_')}", axes["positions"]


def _order(candidate: Candidate) -> tuple[Any, ...]:
    """By hook, then layer, several together last."""
    layer, hook, positions = (candidate.axes[name] for name in ("layer", "hook", "positions"))
    return hook, len(candidate.sites), layer if isinstance(layer, int) else -1, positions
