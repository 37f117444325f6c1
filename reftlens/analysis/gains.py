"""What edits gain at the targets, example by example: the measure of effects, interactions and composition."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reftlens.analysis.compared import Comparison
from reftlens.data import Batch
from reftlens.evaluate import per_example
from reftlens.model import Bridge
from reftlens.positions import Positions
from reftlens.reft import ReFT, Variant
from reftlens.reuse import Reuse


@dataclass(frozen=True, eq=False)
class Gains:
    """For each plan `(intervention, variant)` and example."""

    gained: Float[Tensor, "plan example"]
    """Log-probability of the targets, edited less unedited, mean over an example's targets: nats per target token."""
    accuracy: Float[Tensor, "plan example"]
    """Share of the example's targets that are the most likely token."""
    unedited_accuracy: Float[Tensor, " example"]


def gains(
    model: Bridge,
    data: Batch,
    plans: Sequence[tuple[ReFT, Variant]],
    *,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
    describe: str = "effects",
) -> Gains:
    """Score `data` under each plan, dropout off. A plan takes those sources of `data` that its sites exchange.

    Plans that take the same sources share one `Comparison`.

    Raises:
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """
    gained, accuracy = (torch.zeros(len(plans), len(data), dtype=torch.float64) for _ in range(2))
    unedited = torch.zeros(len(data), dtype=torch.float64)
    for names, mine in _by_sources(plans, data).items():
        own = replace(data, sources={name: data.sources[name] for name in names})
        some = [plans[i] for i in mine]
        compared = Comparison(
            model, own, some, batch_size=batch_size, reuse=reuse, progress=progress, describe=describe
        )
        known, base = None, torch.zeros(2, 0)
        for one in compared:
            if one.unedited is not known:  # the same for all plans of a batch
                known, base = one.unedited, _scored(one.unedited, one.batch.target_ids)
            mine_here, rows = mine[one.plan], list(one.rows)
            scored = _scored(one.logits, one.batch.target_ids)
            gained[mine_here, rows] = _means(scored[0] - base[0], one.batch)
            accuracy[mine_here, rows] = _means(scored[1], one.batch)
            unedited[rows] = _means(base[1], one.batch)
    return Gains(gained, accuracy, unedited)


def _scored(logits: Float[Tensor, "targets vocab"], ids: Int[Tensor, " targets"]) -> Float[Tensor, "two targets"]:
    """Log-probability of each target, and whether it is the most likely token; float64, some rows at a time."""
    pieces = zip(logits.split(64), ids.split(64), strict=True)
    log_probs = [-F.cross_entropy(some.double(), wanted, reduction="none") for some, wanted in pieces]
    return torch.stack([torch.cat(log_probs), (logits.argmax(dim=-1) == ids).double()])


def _means(values: Float[Tensor, " targets"], batch: Batch) -> Float[Tensor, " row"]:
    return torch.tensor(per_example(values, batch), dtype=torch.float64)


def _by_sources(plans: Sequence[tuple[ReFT, Variant]], data: Batch) -> dict[tuple[str, ...], list[int]]:
    """Indices of the plans, by the names of the sources that they take: what they exchange, and what none does.

    The latter, like a name that the data lacks, is refused where sources are read.
    """
    taken = [
        {name for i in range(len(reft)) if variant.sites is None or i in variant.sites for name in reft[i].variables}
        for reft, variant in plans
    ]
    stray = set(data.sources).difference(*taken)
    groups: dict[tuple[str, ...], list[int]] = {}
    for plan, names in enumerate(taken):
        groups.setdefault(tuple(sorted(set(data.sources) & (names | stray))), []).append(plan)
    return groups or {(): []}


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
