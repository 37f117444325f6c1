"""The one runner of the analyses: a data set under many plans, each beside the unedited model, batch by batch."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.cone.plans import Job, Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import ReFT, Variant, check_asked, mode
from reftlens.scoring.evaluation import pieces
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Compared:
    """Some rows under one plan."""

    plan: int
    rows: tuple[int, ...]
    batch: Batch
    """The rows; `batch.target_rows` tells which row each target belongs to, `batch.target_ids` what it is."""
    logits: Float[Tensor, "targets vocab"]
    """Edited."""
    unedited: Float[Tensor, "targets vocab"]


class Comparison:
    """Iterating gives every batch of rows under every plan `(intervention, variant)`, dropout off, no gradients.

    Plans share what is frozen and each pass through the model; the unedited model is computed once per batch. Under a
    variant of strength 0 its logits are given again.

    Raises:
        ValueError: where there is no plan, a row has no target, or a variant chooses no token in any row.
    """

    def __init__(
        self,
        model: Bridge,
        data: Batch,
        plans: Sequence[tuple[ReFT, Variant]],
        *,
        batch_size: int = 16,
        reuse: bool | Reuse = True,
        progress: bool = True,
        describe: str = "scores",
    ) -> None:
        if not plans:
            raise ValueError("no plans: give one (intervention, variant) or more")
        for reft, _ in plans:
            check_asked(reft, model, data)
        check_deterministic(model)
        data.require_targets()
        self.data, self.batch_size, self.progress, self.describe = data, batch_size, progress, describe
        self.refts = list({id(reft): reft.to(device_of(model)) for reft, _ in plans}.values())
        bound = {id(reft): reft.bind(model) for reft in self.refts}
        for reft, variant in plans:
            bound[id(reft)].require(data.view, variant)
        self.plans = [Plan(bound[id(reft)], variant) for reft, variant in plans]
        self.idle = [i for i, (_, variant) in enumerate(plans) if variant.strength == 0.0]
        unedited = replace(self.plans[0], variant=replace(plans[0][1], strength=0.0))
        self.scorer = Scorer(model, data, [*self.plans, unedited], Reuse.of(reuse), uses=1)

    @property
    def computation(self) -> str:
        """What was computed, and what was reused; or why everything was computed."""
        return self.scorer.said

    def __iter__(self) -> Iterator[Compared]:
        active = [i for i in range(len(self.plans)) if i not in self.idle]
        total = len(self.data) * len(self.plans)
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=total, desc=self.describe, unit="example", disable=not self.progress))
            for reft in self.refts:
                stack.enter_context(mode(reft, training=False))
            for rows in pieces(len(self.data), self.batch_size):
                found = self._batch(rows, active)
                while True:
                    with torch.no_grad():  # left while the caller computes with what was found
                        one = next(found, None)
                    if one is None:
                        break
                    yield one
                    bar.update(len(rows))

    def _batch(self, rows: tuple[int, ...], active: list[int]) -> Iterator[Compared]:
        ((unedited,),) = self.scorer.groups([Job(len(self.plans), rows)])
        for i in self.idle:
            yield Compared(i, rows, unedited.batch, unedited.logits, unedited.logits)
        for group in self.scorer.groups([Job(i, rows) for i in active]) if active else ():
            for scored in group:
                yield Compared(scored.job.plan, rows, scored.batch, scored.logits, unedited.logits)
