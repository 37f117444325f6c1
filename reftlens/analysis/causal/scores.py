"""How far an exchange does what the causal model says it should: held-out scores, per pair, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens import figures
from reftlens.analysis.causal.variable import check_same_prompts
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.cone.plans import plans_of
from reftlens.cone.reuse import Reuse
from reftlens.editing.engine import forward
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.answers import answers, first_targets
from reftlens.scoring.statistics import Estimate, mean_of, ratio_of, share_of
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class InterchangeScores:
    """One entry per pair. What needs the base's own answers is None where they were not given."""

    hits: Bool[Tensor, " pair"]
    """The edited model's most likely answer is the causal model's."""
    unedited_hits: Bool[Tensor, " pair"]
    """The same of the unedited model: what no edit at all would score."""
    base_hits: Bool[Tensor, " pair"] | None
    """The unedited model gives the base's own answer."""
    log_odds: Float[Tensor, " pair"] | None
    """log p(counterfactual) - log p(base's own), edited less unedited, in nats; NaN where the two answers agree."""
    recovered: Float[Tensor, " pair"] | None
    """That change over the change from base to source prompt; NaN where the answers agree or several are exchanged."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    @property
    def accuracy(self) -> Estimate:
        """Interchange accuracy with a Clopper-Pearson interval."""
        return share_of(self.hits)

    @property
    def restricted(self) -> Estimate:
        """Interchange accuracy over the pairs whose base the unedited model gets right."""
        return share_of(self.hits[self._needs_base(self.base_hits)])

    @property
    def log_odds_ratio(self) -> Estimate:
        """Mean log odds-ratio over the pairs whose answer the exchange changes (nats, bootstrap)."""
        values = self._needs_base(self.log_odds)
        return mean_of(values[~values.isnan()])

    @property
    def logit_difference_recovered(self) -> Estimate:
        """Ratio of sums: change by the edit over change from base prompt to source prompt, bootstrap over pairs."""
        gained, share = self._needs_base(self.log_odds), self._needs_base(self.recovered)
        known = ~share.isnan() & (share != 0)
        return ratio_of(gained[known], (gained / share)[known])

    @staticmethod
    def _needs_base(values: Tensor | None) -> Tensor:
        if values is None:
            raise ValueError("the base's own answers were not given: pass base=pairs.encode_base(model)")
        return values

    def to_frame(self) -> DataFrame:
        """One row per pair."""
        columns = ("hits", "unedited_hits", "base_hits", "log_odds", "recovered")
        values = {c: getattr(self, c) for c in columns}
        return figures.table({c: v.tolist() for c, v in values.items() if v is not None}, "pair")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracies with their intervals, the unedited model's as a dashed line."""
        ax = figures.axes(ax)
        named = {"all pairs": self.accuracy}
        if self.base_hits is not None and self.base_hits.any():
            named["base right"] = self.restricted
        for x, estimate in enumerate(named.values()):
            figures.interval(ax, x, estimate)
        figures.level(ax, self.unedited_hits.float().mean().item(), "unedited model")
        ax.set(
            ylabel=f"interchange accuracy{self.among} (95 % interval)", ylim=(0, 1.03), xlim=(-0.5, len(named) - 0.5)
        )
        ax.set_xticks(range(len(named)), list(named))
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        text = f"{len(self.hits)} pairs: interchange accuracy{self.among} {self.accuracy}"
        text += f", unedited {share_of(self.unedited_hits)}"
        if self.base_hits is not None and self.base_hits.any():
            text += f"; where the base is right {self.restricted}"
        if self.log_odds is not None and not self.log_odds.isnan().all():
            text += f"; log odds-ratio {self.log_odds_ratio} nats"
        return text

    __repr__ = __str__


def interchange_scores(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    base: Batch | None = None,
    variant: Variant = Variant(),
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> InterchangeScores:
    """Score an exchange on pairs it was not trained on.

    Args:
        data: base prompts, their targets the answers after the exchange, with sources (`pairs.encode(model)`).
        base: the same rows with the base's own answers as targets (`pairs.encode_base(model)`).

    Raises:
        ValueError: if a row has no target, or `base` has other prompts than `data`.
    """
    tokens = first_targets(data)[:, None]
    if base is not None:
        check_same_prompts(data, base)
        tokens = torch.cat([tokens, first_targets(base)[:, None]], dim=1)
    plans = plans_of(reft, {"unedited": Variant(strength=0.0), "edited": variant})
    scores = answers(model, data, plans, tokens, batch_size=batch_size, reuse=Reuse.of(reuse), progress=progress)
    unedited_hits, hits = scores.hits
    if base is None:
        return InterchangeScores(hits, unedited_hits, None, None, None, data.among)
    own = base.with_sources(data.sources) if data.sources else base
    plans = {"unedited": plans["unedited"]}
    unedited = answers(model, own, plans, tokens, batch_size=batch_size, reuse=Reuse.of(reuse), progress=False)
    odds = scores.log_probs[:, :, 0] - scores.log_probs[:, :, 1]
    gained = torch.where(tokens[:, 0] != tokens[:, 1], odds[1] - odds[0], torch.nan)
    recovered = gained / (_source_odds(model, data, tokens, batch_size) - odds[0])
    return InterchangeScores(hits, unedited_hits, unedited.hits[0], gained, recovered, data.among)


@torch.no_grad()
def _source_odds(model: Bridge, data: Batch, tokens: Int[Tensor, "pair 2"], batch_size: int) -> Float[Tensor, " pair"]:
    """log p(counterfactual) - log p(base's own) after the source prompt; NaN for rows with several sources."""
    odds = torch.full((len(data),), torch.nan, dtype=torch.float32)
    used = {name: source.rows.cpu() for name, source in data.sources.items()}
    count = sum((rows >= 0).long() for rows in used.values())
    for name, rows in used.items():
        mine = ((rows >= 0) & (count == 1)).nonzero().flatten()
        for some in mine.split(batch_size):
            batch = data.sources[name].batch[rows[some].tolist()].to(device_of(model))
            logits = forward(model, batch.tokens, batch.attention_mask)
            last = batch.prompt_mask.sum(dim=1) - 1
            log_probs = logits[torch.arange(len(some)), last].float().log_softmax(dim=-1).cpu()
            odds[some] = log_probs.gather(1, tokens[some]) @ torch.tensor([1.0, -1.0], dtype=torch.float32)
    return odds


def scores_table(scores: dict[str, InterchangeScores] | Sequence[InterchangeScores]) -> DataFrame:
    """One row per entry (a seed, a method): accuracy, its interval, restricted accuracy, log odds-ratio."""
    named = scores if isinstance(scores, dict) else {str(i): s for i, s in enumerate(scores)}
    records = []
    for name, score in named.items():
        record = {"name": name, "pairs": len(score.hits), **score.accuracy.as_columns("accuracy")}
        if score.base_hits is not None and score.base_hits.any():
            record |= score.restricted.as_columns("restricted")
        if score.log_odds is not None and not score.log_odds.isnan().all():
            record |= score.log_odds_ratio.as_columns("log_odds_ratio")
        records.append(record)
    return figures.table(records, "name")
