"""Held-out loss and accuracy of a `ReFT` per example, under any of its variants, the unedited model among them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.variant import Variant
from reftlens.errors import check_one_of
from reftlens.figures import Axes, DataFrame
from reftlens.numbers import whole
from reftlens.scoring.comparison import check_plans, per_example, scored_batches, scorer_of
from reftlens.scoring.criterion import Criterion
from reftlens.scoring.objectives import Loss, Objective, as_objective, cross_entropy
from reftlens.scoring.openness import Openness, openness_of
from reftlens.scoring.remembered import ScoreTable
from reftlens.scoring.statistics import Estimate, accuracy_of, mean_of
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Loss and accuracy of every example under every variant.

    Loss is the mean over the example's targets (nats, for cross-entropy); accuracy is the share of its targets
    that are the most likely token.
    """

    variants: tuple[Variant, ...]
    loss: Float[Tensor, "variant example"]
    accuracy: Float[Tensor, "variant example"]
    computation: str
    """What was computed for each variant, and what was reused; or why everything was computed."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""
    gates: tuple[Openness, ...] = ()
    """How far the gates of the edit, if it has any, are open under the last variant that edits."""
    group: int = 1
    """So many neighbouring examples belong together, as the two of a preference pair do: intervals are of groups."""

    def estimate(self, measure: str) -> list[Estimate]:
        """Mean `"loss"` or `"accuracy"` over examples under each variant, with its 95 % interval.

        Bootstrapped; of an accuracy that is 0 or 1 on every example, exact (Clopper-Pearson).
        """
        check_one_of("measure", measure, ("loss", "accuracy"))
        rows = (self.loss if measure == "loss" else self.accuracy).unflatten(1, (-1, self.group)).mean(dim=2)
        return [mean_of(row) if measure == "loss" else accuracy_of(row) for row in rows]

    def to_frame(self) -> DataFrame:
        """One row per variant and example."""
        settings = [
            {"variant": v, "strength": variant.strength, "among": str(variant.among or ""), "sites": variant.sites}
            for v, variant in enumerate(self.variants)
        ]
        numbers = zip(settings, self.loss.tolist(), self.accuracy.tolist(), strict=True)
        return figures.table(
            [
                setting | {"example": e, "loss": loss, "accuracy": accuracy}
                for setting, losses, accuracies in numbers
                for e, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
            ]
        )

    def by_variant(self) -> DataFrame:
        """One row per variant: mean loss and accuracy with their 95 % intervals over examples."""
        means = zip(self.variants, self.estimate("loss"), self.estimate("accuracy"), strict=True)
        rows = [{"variant": str(v)} | x.as_columns("loss") | y.as_columns("accuracy") for v, x, y in means]
        return figures.table(rows, "variant")

    def plot(
        self, ax: Axes | None = None, *, measure: str = "loss", label: str | None = None, color: str | None = None
    ) -> Axes:
        """Loss or accuracy of each example and their mean with its 95 % band.

        Over strength, where the variants differ in nothing else.

        Args:
            measure: "loss" or "accuracy".
            label: of this result where several are drawn on `ax`.
            color: likewise; by default the next of the colours of `ax`.
        """
        ax = figures.axes(ax)
        numbers = [v.strength for v in self.variants if isinstance(v.strength, float)]
        alone = len({(v.among, v.sites) for v in self.variants}) == 1 and len(set(numbers)) == len(self.variants)
        x = numbers if alone else list(range(len(self.variants)))
        order = sorted(range(len(x)), key=lambda i: x[i])
        across = [x[i] for i in order]
        estimates, examples = self.estimate(measure), self.loss if measure == "loss" else self.accuracy
        ax.plot(across, examples[order].tolist(), color=figures.GREY, linewidth=0.6, alpha=0.6)
        figures.curve(ax, across, [estimates[i] for i in order], label or "mean", color)
        loss, accuracy = f"loss per target token{self.among} (nats)", f"share of targets most likely{self.among}"
        ax.set(xlabel="strength" if alone else "variant", ylabel=loss if measure == "loss" else accuracy)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        count, groups = self.loss.shape[1], f" in groups of {self.group}" * (self.group > 1)
        lines = [f"{count} examples{groups}, mean loss and token accuracy{self.among}:"]
        means = zip(self.variants, self.estimate("loss"), self.estimate("accuracy"), strict=True)
        lines += [f"{variant}: loss {loss:.4f}, accuracy {accuracy:.3f}" for variant, loss, accuracy in means]
        lines += map(str, self.gates)
        return figures.screenful(lines)


def evaluate(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    variants: Iterable[Variant | SupportsFloat] = (0, 1),
    *,
    objective: Objective | Loss = cross_entropy,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Evaluation:
    """Loss and accuracy on `data` under each of `variants`, dropout off; a number is a strength, 0 the unedited model.

    Raises:
        ValueError: where there is no variant, a row has no target, or a variant chooses no token in any row.
    """
    check_types(reft, model, data)
    if not isinstance(variants, Iterable):
        raise TypeError(f"variants={variants!r}, expected a list of strengths or Variants, such as [0, 0.5, 1]")
    all_variants = tuple(v if isinstance(v, Variant) else Variant(strength=v) for v in variants)
    if not all_variants:
        raise ValueError("no variants: give strengths, or Variant(…)s")
    plans = [Plan(reft, variant) for variant in all_variants]
    size = whole(batch_size, "batch_size", 1)
    settings: dict[str, Any] = dict(batch_size=size, describe="evaluate", progress=progress)
    losses = losses_of(model, data, plans, objective, Reuse.of(reuse), **settings)
    edited = [variant for variant in all_variants if variant.strength != 0.0]
    gates = openness_of(reft, model, data, edited[-1], batch_size=size) if edited else []
    return Evaluation(all_variants, *losses, data.among, tuple(gates), as_objective(objective).group)


def losses_of(
    model: Bridge,
    data: Batch,
    plans: Sequence[Plan],
    objective: Objective | Loss,
    reuse: Reuse | None,
    *,
    batch_size: int,
    describe: str,
    progress: bool,
) -> tuple[Float[Tensor, "plan example"], Float[Tensor, "plan example"], str]:
    """Loss and accuracy of every example under every plan, and how they were computed.

    Cross-entropy of an earlier call is read; of other objectives it is not known what they look at.
    """
    check_plans(model, data, plans)
    table = ScoreTable(model, data, plans, reuse, "cross entropy" if objective is cross_entropy else "")
    missing = {p: rows for p, rows in enumerate(table.missing()) if rows}
    scorer, numbers = None, list(missing)
    if missing:
        objective = as_objective(objective)
        scorer = scorer_of(model, data, [plans[p] for p in numbers], reuse, objective.sites)
        criterion = Criterion(objective, scorer, batch_size)
        settings: dict[str, Any] = dict(describe=describe, progress=progress, batch_size=batch_size * objective.group)
        settings |= {"rows": list(missing.values()), "whole": not objective.per_target}
        for scored in scored_batches(scorer, range(len(numbers)), **settings):
            right = (scored.logits.argmax(dim=-1) == scored.batch.target_ids).double()
            losses = criterion(replace(scored, logits=scored.logits.detach()))
            both = per_example(losses, scored.batch, objective.group), per_example(right, scored.batch)
            table.put(numbers[scored.job.plan], scored.job.rows, torch.stack(both))
        table.keep(scorer)
    loss, accuracy = table.table()
    return loss, accuracy, table.computation(scorer)


@torch.no_grad()
def summed_loss(
    scorer: Scorer, criterion: Criterion, *, batch_size: int, part: slice = slice(None)
) -> tuple[float, int]:
    """Sum of the losses under the plans of the criterion, and their number; the same at every call, dropout off.

    Args:
        part: of the rows under each plan.
    """
    total, weight, whole = 0.0, 0, not criterion.objective.per_target
    plans = criterion.drawn(range(len(scorer.data)), torch.Generator().manual_seed(0))
    rows = [own[part] for own in plans.values()]
    settings: dict[str, Any] = {"batch_size": batch_size * criterion.objective.group, "rows": rows}
    for scored in scored_batches(scorer, list(plans), **settings, whole=whole):
        values = criterion(scored)
        total, weight = total + values.sum().item(), weight + values.numel()
    return total, weight
