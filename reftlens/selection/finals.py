"""The end of a search: the choice among the best settings, its optimism, and one number on the test rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.cone.plans import Plan
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.scoring.answers import first_targets
from reftlens.selection.choice import Optimism, Options, grouped_mean, optimism, permuted
from reftlens.selection.metrics import labelled, labels_of, measures, texts
from reftlens.selection.question import Question
from reftlens.selection.result import SearchResult
from reftlens.selection.space import Candidate
from reftlens.selection.splitting import groups_of
from reftlens.selection.trials import Setting, Trial
from reftlens.text.batch import Batch


@dataclass(frozen=True, eq=False)
class Finalist:
    """A setting, trained with every seed."""

    candidate: Candidate
    refts: tuple[ReFT, ...]
    measured: Float[Tensor, "seed measure strength row"]

    @property
    def size(self) -> int:
        """Trained numbers, constraints taken off."""
        return sum(module.degrees_of_freedom for module in self.refts[0].distinct)


@dataclass(eq=False)
class Finals:
    """The best settings at every strength, on the dev rows that nothing was chosen by before."""

    question: Question
    finalists: Sequence[Finalist]

    def __post_init__(self) -> None:
        if not self.finalists:
            raise ValueError("no candidate could be trained to the end: all diverged; lower the learning rates")
        self.rows = self.question.halves[1]
        self.strengths = self.question.strengths
        self.every = [(finalist, strength) for finalist in self.finalists for strength in self.strengths]

    @cached_property
    def options(self) -> Options:
        """What is chosen from, finalist by finalist and strength by strength."""
        sizes = torch.tensor([finalist.size for finalist, _ in self.every])
        group = torch.tensor(groups_of(self.rows))
        if self.question.metric.name == "texts":
            score, perplexity = self._written([Plan(f.refts[0], Variant(s)) for f, s in self.every], self.rows)
            cost = perplexity if "perplexity" in self.question.metric.within else self._costs
            return Options(score, score, cost, self.question.metric.limit, sizes, group)
        seeds = torch.stack([self.question.metric.of_rows(f.measured.movedim(1, 0)) for f in self.finalists])
        score, first = seeds.mean(dim=1).flatten(0, 1), seeds[:, 0].flatten(0, 1)
        return Options(score, first, self._costs, self.question.metric.limit, sizes, group)

    @property
    def _costs(self) -> Float[Tensor, "option row"]:
        return torch.stack([finalist.measured[:, 2].mean(dim=0) for finalist in self.finalists]).flatten(0, 1)

    def _written(self, plans: Sequence[Plan], rows: Batch) -> Float[Tensor, "two plan row"]:
        q = self.question
        return texts(q.metric, q.model, rows, plans, **q.settings)

    def optimism(self) -> Optimism:
        """Of the choice, and of the best of n on shuffled labels."""
        q, options = self.question, self.options
        labels, luck = labels_of(self.rows), None
        if labels is not None and q.metric.name != "texts":
            plans = [Plan(reft, Variant(s)) for f in self.finalists for reft in f.refts for s in self.strengths]
            scores = labelled(q.metric, q.model, self.rows, plans, labels, **q.settings)
            pooled = scores.view(len(self.finalists), q.seeds, len(self.strengths), *scores.shape[1:]).mean(dim=1)
            index = torch.searchsorted(labels, first_targets(self.rows))
            luck = permuted(pooled.flatten(0, 1), options, index, seed=q.seed)
        return Optimism(optimism(options, seed=q.seed), luck, len(self.every))

    def _scores(self, reft: ReFT, strengths: Sequence[float], rows: Batch) -> Float[Tensor, "strength row"]:
        """Of an edit; of the unedited model at strength 0."""
        q, plans = self.question, [Plan(reft, Variant(s)) for s in strengths]
        if q.metric.name == "texts":
            return self._written(plans, rows)[0]
        return q.metric.of_rows(measures(q.model, rows, plans, **q.settings))

    def _setting(self, n: int, chosen: bool, steps: int) -> Setting:
        (finalist, strength), options = self.every[n], self.options
        measured = finalist.measured[:, :, self.strengths.index(strength)].movedim(1, 0)
        own = self.question.metric.of_rows(measured).mean(dim=-1).tolist()
        score, cost, kl = options.score[n].mean().item(), options.cost[n].mean().item(), measured[2].mean().item()
        seeds = tuple(own) if self.question.metric.score is None else (score,)
        return Setting(finalist.candidate, strength, score, cost, seeds, kl, cost <= options.limit, chosen, steps)

    def result(self, trials: Sequence[Trial], steps: int, budget: int, tokens: int) -> SearchResult:
        """Choose, and measure on the test rows."""
        q, options = self.question, self.options
        best = options.chosen(torch.ones(len(self.rows), dtype=torch.float64))
        finalist, strength = self.every[best]
        edited, unedited = self._scores(finalist.refts[0], (strength, 0.0), q.test)
        (before,) = self._scores(finalist.refts[0], (0.0,), self.rows)
        group = torch.tensor(groups_of(q.test))
        total = q.config.total_steps(len(q.train))
        settings = tuple(self._setting(n, n == best, total) for n in range(len(self.every)))
        return SearchResult(
            space=q.space,
            metric=q.metric,
            trials=tuple(trials),
            settings=settings,
            recommended=finalist.refts[0],
            candidate=finalist.candidate,
            variant=Variant(strength),
            dev=grouped_mean(options.first[best], options.group),
            test=grouped_mean(edited, group),
            unedited_dev=grouped_mean(before, options.group),
            unedited_test=grouped_mean(unedited, group),
            gained=grouped_mean(edited - unedited, group),
            rows={"dev": len(self.rows), "test": len(q.test)},
            optimism=self.optimism(),
            config=replace(q.config, lr=finalist.candidate.lr, seed=q.seed),
            objective=q.objective,
            split=q.split,
            steps=steps,
            budget=budget,
            scored_tokens=tokens,
        )
