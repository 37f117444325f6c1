"""What candidates are compared by: the score of every row, and what an edit costs there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.analysis.strength.texts import written
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.errors import check_one_of
from reftlens.generation.decoding import Decoding
from reftlens.numbers import real
from reftlens.scoring.answers import first_targets
from reftlens.scoring.comparison import scored_batches, scorer_of
from reftlens.scoring.responses import responses
from reftlens.text.batch import Batch
from reftlens.text.targets import columns_of
from reftlens.text.view import TokenRole

NAMES = {
    "loss": "log-probability of the targets (nats per target token)",
    "accuracy": "share of target tokens that are most likely",
    "interchange": "share of pairs answered as after the exchange",
    "texts": "score of what is written",
}
"""Of what candidates may be compared by, each the higher the better."""
_LABELS = 32


@dataclass(frozen=True)
class Metric:
    """What is compared, and a budget that is to be kept."""

    name: str
    score: Callable[[str], float] | None = None
    """Of a text, where texts are scored."""
    decoding: Decoding = Decoding()
    within: Mapping[str, float] = field(default_factory=dict)
    """`{"kl": nats per token}` from the unedited model, over all tokens, or `{"perplexity": …}` of what is written."""

    @staticmethod
    def of(metric: str | Callable[[str], float] | None, within: Mapping[str, float] | None, decoding: Decoding,
           data: Batch) -> "Metric":  # fmt: skip
        """What a caller asked for; by default the loss, or where rows have sources interchange accuracy."""
        limits = {name: float(real(value, f"within: {name}")) for name, value in (within or {}).items()}
        for name, limit in limits.items():
            check_one_of("within: name", name, ("kl", "perplexity"))
            if not limit > 0:
                raise ValueError(f"within={{{name!r}: {limit:g}}}, expected a budget above 0")
        if len(limits) > 1:
            raise ValueError(f"within={limits}: one budget at a time")
        if callable(metric):
            if data.sources:
                raise ValueError("texts cannot be scored where rows have sources: generation has none to take from")
            return Metric("texts", metric, decoding, limits)
        name = ("interchange" if data.sources else "loss") if metric is None else metric
        check_one_of("metric", name, [n for n in NAMES if n != "texts"])
        if name == "interchange" and not data.sources:
            raise ValueError("metric='interchange' needs rows with sources: data.with_sources(…)")
        if "perplexity" in limits:
            raise ValueError("a budget of perplexity is for texts that are written: pass metric=…, a score of a text")
        return Metric(name, within=limits)

    @property
    def limit(self) -> float:
        """Of the mean cost."""
        limit = next(iter(self.within.values()), float("inf"))
        return torch.tensor(limit).log().item() if "perplexity" in self.within else limit

    def of_rows(self, measured: Float[Tensor, "measure *plans row"]) -> Float[Tensor, "*plans row"]:
        """The score of each row, of what `measures` gave; of texts the log-probability stands in before the end."""
        log_prob, accuracy, *_ = measured
        if self.name == "interchange":
            return (accuracy == 1).double()
        return accuracy if self.name == "accuracy" else log_prob


def measures(
    model: Bridge, data: Batch, plans: Sequence[Plan], *, batch_size: int, reuse: Reuse | None
) -> Float[Tensor, "measure plan row"]:
    """Log-probability of the targets, share of them that are most likely, and KL from the unedited model; row by row.

    The first two among the answers of the data, if it has any, the KL over all tokens: one of a few answers is hardly
    a cost. What is not finite scores as low as can be.
    """
    named = {str(i): plan for i, plan in enumerate(plans)}
    settings: dict[str, Any] = {"batch_size": batch_size, "reuse": reuse, "progress": False, "finite": False}
    scored = responses(model, data, named, **settings)
    kl = responses(model, data.among_answers(None), named, **settings).kl if data.answers else scored.kl
    values = torch.stack([scored.log_prob, scored.accuracy, kl])
    lost = ~values.isfinite().all(dim=0)
    worst = torch.tensor([-1e6, 0.0, 1e6], dtype=values.dtype)
    return torch.where(lost, worst[:, None, None], values)


def labels_of(data: Batch) -> Int[Tensor, " label"] | None:
    """The tokens that rows are answered by, where every row has one target and these are few; else None."""
    if bool((data.target_mask.sum(dim=1) != 1).any()):
        return None
    labels = first_targets(data).unique()
    return labels if 1 < len(labels) <= min(_LABELS, len(data) // 2) else None


def labelled(
    metric: Metric, model: Bridge, data: Batch, plans: Sequence[Plan], labels: Int[Tensor, " label"], *,
    batch_size: int, reuse: Reuse | None,
) -> Float[Tensor, "plan row label"]:  # fmt: skip
    """What each plan would score on each row if the row had that label."""
    out = torch.zeros(len(plans), len(data), len(labels), dtype=torch.float64)
    scorer = scorer_of(model, data, plans, reuse)
    for scored in scored_batches(scorer, range(len(plans)), batch_size=batch_size, finite=False):
        some = columns_of(labels, data.answers, data.tokenizer).to(scored.logits.device)
        if metric.name == "loss":
            values = scored.logits.double().log_softmax(dim=-1)[:, some]
        else:
            values = scored.logits.argmax(dim=-1)[:, None] == some
        out[scored.job.plan, torch.tensor(scored.job.rows)] = values.cpu().double()
    return out


def texts(
    metric: Metric, model: Bridge, data: Batch, plans: Sequence[Plan], *, batch_size: int, reuse: Reuse | None
) -> Float[Tensor, "two plan row"]:
    """The score of what each plan writes after each prompt, and the log of its perplexity, of the unedited model's."""
    prompts, scores = prompts_of(data), dict[int, Iterator[Tensor]]()
    for reft in {id(plan.reft): plan.reft for plan in plans}.values():
        variants = [plan.variant for plan in plans if plan.reft is reft]
        settings = {"score": metric.score, "batch_size": batch_size, "reuse": reuse, "progress": False}
        text = written(reft, model, prompts, variants, metric.decoding, **settings)
        assert text.score is not None
        scores[id(reft)] = iter(torch.stack([text.score, text.perplexity.log()], dim=1))
    return torch.stack([next(scores[id(plan.reft)]) for plan in plans], dim=1)


def prompts_of(data: Batch) -> Batch:
    """The prompts of the rows alone, to write from."""
    role = torch.where(data.prompt_mask, data.role, int(TokenRole.PAD))
    return replace(data, role=role, target_mask=torch.zeros_like(data.target_mask)).right_padded()[:]
