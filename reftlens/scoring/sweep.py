"""One data set under many variants of one intervention: strengths, tokens, sites; the frozen part computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat

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
from reftlens.scoring.evaluation import per_example, pieces
from reftlens.scoring.objectives import Objective, cross_entropy
from reftlens.text.batch import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Sweep:
    """Loss and accuracy of every example under every variant.

    Loss is the mean over the example's targets (nats, for cross-entropy); accuracy is the share of its targets
    that are the most likely token.
    """

    variants: tuple[Variant, ...]
    loss: Float[Tensor, "variant example"]
    accuracy: Float[Tensor, "variant example"]
    computation: str
    """What was computed for each variant, and what was reused; or why everything was computed."""

    def to_frame(self) -> "DataFrame":
        """Tidy: one row per variant and example."""
        import pandas as pd

        records = [
            {
                "variant": v, "strength": variant.strength, "among": str(variant.among or ""), "sites": variant.sites,
                "example": e, "loss": self.loss[v, e].item(), "accuracy": self.accuracy[v, e].item(),
            }
            for v, variant in enumerate(self.variants)
            for e in range(self.loss.shape[1])
        ]  # fmt: skip
        return pd.DataFrame(records)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Loss of each example and their mean; over strength, where the variants differ in nothing else."""
        ax = figures.axes(ax)
        numbers = [v.strength for v in self.variants if isinstance(v.strength, float)]
        alone = len({(v.among, v.sites) for v in self.variants}) == 1 and len(set(numbers)) == len(self.variants)
        x = numbers if alone else list(range(len(self.variants)))
        order = sorted(range(len(x)), key=lambda i: x[i])
        across = [x[i] for i in order]
        ax.plot(across, self.loss[order].tolist(), color=figures.GREY, linewidth=0.6, alpha=0.6)
        ax.plot(across, self.loss[order].mean(dim=1).tolist(), color=figures.BLUE, marker="o", label="mean")
        ax.set(xlabel="strength" if alone else "variant", ylabel="loss per target token (nats)")
        ax.legend(frameon=False)
        return ax


def sweep(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    variants: Sequence[Variant | SupportsFloat],
    *,
    objective: Objective = cross_entropy,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Sweep:
    """Score `data` under each of `variants` (a number is a strength), dropout off.

    Raises:
        ValueError: where there is no variant, a row has no target, or a variant chooses no token in any row.
    """
    check_asked(reft, model, data)
    check_deterministic(model)
    chosen = tuple(v if isinstance(v, Variant) else Variant(strength=v) for v in variants)
    if not chosen:
        raise ValueError("no variants: give strengths, or Variant(…)s")
    bound = reft.to(device_of(model)).bind(model)
    data.require_targets()
    for variant in chosen:
        bound.require(data.view, variant)
    scorer = Scorer(model, data, [Plan(bound, variant) for variant in chosen], Reuse.of(reuse), uses=1)
    loss, accuracy = torch.zeros(len(chosen), len(data)), torch.zeros(len(chosen), len(data))
    total = len(data) * len(chosen)
    with (
        tqdm(total=total, desc="sweep", unit="example", disable=not progress) as bar,
        mode(reft, training=False),
        torch.no_grad(),
    ):
        for rows in pieces(len(data), batch_size):
            for group in scorer.groups([Job(i, rows) for i in range(len(chosen))]):
                for scored in group:
                    i, hits = scored.job.plan, scored.logits.argmax(dim=-1) == scored.batch.target_ids
                    losses = per_example(objective(scored.logits, scored.batch), scored.batch)
                    loss[i, list(rows)] = torch.tensor(losses)
                    accuracy[i, list(rows)] = torch.tensor(per_example(hits.float(), scored.batch))
                    bar.update(len(rows))
    return Sweep(chosen, loss, accuracy, scorer.said)
