"""Which heads and MLPs write into a learned subspace and which read from it, beside the chance level."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.subspaces.geometry import Chance, chance_overlap, columns_of, overlap_of, site_index, span
from reftlens.analysis.subspaces.readers import first_reader, gain_of, projection_at, stream_readers, weight_of
from reftlens.bridge.offload import numbers_of
from reftlens.bridge.protocol import Bridge, resolve_hook
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame

Role = Literal["writes", "reads"]


@dataclass(frozen=True)
class WeightShare:
    """One weight against the learned subspace."""

    weight: str
    """`blocks.3.attn.o.5` is head 5 of block 3; `embed` and `unembed` are what they say."""
    layer: int
    """Of its block; the unembedding comes after the last, the embeddings have -1."""
    part: str
    role: Role
    share: float
    """`‖BᵀW‖² / ‖W‖²`: how much of what it writes or reads lies in the subspace."""
    chance: Chance
    """`share` of random subspaces of this rank."""
    overlap: float
    """Mean squared principal cosine of subspace and column space; NaN where `W` has `d` columns or more."""
    overlap_chance: Chance


@dataclass(frozen=True)
class WeightOverlap:
    """All weights before a site that write to it, and all after it that read from it."""

    site: Site
    rank: int
    rows: tuple[WeightShare, ...]

    def __getitem__(self, weight: str) -> WeightShare:
        return self.rows[index_of([row.weight for row in self.rows], weight, "weight")]

    def to_frame(self) -> DataFrame:
        """One row per weight; `z` in standard deviations of random subspaces."""
        records = []
        for r in self.rows:
            chance = {"overlap_chance": r.overlap_chance.mean, "overlap_chance_sd": r.overlap_chance.spread}
            place = {"weight": r.weight, "layer": r.layer, "part": r.part, "role": r.role}
            records.append({**place, **r.chance.as_columns("share", r.share), "overlap": r.overlap, **chance})
        return figures.table(records, "weight")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of each weight over the layers; dashed: random subspaces, ± 2 deviations (the median weight's)."""
        ax = figures.axes(ax, width=7.0)
        level, spread = self.rows[0].chance.mean, median(r.chance.spread for r in self.rows)
        ax.axhspan(max(0.0, level - 2 * spread), level + 2 * spread, color=figures.GREY, alpha=0.2, linewidth=0)
        figures.level(ax, level, "chance (random subspaces)")
        markers = {"attention": "o", "MLP": "s", "embedding": "*", "unembedding": "*"}
        for role, colour in (("writes", figures.BLUE), ("reads", figures.ORANGE)):
            for part, marker in markers.items():
                shares = [(r.layer, r.share) for r in self.rows if (r.role, r.part) == (role, part)]
                if shares:
                    style = {"color": colour, "marker": marker, "alpha": 0.7, "label": f"{part} {role}"}
                    ax.scatter(*zip(*shares, strict=True), s=14, **style)
        ax.set(
            xlabel=f"layer (subspace at {figures.short(self.site)})",
            ylabel="share of the weight in the subspace",
            ylim=(0, None),
        )
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False, fontsize=7)
        return ax

    def __repr__(self) -> str:
        ordered = sorted(self.rows, key=lambda r: r.share, reverse=True)[:10]
        lines = [f"{r.weight} {r.role} {r.share:.3f} there (z = {r.chance.z(r.share):.1f})" for r in ordered]
        return "\n".join([f"{self.site}, rank {self.rank}: chance {self.rows[0].chance.mean:.3f}", *lines])


@torch.no_grad()
def weight_overlap(reft: ReFT, model: Bridge, *, site: Site | int | None = None) -> WeightOverlap:
    """How much of each weight lies in the subspace learned at a site of the residual stream, or written to it.

    A subspace of neurons or of z is taken to the residual stream by the output projection, `W_outᵀ B` or `W_Oᵀ B` of
    the site's heads, and compared there with that projection and with what reads what it adds.

    Writers, all before the site: attention heads and MLPs (through the norm after them, where there is one), the
    embeddings. Readers, all after it: q, k, v of each head, MLP in (gate and up), the unembedding, each with the gain
    (and centring) of its norm folded in. `share = ‖BᵀW‖² / ‖W‖²` is `rank / d` on average for random subspaces, with
    variance `2 rank (d - rank) / d · (tr G² - 1/d) / ((d - 1)(d + 2))`, `G = WWᵀ / ‖W‖²`. `overlap` is that of the
    spans, as in `overlap`. Weights only: what passes through them on data plays no part. All-zero weights are
    left out.

    Raises:
        ValueError: for a site that is neither part of the residual stream nor read by an output projection, or blocks
            whose weights are not known.
    """
    place = reft.sites[site_index(reft, site)]
    stream, projection = into_stream(model, place, reft[place].d)
    columns = columns_of(reft[place])
    basis = span(columns if projection is None else projection.T @ columns.cpu().double()).basis
    sides: tuple[tuple[Role, Iterator[tuple[str, Tensor]]], ...] = (
        ("writes", stream_writers(model, stream)),
        ("reads", stream_readers(model, stream)),
    )
    rows = [
        _share_of(name, role, weight, basis, int(model.cfg.n_layers))
        for role, weights in sides
        for name, weight in weights
        if bool(weight.any())
    ]
    return WeightOverlap(place, basis.shape[1], tuple(rows))


