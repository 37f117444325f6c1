"""`search`: where to edit, how, and how strongly, chosen on some rows and reported on others."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import SupportsIndex

from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, Executor, check_model, loader_of
from reftlens.cone.reuse import Reuse
from reftlens.files import destination
from reftlens.generation.decoding import Decoding
from reftlens.numbers import whole
from reftlens.scoring.objectives import Loss, Objective, as_objective, cross_entropy
from reftlens.selection.course import Course
from reftlens.selection.finals import Finals
from reftlens.selection.halving import schedule_of
from reftlens.selection.metrics import Metric
from reftlens.selection.question import Question
from reftlens.selection.result import SearchResult
from reftlens.selection.space import Space
from reftlens.selection.splitting import Split, check_apart, groups_of, split
from reftlens.selection.work import Journal
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig

SEARCH = FitConfig(steps=60, batch_size=16)
"""How candidates are trained where a caller says nothing: the learning rate comes from the space."""


def search(
    model: Bridge | Callable[[], Bridge],
    train: Batch,
    dev: Batch | None = None,
    test: Batch | None = None,
    space: Space | None = None,
    *,
    budget: SupportsIndex | None = None,
    metric: str | Callable[[str], float] | None = None,
    within: Mapping[str, float] | None = None,
    config: FitConfig = SEARCH,
    seeds: SupportsIndex = 3,
    seed: SupportsIndex = 0,
    objective: Objective | Loss = cross_entropy,
    decoding: Decoding = Decoding(),
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    executor: Executor | None = None,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> SearchResult:
    """Which layer, which tokens, which rank, how strong: a recommendation, and what it scores on rows nothing saw.

    All candidates train side by side in shared passes: a third of them go on, three times as long, then a third of
    those (successive halving; Jamieson and Talwalkar 2016, arXiv 1502.07943). Where the budget does not reach for the
    whole space, every place is tried with some settings first, and then the best places with all. The best settings
    are trained anew with every seed, by `fit` as anyone would. Every candidate is scored at the strengths of the space,
    of both signs. The first half of the dev rows decides who goes on, the second, which nothing has looked at, among
    the best settings and strengths: the smallest edit within one standard error of the best. One number is then
    measured on the test rows.

    Args:
        model: a bridge, or a function without arguments that loads one (needed with an `executor`, whose workers share
            no model with this process; threads whose function gives them one model wait for each other).
        train: with neither `dev` nor `test`, all rows: they are split 60/20/20 by group (rows that share a prompt or a
            source) and `seed`, see `SearchResult.split`.
        budget: optimizer steps of single candidates, shared pass or not; rungs, seeds and refits all count.
        metric: `"loss"`, `"accuracy"`, `"interchange"`, or a function of a text, the higher the better, for what is
            written after the prompts of the rows; there the log-probability of the targets decides who is written with.
        within: a budget, `{"kl": nats per token}` from the unedited model, over all tokens, whatever the rows are
            scored among, which all that is compared has to keep; or for texts `{"perplexity": …}`, kept by the last
            choice alone: before it nothing is written.
        config: of the training of the best settings; each learning rate is the space's.
        seeds: how many of them train each of the best settings; `seed`, `seed + 1`, …
        checkpoint: a file; a search that was stopped goes on from it.
        executor: any `concurrent.futures.Executor`, or whatever has a `submit(f, x)` that gives something with a
            `.result()`; what it gives is equal to what is computed without.

    Raises:
        ValueError: for fewer than 30 dev rows or 4 groups of them, a budget that is too small, one of `dev` and `test`
            without the other, an objective on pairs.
        CheckpointMismatch: where the file belongs to another search.
    """
    load = loader_of(model, executor)
    here, number = load(), whole(seed, "seed")
    check_model(here)
    parts = _parts(train, dev, test, number)
    question = Question(
        here,
        load,
        *parts,
        Metric.of(metric, within, decoding, train),
        (space or Space()).filled(here, train),
        config,
        whole(seeds, "seeds", 1),
        number,
        as_objective(objective),
        whole(batch_size, "batch_size", 1),
        Reuse.of(reuse),
        executor,
    )
    return _answer(question, None if budget is None else whole(budget, "budget", 1), checkpoint, progress)


def _answer(question: Question, budget: int | None, checkpoint: str | Path | None, progress: bool) -> SearchResult:
    """Run a search to its end."""
    places = len({candidate.sites for candidate in question.candidates})
    steps = question.config.total_steps(len(question.train))
    plan = schedule_of(budget, steps, len(question.candidates), places, question.seeds)
    path = None if checkpoint is None else destination(checkpoint)
    journal = Journal(path, question.identity | {"budget": plan.steps})
    with tqdm(total=plan.steps, desc="search", unit="step", disable=not progress) as bar:
        course = Course(question, journal, plan, bar)
        finals = Finals(question, course.run())
    return finals.result(course.trials, course.steps, plan.steps if budget is None else budget, course.tokens)


def _parts(train: Batch, dev: Batch | None, test: Batch | None, seed: int) -> tuple[Batch, Batch, Batch, Split | None]:
    """Rows to train on, to choose by and to report on."""
    if (dev is None) != (test is None):
        raise ValueError("one of dev and test is missing: give both, or neither, and the rows are split 60/20/20")
    parts = None
    if dev is None or test is None:
        parts = split(train, seed=seed)
        train, dev, test = (train[list(rows)] for rows in (parts.train, parts.dev, parts.test))
    else:
        check_apart({"train": train, "dev": dev, "test": test})
    groups = {name: len(set(groups_of(rows))) for name, rows in (("dev", dev), ("test", test))}
    if len(dev) < 30 or groups["dev"] < 4:
        raise ValueError(
            f"{len(dev)} dev row(s) in {groups['dev']} group(s) that share a prompt or a source, expected 30 or more, "
            "in 4 or more: of fewer, the best of many candidates is the luckiest; with data alone, a fifth of the "
            "rows are dev rows"
        )
    if groups["test"] < 2:
        raise ValueError(f"{len(test)} test row(s) that share one prompt or source, expected 2 or more: no interval")
    for name, rows in (("train", train), ("dev", dev), ("test", test)):
        rows.require_targets(name)
    return train, dev, test, parts
