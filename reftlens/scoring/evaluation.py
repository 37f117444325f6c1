"""Held-out loss and accuracy of a `ReFT`, per example, the unedited model beside the edited one."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens import figures
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.cone.plans import Job, Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import ReFT, Variant, check_asked, mode
from reftlens.scoring.objectives import Objective, cross_entropy
from reftlens.text.batch import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True)
class Evaluation:
    """One entry per example, for the unedited model (`base`) and the edited one.

    Loss is the mean over the example's targets (nats, for cross-entropy); accuracy is the share of its targets
    that are the most likely token.
    """

    base_loss: tuple[float, ...]
    loss: tuple[float, ...]
    base_accuracy: tuple[float, ...]
    accuracy: tuple[float, ...]

    def to_frame(self) -> "DataFrame":
        """One row per example."""
        import pandas as pd

        columns = ("base_loss", "loss", "base_accuracy", "accuracy")
        return pd.DataFrame({c: getattr(self, c) for c in columns}).rename_axis("example")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Loss of each example, edited over unedited; below the diagonal the edit helps."""
        ax = figures.axes(ax, width=4.2, height=4.0)
        high = 1.05 * max(*self.base_loss, *self.loss)
        ax.plot([0, high], [0, high], color=figures.GREY, linewidth=1, linestyle="--", label="no change")
        ax.scatter(self.base_loss, self.loss, color=figures.BLUE, s=18, label="example")
        ax.set(xlabel="loss, unedited (nats per token)", ylabel="loss, edited (nats per token)")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        def mean(values: tuple[float, ...]) -> float:
            return sum(values) / len(values)

        return (
            f"{len(self.loss)} examples: loss {mean(self.base_loss):.4f} → {mean(self.loss):.4f}, "
            f"token accuracy {mean(self.base_accuracy):.3f} → {mean(self.accuracy):.3f} (unedited → edited)"
        )


def evaluate(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    variant: Variant = Variant(),
    objective: Objective = cross_entropy,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Evaluation:
    """Loss and accuracy on `data` without and with the edit, dropout off."""
    check_asked(reft, model, data)
    check_deterministic(model)
    bound = reft.to(device_of(model)).bind(model)
    data.require_targets()
    bound.require(data.view, variant)
    plans = [Plan(bound, replace(variant, strength=0.0)), Plan(bound, variant)]
    scorer = Scorer(model, data, plans, Reuse.of(reuse), uses=1)
    columns: list[list[float]] = [[], [], [], []]
    with (
        tqdm(total=len(data), desc="evaluate", unit="example", disable=not progress) as bar,
        mode(reft, training=False),
        torch.no_grad(),
    ):
        for rows in pieces(len(data), batch_size):
            for column in (0, 1):
                ((scored,),) = scorer.groups([Job(column, rows)])
                columns[column] += per_example(objective(scored.logits, scored.batch), scored.batch)
                hits = (scored.logits.argmax(dim=-1) == scored.batch.target_ids).float()
                columns[column + 2] += per_example(hits, scored.batch)
            bar.update(len(rows))
    return Evaluation(*(tuple(c) for c in columns))


@torch.no_grad()
def mean_loss(scorer: Scorer, plan: int, objective: Objective, *, batch_size: int) -> float:
    """Mean loss per target of the model edited as one of the scorer's plans says, dropout off."""
    total, weight = 0.0, 0
    with mode(scorer.plans[plan].bound.reft, training=False):
        for rows in pieces(len(scorer.data), batch_size):
            for (scored,) in scorer.groups([Job(plan, rows)]):
                losses = objective(scored.logits, scored.batch)
                total, weight = total + losses.sum().item(), weight + losses.numel()
    return total / weight


def pieces(count: int, size: int) -> list[tuple[int, ...]]:
    """The numbers below `count`, `size` at a time."""
    if size < 1:
        raise ValueError(f"batch_size={size}, expected 1 or more")
    return [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]


def per_example(values: Float[Tensor, " n"], batch: Batch) -> list[float]:
    """Mean of per-target values within each example; values that are per example already stay."""
    if len(values) == len(batch) != len(batch.target_rows):
        return values.tolist()
    sums = torch.zeros(len(batch), device=values.device, dtype=values.dtype).index_add(0, batch.target_rows, values)
    return (sums / batch.target_mask.sum(dim=1)).tolist()