def into_stream(model: Bridge, site: Site, d: int) -> tuple[Site, Float[Tensor, "width d"] | None]:
    """Where what is edited at a site joins the residual stream, and the weight that takes its `d` dimensions there.

    The weight is None where the site is not behind an output projection. The gain of a norm between the two is
    multiplied in; its division by the length is left out, as it is not linear. float64 on the CPU.

    Raises:
        ValueError: for a site that is neither part of the stream nor read by an output projection, or of other width.
    """
    bridge: Any = model
    stream, matrix, projection = site, None, projection_at(model, site)
    if projection is not None:
        _, i, part, _ = projection[0].split(".")
        stream = Site(f"blocks.{i}.hook_{part}_out", site.positions)
        matrix = _past_norm(bridge.blocks[int(i)], part, projection[1])
    first_reader(model, stream)  # raises where the site is not part of the stream
    width = int(model.cfg.d_model) if matrix is None else len(matrix)
    if d != width:
        raise ValueError(f"the intervention at {site} has vectors of width {d}, and what reads them {width}")
    return stream, matrix


def stream_writers(model: Bridge, site: Site) -> Iterator[tuple[str, Float[Tensor, "d out"]]]:
    """What has written to the residual stream before `site`, head by head; columns are what it can write.

    At the output of an attention or MLP only that one. float64 on the CPU.
    """
    bridge: Any = model
    layer, attention = first_reader(model, site)
    hooks, point = model.hook_dict, resolve_hook(model, site.hook)
    for i in range(layer if attention else layer + 1):
        for name, component in (("attn", "hook_attn_out"), ("mlp", "hook_mlp_out")):
            if hooks.get(f"blocks.{i}.{component}") is point:
                yield from _output(bridge.blocks[i], i, name)
                return
    for name in ("embed", "pos_embed"):
        table = getattr(getattr(bridge, name, None), "weight", None)
        if isinstance(table, Tensor):
            yield name, numbers_of(table).T
    for i in range(layer if attention else layer + 1):
        yield from _output(bridge.blocks[i], i, "attn")
        if i < layer:
            yield from _output(bridge.blocks[i], i, "mlp")


def _output(block: Any, i: int, part: str) -> Iterator[tuple[str, Float[Tensor, "d out"]]]:
    """What attention or the MLP of a block adds, through the gain of a norm behind it."""
    rows = weight_of(block, f"blocks.{i}.{part}", "W_O" if part == "attn" else "W_out")
    rows = _past_norm(block, part, rows)
    if part == "mlp":
        yield f"blocks.{i}.mlp.out", rows.T
    else:
        for head, matrix in enumerate(rows):
            yield f"blocks.{i}.attn.o.{head}", matrix.T


def _past_norm(block: Any, part: str, rows: Float[Tensor, "*width d"]) -> Float[Tensor, "*width d"]:
    """What attention or the MLP adds, through the gain of the norm behind it, where there is one."""
    norm = getattr(block, "ln1_post" if part == "attn" else "ln2_post", None)
    return rows if norm is None else rows * gain_of(norm)


def _share_of(name: str, role: Role, weight: Tensor, basis: Float[Tensor, "d rank"], depth: int) -> WeightShare:
    d, rank = basis.shape
    size = weight.square().sum()
    share = ((basis.T @ weight).square().sum() / size).item()
    gram = weight.T @ weight if weight.shape[1] < d else weight @ weight.T
    uneven = max(0.0, (gram / size).square().sum().item() - 1 / d)
    spread = math.sqrt(2 * rank * (d - rank) / d * uneven / ((d - 1) * (d + 2)))
    overlap, chance = math.nan, Chance(1.0, 0.0)
    if weight.shape[1] < d:
        theirs = span(weight, name=name)
        overlap, chance = overlap_of(span(basis), theirs), chance_overlap(d, rank, theirs.rank)
    block = re.match(r"blocks\.(\d+)\.(attn|mlp)", name)
    if block:
        layer, part = int(block[1]), {"attn": "attention", "mlp": "MLP"}[block[2]]
    else:
        layer, part = (depth, "unembedding") if role == "reads" else (-1, "embedding")
    return WeightShare(name, layer, part, role, share, Chance(rank / d, spread), overlap, chance)
