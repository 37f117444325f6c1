"""The full computation: the whole model for every job."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.lengths import changes_with_length
from reftlens.bridge.protocol import Bridge, device_of, modules_of
from reftlens.bridge.trial import last_trial
from reftlens.cone.layout import alone
from reftlens.cone.plans import Autocast, Job, Scored
from reftlens.cone.spans import by_length
from reftlens.cone.watched import Watch, Watched, joined_rows
from reftlens.editing.bound import Bound
from reftlens.editing.engine import Hook, Stop, attached, check_fired, forward, hooked
from reftlens.text.batch import Batch


def at_targets(
    logits: Float[Tensor, "rows columns vocab"], at: tuple[Tensor, Tensor], data: Batch
) -> Float[Tensor, "targets answers"]:
    """Of all logits those that predict the targets, of the tokens that the data are scored among."""
    return logits[at][:, list(data.answers)] if data.answers else logits[at]


@dataclass(frozen=True)
class Full:
    """Scores each job by one pass through the whole model."""

    model: Bridge
    data: Batch
    bounds: Sequence[Bound]
    """Of each plan."""
    autocast: Autocast
    watched: Sequence[Watched] = ()
    buckets: int | None = 1
    """Into how many groups of rows of similar length a job may be divided; None is as many as pay."""

    def score(self, jobs: Sequence[Job], *, whole: bool = True) -> Iterator[list[Scored]]:
        """Each job by itself; where gradients are taken, its hooks are attached until the next one is asked for.

        With `whole` False a job comes in parts, rows of similar length together.
        """
        for job in (job for every in jobs for job in ([every] if whole else self._parts(every))):
            batch = self.data[list(job.rows)].to(device_of(self.model))
            longest = int(self.data.attention_mask[list(job.rows)].sum(dim=1).max())
            if changes_with_length(self.model, longest):
                yield [self._row_by_row(job, batch)]
            else:
                yield from self._pass(job, batch.right_padded() if last_trial(self.model).minds_padding else batch)

    def _parts(self, job: Job) -> list[Job]:
        parts = by_length(self.data, job.rows, self.buckets, device_of(self.model))
        return [Job(job.plan, tuple(part)) for part in parts]

    def _pass(self, job: Job, batch: Batch) -> Iterator[list[Scored]]:
        edits = self.bounds[job.plan].edits(batch.view, job.rows)
        watch = Watch(self.watched, [each.site.positions.mask(batch.view) for each in self.watched])
        with attached(self.model, edits), hooked(self.model, [*watch.hooks, *self._end()]), self.autocast():
            logits = torch.empty(*batch.tokens.shape, 0, device=batch.tokens.device)
            with suppress(Stop):
                logits = forward(self.model, batch.tokens, batch.attention_mask)
            scored = [Scored(job, batch, at_targets(logits, batch.predicting, batch), joined_rows(watch.by_row()))]
            if torch.is_grad_enabled():  # a model that checkpoints gradients computes once more in backward
                yield scored
        check_fired(edits)
        if not torch.is_grad_enabled():
            yield scored

    def _end(self) -> list[Hook]:
        """Where no logits are wanted, what ends the pass before they are computed."""
        if bool(self.data.target_mask.any()):
            return []

        def stop(h: Tensor, hook: HookPoint) -> None:
            raise Stop

        hooks = self.model.hook_dict
        return [(hooks[name], stop) for name in ("mlm_head.hook_in", "unembed.hook_in") if name in hooks]

    def _row_by_row(self, job: Job, batch: Batch) -> Scored:
        """The rows of a job, each in a pass of its own, as a longer row beside it would change it.

        Raises:
            ValueError: where the model would compute a row once more in the backward pass, without its edits.
        """
        root = self.model.original_model
        if root.training and any(getattr(m, "gradient_checkpointing", False) for m in modules_of(root)):
            raise ValueError("rows are computed one at a time on this model: switch gradient checkpointing off")
        singles = ((Job(job.plan, (row,)), alone(self.data, row).to(batch.tokens.device)) for row in job.rows)
        parts = [scored for single in singles for (scored,) in self._pass(*single)]
        return Scored(job, batch, torch.cat([p.logits for p in parts]), joined_rows([p.activations for p in parts]))
