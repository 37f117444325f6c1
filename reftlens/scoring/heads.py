"""Training of a head on the labels of rows, and what it says of them."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reftlens.bridge.protocol import Bridge, check_deterministic
from reftlens.bridge.trial import check_agrees
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.errors import check_finite
from reftlens.interventions.heads import Head
from reftlens.scoring.comparison import scored_batches
from reftlens.scoring.objectives import Objective, Predictions
from reftlens.text.batch import Batch

_READ = "head"


class HeadLoss(Objective):
    """Cross-entropy of the label of each row by the scores of a head, in nats; of one output the squared error.

    The head is that of the `ReFT` which is trained: each of several has its own. Rows are those of
    `rl.training.encode_labelled`; they need no targets, no logits are computed, and the model may be an encoder.

    Raises:
        ValueError: for a `ReFT` without a head, or with several.
    """

    logits: ClassVar[bool] = False
    per_target = True

    def __init__(self, reft: ReFT) -> None:
        site, head = head_of(reft)
        self.sites, self.outputs = {_READ: site}, head.outputs

    def losses(self, predictions: Predictions) -> Float[Tensor, " rows"]:
        assert predictions.reft is not None
        head = head_of(predictions.reft)[1]
        scores = head.scores(_one_a_row(predictions.activations[_READ], predictions.activation_rows[_READ]))
        return label_losses(scores, predictions.batch)

    def check(self, data: Batch, name: str) -> None:
        """Raise `ValueError` for rows without a label, without an output for it, or with several tokens to read."""
        super().check(data, name)
        for row, example in enumerate(data.examples):
            label = example.label
            if label is None:
                raise ValueError(f"row {row} of {name} has no label: encode_labelled(model, texts, labels)")
            check_finite(torch.tensor(float(label)), f"the label of row {row} of {name}")
            if self.outputs > 1 and label not in range(self.outputs):
                raise ValueError(
                    f"the label of row {row} of {name} is {label}, and the head has outputs 0 to {self.outputs - 1}"
                )
        counts = self.sites[_READ].positions.mask(data.view).sum(dim=1)
        if (counts != 1).any():
            row = int((counts != 1).nonzero()[0])
            raise ValueError(
                f"the head at {self.sites[_READ]} reads {int(counts[row])} tokens of row {row}, expected 1"
            )


def label_losses(scores: Float[Tensor, "rows outputs"], batch: Batch) -> Float[Tensor, " rows"]:
    """Cross-entropy of the labels of the rows by their scores, in nats; of one output the squared error."""
    labels = torch.tensor([example.label for example in batch.examples], device=scores.device)
    if scores.shape[1] == 1:
        return (scores[:, 0] - labels.to(scores.dtype)).square()
    return F.cross_entropy(scores, labels.long(), reduction="none")


label_losses.per_target = True  # each comes from its own row


def head_of(reft: ReFT) -> tuple[Site, Head]:
    """The head of a `ReFT`, and where it reads; `ValueError` where there is none, or there are several."""
    heads = [(site, module) for site, module in reft.items() if isinstance(module, Head)]
    if len(heads) != 1:
        kinds = ", ".join(module.label for _, module in reft.items())
        raise ValueError(f"expected a ReFT with one Head, got {len(heads)} among {kinds}: {{site: Head(d, outputs=2)}}")
    return heads[0]


def head_scores(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    variant: Variant = Variant(),
    *,
    batch_size: int = 32,
    reuse: bool | Reuse = True,
    progress: bool = False,
) -> Float[Tensor, "rows outputs"]:
    """What the head of `reft` says of each row: a score for each label, before softmax, or one value. Dropout is off.

    Raises:
        ValueError: as `HeadLoss`.
    """
    check_types(reft, model, data)
    check_deterministic(model)
    check_agrees(model)
    site, head = head_of(reft)
    variant.require(reft.sites, data.view)
    scorer = Scorer(model, data, [Plan(reft, variant)], Reuse.of(reuse), uses=1, watched={_READ: site})
    found: dict[int, Tensor] = {}
    for scored in scored_batches(scorer, [0], batch_size=batch_size, describe="head", progress=progress, whole=False):
        rows = site.positions.mask(scored.batch.view).nonzero()[:, 0]
        with torch.no_grad():
            scores = head.eval().scores(_one_a_row(scored.activations[_READ], rows))
        found |= dict(zip(scored.job.rows, scores.cpu(), strict=True))
    table = torch.stack([found[row] for row in range(len(data))])
    check_finite(table, "the scores of the head", "lower the learning rate, or the strength")
    return table


def _one_a_row(h: Float[Tensor, "tokens d"], rows: Int[Tensor, " tokens"] | Sequence[int]) -> Float[Tensor, "tokens d"]:
    """The hidden states, of which each row has one."""
    if len(set(rows.tolist() if isinstance(rows, Tensor) else rows)) != len(h):
        raise ValueError(f"{len(h)} hidden states for {len(set(map(int, rows)))} rows, expected one for each")
    return h
