"""Held-out loss and accuracy of a `ReFT`, per example, the unedited model beside the edited one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens import figures
from reftlens.data import Batch
from reftlens.engine import attached, check_fired, forward
from reftlens.model import Bridge, check_deterministic, device_of
from reftlens.objectives import Objective, cross_entropy
from reftlens.reft import Bound, ReFT, Variant, mode

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
    variant: Variant = Variant(),  # noqa: B008
    objective: Objective = cross_entropy,
    batch_size: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Loss and accuracy on `data` without and with the edit, dropout off."""
    check_deterministic(model)
    bound = reft.to(device_of(model)).bind(model)
    empty = (~data.target_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row(s) {empty[:10]} have no target: nothing to score there")
    bound.require(data.view, variant)
    columns: list[list[float]] = [[], [], [], []]
    with tqdm(total=len(data), desc="evaluate", unit="example", disable=not progress) as bar:
        for batch in _pieces(data, batch_size, device_of(model)):
            for column, use in ((0, None), (1, variant)):
                with mode(reft, training=False), torch.no_grad():
                    logits = _target_logits(bound, model, batch, use)
                    columns[column] += _per_example(objective(logits, batch), batch)
                hits = (logits.argmax(dim=-1) == batch.target_ids).float()
                columns[column + 2] += _per_example(hits, batch)
            bar.update(len(batch))
    return Evaluation(*(tuple(c) for c in columns))


@torch.no_grad()
def mean_loss(bound: Bound, model: Bridge, data: Batch, objective: Objective, *, batch_size: int) -> float:
    """Mean loss per target of the edited model, dropout off."""
    total, weight = 0.0, 0
    with mode(bound.reft, training=False):
        for batch in _pieces(data, batch_size, device_of(model)):
            losses = objective(_target_logits(bound, model, batch, Variant()), batch)
            total, weight = total + losses.sum().item(), weight + losses.numel()
    return total / weight


def _pieces(data: Batch, size: int, device: torch.device) -> Iterator[Batch]:
    for start in range(0, len(data), size):
        yield data[start : start + size].to(device)


def _target_logits(
    bound: Bound, model: Bridge, batch: Batch, variant: Variant | None
) -> Float[Tensor, "targets vocab"]:
    edits = [] if variant is None else bound.edits(batch.view, variant)
    with attached(edits):
        logits = forward(model, batch.tokens, batch.attention_mask).logits
    check_fired(edits)
    return logits[batch.predicting]


def _per_example(values: Float[Tensor, " n"], batch: Batch) -> list[float]:
    """Mean of per-target values within each example; values that are per example already stay."""
    if len(values) == len(batch) != len(batch.target_rows):
        return values.tolist()
    sums = torch.zeros(len(batch), device=values.device, dtype=values.dtype).index_add(0, batch.target_rows, values)
    return (sums / batch.target_mask.sum(dim=1)).tolist()
