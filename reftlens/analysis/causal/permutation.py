"""Permutation p: do held-out answers shuffled among pairs score as high?"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import plans_of
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.numbers import seeded, whole
from reftlens.scoring.answers import answers, first_targets
from reftlens.text.batch import Batch

_TOGETHER = 1000  # shuffles that are scored at once
CANNOT = (
    "no shuffle can change an answer: pairs with equal own answers all have one label; sample some that change the "
    "answer and some that do not (task.pairs(…, changed=0.5))"
)


def movable(labels: Int[Tensor, " pair"], strata: Int[Tensor, " pair"] | None) -> bool:
    """Whether some stratum has different labels, so that shuffling within strata can change anything."""
    groups = torch.zeros_like(labels) if strata is None else strata
    return any(len(labels[groups == group].unique()) > 1 for group in groups.unique())


def shuffled_p(
    gained: Float[Tensor, "pair classes"],
    labels: Int[Tensor, " pair"],
    strata: Int[Tensor, " pair"] | None,
    shuffles: int,
    seed: int,
) -> float:
    """Permutation p of `mean(gained[pair, label])`, labels shuffled among pairs of the same stratum."""
    shuffles = whole(shuffles, "shuffles", 1, hint=" (999 for a p of 0.001)")
    generator = seeded(seed)
    groups = torch.zeros_like(labels) if strata is None else strata
    rows, reached = torch.arange(len(labels)), 0
    scored = gained.double()
    observed = scored[rows, labels].mean()
    slots = torch.argsort(groups, stable=True)
    for start in range(0, shuffles, _TOGETHER):
        count = min(_TOGETHER, shuffles - start)
        drawn = torch.rand(count, len(labels), generator=generator, dtype=torch.float64).argsort(dim=1)
        by_stratum = drawn.gather(1, groups[drawn].argsort(dim=1, stable=True))
        shuffled = torch.empty_like(drawn)
        shuffled[:, slots] = labels[by_stratum]
        reached += int((scored[rows, shuffled].mean(dim=1) >= observed - 1e-12).sum())
    return (1 + reached) / (1 + shuffles)


def permutation_p(
    reft: ReFT,
    model: Bridge,
    test: Batch,
    *,
    base: Batch | None = None,
    shuffles: int = 999,
    seed: int = 0,
    reuse: bool | Reuse = True,
) -> float:
    """The permutation p of `controls` alone: held-out answers shuffled among pairs, the subspace fixed.

    Raises:
        ValueError: where no shuffle can change an answer; with `base`, where pairs of equal own answers have one each.
    """
    labels, strata = first_targets(test), None if base is None else first_targets(base)
    if not movable(labels, strata):
        raise ValueError(CANNOT)
    classes = labels.unique()
    plans = plans_of(reft, {"unedited": Variant(strength=0.0), "edited": Variant()})
    scores = answers(model, test, plans, classes.expand(len(test), -1), reuse=Reuse.of(reuse), progress=False)
    gained = scores.log_probs[1] - scores.log_probs[0]
    return shuffled_p(gained, torch.searchsorted(classes, labels), strata, shuffles, seed)
