"""What an edited model answers: hits and log-probabilities at the targets, for many interventions in one sweep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, Variant
from reftlens.scoring.comparison import Comparison
from reftlens.scoring.evaluation import per_example
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Answers:
    """For each plan `(intervention, variant)` and example."""

    hits: Bool[Tensor, "plan example"]
    """Whether every target token is the most likely one."""
    log_probs: Float[Tensor, "plan example tokens"]
    """Of the tokens asked for, where the first target is predicted, in nats."""


def first_targets(data: Batch) -> Int[Tensor, " example"]:
    """The first target token of each row.

    Raises:
        ValueError: if a row has no target.
    """
    data.require_targets()
    return data.tokens[torch.arange(len(data)), data.target_mask.long().argmax(dim=1)].cpu()


def answers(
    model: Bridge,
    data: Batch,
    plans: Sequence[tuple[ReFT, Variant]],
    tokens: Int[Tensor, "example tokens"],
    *,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
    describe: str = "answers",
) -> Answers:
    """Score `data` under each plan, dropout off; `tokens` are those whose log-probability is wanted, row by row."""
    hits = torch.zeros(len(plans), len(data), dtype=torch.bool)
    log_probs = torch.zeros(len(plans), len(data), tokens.shape[1])
    compared = Comparison(model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress, describe=describe)
    for one in compared:
        index, rows = torch.tensor(one.rows), torch.arange(len(one.rows), device=one.logits.device)
        right = one.logits.argmax(dim=-1) == one.batch.target_ids
        hits[one.plan, index] = torch.tensor(per_example(right.double(), one.batch)) == 1.0
        begins = torch.searchsorted(one.batch.target_rows, rows)
        found = one.logits[begins].float().log_softmax(dim=-1)
        log_probs[one.plan, index] = found.gather(1, tokens[index].to(found.device)).cpu()
    return Answers(hits, log_probs)
