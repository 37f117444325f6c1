"""How far an exchange does what the causal model says it should: held-out scores, per pair, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens import figures
from reftlens.analysis.causal.ledger import Ledger, Reasons, without_exchange
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
    possible: Float[Tensor, " pair"] | None
    """The change of the log-odds from base prompt to source prompt, in nats; NaN where several are exchanged."""
    ledger: Ledger
    """Why each score leaves out the pairs that it does; of `exchanged`, the pairs in which nothing changes hands."""
    among: str = ""
    """Among how many answers targets were scored, in words; "" for all tokens."""

    @property
    def accuracy(self) -> Estimate:
        """Interchange accuracy with a Clopper-Pearson interval."""
        return share_of(self.hits)

    @property
    def recovered(self) -> Float[Tensor, " pair"] | None:
        """`log_odds / possible`, pair by pair."""
        return None if self.log_odds is None or self.possible is None else self.log_odds / self.possible

    @property
    def restricted(self) -> Estimate:
        """Interchange accuracy over the pairs whose base (and source, where given) the unedited model gets right."""
        self._needs_base(self.base_hits)
        return share_of(self.hits[self.ledger.counted("restricted")])

    @property
    def _has_restricted(self) -> bool:
        return self.base_hits is not None and bool(self.ledger.counted("restricted").any())

    @property
    def log_odds_ratio(self) -> Estimate:
        """Mean log odds-ratio over the pairs whose answer the exchange changes (nats, bootstrap)."""
        return mean_of(self._needs_base(self.log_odds)[self.ledger.counted("log_odds_ratio")])

    @property
    def logit_difference_recovered(self) -> Estimate:
        """Ratio of sums: change by the edit over change from base prompt to source prompt, bootstrap over pairs."""
        gained, possible = self._needs_base(self.log_odds), self._needs_base(self.possible)
        counted = self.ledger.counted("logit_difference_recovered")
        return ratio_of(gained[counted], possible[counted])

    @staticmethod
    def _needs_base(values: Tensor | None) -> Tensor:
        if values is None:
            raise ValueError("the base's own answers were not given: pass base=pairs.encode_base(model)")
        return values

    def to_frame(self) -> DataFrame:
        """One row per pair, with the reason where a score leaves it out; `ledger.to_frame()` counts them."""
        columns = ("hits", "unedited_hits", "base_hits", "log_odds", "recovered")
        values = {c: getattr(self, c) for c in columns}
        scores = {c: v.tolist() for c, v in values.items() if v is not None}
        return figures.table(scores | self.ledger.columns(), "pair")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracies with their intervals, the unedited model's as a dashed line."""
        ax = figures.axes(ax)
        named = {"all pairs": self.accuracy}
        if self._has_restricted:
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

    def __repr__(self) -> str:
        text = f"{len(self.hits)} pairs: interchange accuracy{self.among} {self.accuracy}"
        text += f", unedited {share_of(self.unedited_hits)}"
        if self._has_restricted:
            text += f"; where the base is right {self.restricted}"
        if self.log_odds is not None and not self.log_odds.isnan().all():
            text += f"; log odds-ratio {self.log_odds_ratio} nats"
        return "\n".join([text, *self.ledger.lines])


def interchange_scores(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    base: Batch | None = None,
    source: Batch | None = None,
    variant: Variant = Variant(),
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> InterchangeScores:
    """Score an exchange on pairs it was not trained on.

    Args:
        data: base prompts, their targets the answers after the exchange, with sources (`pairs.encode(model)`).
        base: the same rows with the base's own answers as targets (`pairs.encode_base(model)`).
        source: the source prompts with their own answers (`pairs.encode_source(model)`): `restricted` then leaves out
            the pairs whose source the unedited model gets wrong, too.

    Raises:
        ValueError: if a row has no target, `base` has other prompts than `data`, or `source` than the sources.
    """
    own = _own_answers(data, base, source)
    tokens = torch.stack([first_targets(batch) for batch in (data, *([] if base is None else [base]))], dim=1)
    plans = plans_of(reft, {"unedited": Variant(strength=0.0), "edited": variant})
    run = partial(answers, model, batch_size=batch_size, reuse=Reuse.of(reuse))
    scores = run(data, plans, tokens, progress=progress)
    unedited_hits, hits = scores.hits
    reasons: dict[str, Reasons] = {"exchanged": without_exchange(reft, data, variant), "accuracy": {}}
    if base is None:
        ledger = Ledger.of(len(data), reasons)
        return InterchangeScores(hits, unedited_hits, None, None, None, ledger, data.among)
    unedited = {"unedited": plans["unedited"]}
    right = {w: run(b, unedited, first_targets(b)[:, None], progress=False).hits[0] for w, b in own.items()}
    odds, agree = scores.log_probs[:, :, 0] - scores.log_probs[:, :, 1], tokens[:, 0] == tokens[:, 1]
    possible = _source_odds(model, data, tokens, batch_size) - odds[0]
    reasons["restricted"] = {f"{whose} answered wrong": ~rows for whose, rows in right.items()}
    reasons["log_odds_ratio"] = {"the two answers agree": agree}
    several = {"several variables exchanged, or none": possible.isnan()}
    reasons["logit_difference_recovered"] = {**reasons["log_odds_ratio"], **several}
    gained, ledger = torch.where(agree, torch.nan, odds[1] - odds[0]), Ledger.of(len(data), reasons)
    return InterchangeScores(hits, unedited_hits, right["base"], gained, possible, ledger, data.among)


def _own_answers(data: Batch, base: Batch | None, source: Batch | None) -> dict[str, Batch]:
    """The prompts of base and source with their own answers, and sources that a plan at strength 0 asks for."""
    own: dict[str, Batch] = {}
    if base is not None:
        check_same_prompts(data, base)
        own["base"] = base.with_sources(data.sources) if data.sources else base
    if source is not None:
        if base is None or len(data.sources) != 1:
            raise ValueError(
                f"source=… goes with base=… and pairs that exchange one variable; base={base}, and the pairs have "
                f"sources for {', '.join(data.sources) or 'none'}"
            )
        ((name, theirs),) = data.sources.items()
        mine = replace(theirs.batch[theirs.rows.tolist()], answers=data.answers)
        check_same_prompts(mine, source, "source")
        own["source"] = source.with_sources({name: source})
    return own


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
        if score._has_restricted:
            record["restricted_pairs"] = int(score.ledger.counted("restricted").sum())
            record |= score.restricted.as_columns("restricted")
        if score.log_odds is not None and not score.log_odds.isnan().all():
            record |= score.log_odds_ratio.as_columns("log_odds_ratio")
        records.append(record)
    return figures.table(records, "name")
