"""What an edited model answers: hits and log-probabilities at the targets, for many interventions in one sweep."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.data import Batch
from reftlens.evaluate import per_example, pieces
from reftlens.model import Bridge, check_deterministic, device_of
from reftlens.reft import ReFT, Variant, mode
from reftlens.reuse import Reuse
from reftlens.scorer import Job, Plan, Scorer


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
    empty = (~data.target_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row(s) {empty[:10]} have no target: nothing to score there")
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
    check_deterministic(model)
    device = device_of(model)
    first_targets(data)
    bound = {id(reft): reft.to(device).bind(model) for reft, _ in plans}
    for reft, variant in plans:
        bound[id(reft)].require(data.view, variant)
    made = [Plan(bound[id(reft)], variant) for reft, variant in plans]
    scorer = Scorer(model, data, made, Reuse.of(reuse), uses=1)
    hits = torch.zeros(len(plans), len(data), dtype=torch.bool)
    log_probs = torch.zeros(len(plans), len(data), tokens.shape[1])
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=hits.numel(), desc=describe, unit="example", disable=not progress))
        stack.enter_context(torch.no_grad())
        for reft in {id(reft): reft for reft, _ in plans}.values():
            stack.enter_context(mode(reft, training=False))
        for rows in pieces(len(data), batch_size):
            index = torch.tensor(rows)
            for group in scorer.groups([Job(i, rows) for i in range(len(plans))]):
                for scored in group:
                    i, batch = scored.job.plan, scored.batch
                    right = scored.logits.argmax(dim=-1) == batch.target_ids
                    hits[i, index] = torch.tensor(per_example(right.double(), batch)) == 1.0
                    begins = torch.searchsorted(batch.target_rows, torch.arange(len(rows), device=device))
                    found = scored.logits[begins].float().log_softmax(dim=-1)
                    log_probs[i, index] = found.gather(1, tokens[index].to(device)).cpu()
                    bar.update(len(rows))
    return Answers(hits, log_probs)
