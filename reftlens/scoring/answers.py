"""What an edited model answers: hits and log-probabilities at the targets, for many interventions in one sweep."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.scoring.comparison import per_example, scored_batches, scorer_of
from reftlens.text.batch import Batch
from reftlens.text.targets import columns_of


@dataclass(frozen=True, eq=False)
class Answers:
    """For each plan, in their order, and example."""

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
    plans: Mapping[str, Plan],
    tokens: Int[Tensor, "example tokens"],
    *,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
    describe: str = "answers",
) -> Answers:
    """Score `data` under each plan, dropout off; `tokens` are those whose log-probability is wanted, row by row."""
    hits = torch.zeros(len(plans), len(data), dtype=torch.bool)
    log_probs = torch.zeros(len(plans), len(data), tokens.shape[1], dtype=torch.float32)
    columns = columns_of(tokens, data.answers, data.tokenizer)
    scorer = scorer_of(model, data, list(plans.values()), reuse)
    every = range(len(plans))
    for scored in scored_batches(scorer, every, batch_size=batch_size, describe=describe, progress=progress):
        plan, index = scored.job.plan, torch.tensor(scored.job.rows)
        right = scored.logits.argmax(dim=-1) == scored.batch.target_ids
        hits[plan, index] = per_example(right.double(), scored.batch) == 1.0
        begins = torch.searchsorted(scored.batch.target_rows, torch.arange(len(index), device=right.device))
        logs = scored.logits[begins].float().log_softmax(dim=-1)
        log_probs[plan, index] = logs.gather(1, columns[index].to(logs.device)).cpu()
    return Answers(hits, log_probs)
