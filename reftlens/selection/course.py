"""A search in progress: the first look, the second look, and the best settings with every seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from reftlens.editing.reft import ReFT
from reftlens.selection.finals import Finalist
from reftlens.selection.halving import SECOND, Schedule, survivors
from reftlens.selection.question import Question
from reftlens.selection.space import Candidate, drawn
from reftlens.selection.trials import Trial
from reftlens.selection.work import TOGETHER, Journal, Outcome, Work, done
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig, derived_seed


@dataclass(eq=False)
class Course:
    """A search in progress."""

    question: Question
    journal: Journal
    plan: Schedule
    bar: Any

    def __post_init__(self) -> None:
        self.trials: list[Trial] = []
        self.steps = self.tokens = 0

    def run(self) -> list[Finalist]:
        """Both looks, and the best settings trained with every seed."""
        self.halve(drawn(self.question.candidates, self.plan.first, self.question.seed), "first")
        untried = self._untried()[: self.plan.second]
        if untried:
            self.halve(untried, "second")
        return self.final()

    def halve(self, candidates: Sequence[Candidate], look: str) -> None:
        """Train all up to the first rung, the best third of them up to the next, and so on."""
        q = self.question
        refts = {c: q.space.reft(c, q.hooks, q.seed) for c in candidates}
        alive = list(candidates)
        for rung, (begin, end) in enumerate(zip([0, *self.plan.rungs], self.plan.rungs, strict=False)):
            alive = alive[: survivors(len(candidates), rung)]
            short = self._short(end - begin, rung)
            works = [(refts[c], replace(short, lr=c.lr)) for c in alive]
            outcomes = self.compute(f"{look}/{rung}", works, q.halves[0], self._signs)
            trials = []
            for candidate, outcome in zip(alive, outcomes, strict=True):
                if outcome.state:
                    refts[candidate].load_state_dict(outcome.state)
                trials.append(self._trial(candidate, look, end, outcome))
            trials.sort(key=Trial.order, reverse=True)
            self.trials += trials
            alive = [trial.candidate for trial in trials]

    def _short(self, steps: int, rung: int) -> FitConfig:
        """Of the part of a training that leads up to a rung: at a constant rate, as nobody knows who will go on."""
        seed = derived_seed(self.question.seed, "rung", rung)
        more = {"warmup": 0.0} if rung else {}
        return replace(
            self.question.config, steps=steps, schedule="constant", seed=seed, eval_every=None, patience=None, **more
        )

    @property
    def _signs(self) -> tuple[float, ...]:
        """Strengths that candidates are compared at: those nearest to 1, of both signs; all under a budget."""
        strengths = self.question.strengths
        if "kl" in self.question.metric.within:
            return strengths
        signs = [[s for s in strengths if s > 0], [s for s in strengths if s < 0]]
        return tuple(min(some, key=lambda s: abs(abs(s) - 1)) for some in signs if some)

    def _trial(self, candidate: Candidate, look: str, steps: int, outcome: Outcome) -> Trial:
        """At the strength where it scores most of those that are within the budget."""
        means = outcome.measured.mean(dim=-1)
        scores, log_prob, kl = self.question.metric.of_rows(outcome.measured).mean(dim=-1), means[0], means[2]
        within = kl <= self.question.metric.within.get("kl", torch.inf) if outcome.state else kl < -torch.inf
        columns = self._signs, *(values.tolist() for values in (scores, log_prob, kl, within))
        return max((Trial(candidate, look, steps, *row) for row in zip(*columns, strict=True)), key=Trial.order)

    def compute(
        self, key: str, some: Sequence[tuple[ReFT, FitConfig]], rows: Batch, strengths: tuple[float, ...]
    ) -> list[Outcome]:
        """Train and score, those whose lowest edits are near each other in one piece of work."""
        q = self.question
        order = sorted(range(len(some)), key=lambda i: _lowest(some[i][0]))
        pieces = [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
        works = []
        for piece in pieces:
            refts, configs = zip(*(some[i] for i in piece), strict=True)
            more = strengths, q.objective, q.batch_size, q.reuse
            works.append(Work(q.load, q.train, rows, refts, configs, *more))
        every: dict[int, Outcome] = {}
        for piece, outcomes in zip(pieces, done(works, key, q.model, self.journal, q.executor), strict=True):
            every |= dict(zip(piece, outcomes, strict=True))
            steps = sum(some[i][1].total_steps(len(q.train)) for i in piece)
            self.steps += steps
            self.tokens += len(piece) * len(strengths) * int(rows.attention_mask.sum())
            self.bar.update(steps)
        return [every[i] for i in range(len(some))]

    def _untried(self) -> list[Candidate]:
        """At the best places, what was not tried there."""
        tried = {trial.candidate for trial in self.trials}
        ranked = sorted(self.trials, key=Trial.order, reverse=True)
        best = list(dict.fromkeys(trial.candidate.sites for trial in ranked))[:SECOND]
        return [c for c in self.question.candidates if c.sites in best and c not in tried]

    def final(self) -> list[Finalist]:
        """The best settings, those that differ in learning rate alone once, trained anew with every seed.

        First those at the best place, so that a smaller edit there can be taken where it does as well.
        """
        ranked = sorted(self.trials, key=Trial.order, reverse=True)
        best: dict[Any, Candidate] = {}
        for trial in ranked:
            best.setdefault((trial.candidate.sites, trial.candidate.kind, trial.candidate.rank), trial.candidate)
        top = ranked[0].candidate.sites
        order = sorted(best.values(), key=lambda candidate: candidate.sites != top)  # stable: the others by their score
        q, chosen = self.question, order[: self.plan.finalists]
        seeds = range(q.seed, q.seed + q.seeds)
        works = [
            (q.space.reft(c, q.hooks, seed), replace(q.config, lr=c.lr, seed=seed)) for c in chosen for seed in seeds
        ]
        outcomes = self.compute("final", works, q.halves[1], q.strengths)
        finalists = []
        for n, candidate in enumerate(chosen):
            own = range(n * q.seeds, (n + 1) * q.seeds)
            if all(outcomes[i].state for i in own):
                for i in own:
                    works[i][0].load_state_dict(outcomes[i].state)
                measured = torch.stack([outcomes[i].measured for i in own])
                finalists.append(Finalist(candidate, tuple(works[i][0] for i in own), measured))
        return finalists


def _lowest(reft: ReFT) -> tuple[int, str]:
    """Where the first edit is, to sort by."""
    hook = reft.sites[0].hook
    number = hook.split(".")[1] if hook.startswith("blocks.") else "-1" if hook.startswith("embed") else "99999"
    return int(number), hook
