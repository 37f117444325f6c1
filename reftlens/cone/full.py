"""The full computation: the whole model for every job."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from reftlens.bridge.protocol import Bridge, device_of
from reftlens.bridge.trial import minds_padding
from reftlens.cone.layout import right_padded
from reftlens.cone.plans import Autocast, Job, Scored
from reftlens.editing.bound import Bound
from reftlens.editing.engine import attached, check_fired, forward
from reftlens.text.batch import Batch


@dataclass(frozen=True)
class Full:
    """Scores each job by one pass through the whole model."""

    model: Bridge
    data: Batch
    bounds: Sequence[Bound]
    """Of each plan."""
    autocast: Autocast

    def score(self, jobs: Sequence[Job]) -> Iterator[list[Scored]]:
        """Each job by itself; where gradients are taken, its hooks are attached until the next one is asked for."""
        for job in jobs:
            batch = self.data[list(job.rows)].to(device_of(self.model))
            batch = right_padded(batch) if minds_padding(self.model) else batch
            edits = self.bounds[job.plan].edits(batch.view, job.rows)
            with attached(self.model, edits), self.autocast():
                logits = forward(self.model, batch.tokens, batch.attention_mask)
                scored = [Scored(job, batch, logits[batch.predicting])]
                if torch.is_grad_enabled():  # a model that checkpoints gradients computes once more in backward
                    yield scored
            check_fired(edits)
            if not torch.is_grad_enabled():
                yield scored
