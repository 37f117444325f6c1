"""Scores of what was answered, each with its 95 % interval; values are scikit-learn's and SciPy's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from reftlens.errors import check_one_of
from reftlens.experiments.rows.task import Row, Task
from reftlens.scoring.statistics import (
    Estimate,
    difference_of,
    mean_of,
    over_two,
    resampled_means,
    spread_of,
    student_t,
)

Answers = Sequence[str | None]
"""One for each row, in its canonical form; None where a text gave none."""


def answers_in(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> list[str | None]:
    """The answers that the task's rule finds in what was written to its rows."""
    _check_paired(rows, texts, "texts")
    return [task.extract(text, row) for row, text in zip(rows, texts, strict=True)]


def hits(task: Task, rows: Sequence[Row], answers: Answers) -> Bool[Tensor, " row"]:
    """Which answers are the gold ones; no answer is none."""
    _check_paired(rows, answers, "answers")
    pairs = zip(rows, answers, strict=True)
    return torch.tensor([answer is not None and task.equal(answer, row.answer) for row, answer in pairs])


def scores(task: Task, rows: Sequence[Row], answers: Answers) -> dict[str, Estimate]:
    """The scores that a task is reported by, `task.metrics`; a similarity that is not given counts as the middle."""
    _check_paired(rows, answers, "answers")
    gold, choices = [row.answer for row in rows], rows[0].choices
    exact = [g if hit else a for g, hit, a in zip(gold, hits(task, rows, answers).tolist(), answers, strict=True)]
    return {name: score(name, exact, gold, choices) for name in task.metrics}


def score(metric: str, answers: Answers, gold: Sequence[str], choices: Sequence[str] = ()) -> Estimate:
    """One score; `f1` is of the last of the choices, and a number that is not given counts as the middle of STS-B."""
    if metric == "accuracy":
        return accuracy(torch.tensor([a == g for a, g in zip(answers, gold, strict=True)]))
    if metric == "f1":
        return f1(answers, gold, choices[-1])
    if metric == "matthews":
        return matthews(answers, gold)
    check_one_of("metric", metric, _CORRELATIONS)
    return _CORRELATIONS[metric](answers, gold, _MIDDLE)


def score_over_runs(metric: str, runs: Sequence[Answers], gold: Sequence[str], choices: Sequence[str] = ()) -> Estimate:
    """The mean of a score over runs, with an interval over rows and runs.

    Accuracy's is by bootstrap over both. Of another score half the interval is `√(r² + s²)`, with `r` the mean half of
    the runs' intervals over rows, which are the same rows in all, and `s` Student's over the runs. No interval goes
    beyond what the score can be, however much few runs differ.
    """
    if len(runs) == 1:
        return score(metric, runs[0], gold, choices)
    if metric == "accuracy":
        found = over_two(torch.tensor([[float(a == g) for a, g in zip(run, gold, strict=True)] for run in runs]))
        return _possible(found, metric)
    each = [score(metric, run, gold, choices) for run in runs]
    values = torch.tensor([e.value for e in each], dtype=torch.float64)
    rows = sum((e.high - e.low) / 2 for e in each) / len(each)
    seeds = student_t(len(runs) - 1) * values.std().item() / len(runs) ** 0.5
    mean, half = values.mean().item(), math.hypot(rows, seeds)
    return _possible(Estimate(mean, mean - half, mean + half, len(gold)), metric)


def _possible(found: Estimate, metric: str) -> Estimate:
    """The part of an interval in which the score can be; a bound that is NaN stays."""
    least = 0.0 if metric in ("accuracy", "f1") else -1.0
    return replace(found, low=max(found.low, least), high=min(found.high, 1.0))


def accuracy(right: Bool[Tensor, " row"], interval: Literal["wilson", "bootstrap"] = "wilson") -> Estimate:
    """Share of right answers, with Wilson's interval (1927), or a percentile bootstrap over rows."""
    check_one_of("interval", interval, ("wilson", "bootstrap"))
    if interval == "bootstrap" or not len(right):
        return mean_of(right.double())
    from scipy.stats import binomtest

    bounds = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return Estimate(right.double().mean().item(), bounds.low, bounds.high, len(right))


def f1(answers: Answers, gold: Sequence[str], positive: str) -> Estimate:
    """`2 TP / (2 TP + FP + FN)` of one label; no answer is not that label. Interval by bootstrap over rows."""
    from sklearn.metrics import f1_score

    found, true = [a == positive for a in answers], [g == positive for g in gold]
    value = float(f1_score(true, found)) if any(true) or any(found) else 0.0
    a, g = torch.tensor(found).double(), torch.tensor(true).double()

    def of(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
        both, answered, asked = means.unbind(dim=1)
        return torch.nan_to_num(2 * both / (answered + asked))

    return _resampled(torch.stack([a * g, a, g], dim=1), of, value)


def matthews(answers: Answers, gold: Sequence[str]) -> Estimate:
    """Matthews' correlation of any number of labels; no answer is a label of its own. Bootstrap over rows."""
    from sklearn.metrics import matthews_corrcoef

    found = ["" if answer is None else answer for answer in answers]
    value = float(matthews_corrcoef(list(gold), found))
    labels = sorted({*found, *gold})
    a = torch.tensor([[x == label for label in labels] for x in found]).double()
    g = torch.tensor([[x == label for label in labels] for x in gold]).double()

    def of(means: Float[Tensor, "draw columns"]) -> Float[Tensor, " draw"]:
        right, p, t = means[:, 0], means[:, 1 : 1 + len(labels)], means[:, 1 + len(labels) :]
        spread = ((1 - (p**2).sum(dim=1)) * (1 - (t**2).sum(dim=1))).clamp(min=0).sqrt()
        return torch.where(spread > 1e-9, (right - (p * t).sum(dim=1)) / spread.clamp(min=1e-9), 0.0)

    return _resampled(torch.cat([(a * g).sum(dim=1, keepdim=True), a, g], dim=1), of, value)


def pearson(answers: Answers, gold: Sequence[str], missing: float | None = None) -> Estimate:
    """Correlation of numbers. `missing` stands for those of rows without one. Interval by bootstrap over rows.

    Raises:
        ValueError: for a row without a number, where `missing` is None.
    """
    from scipy.stats import pearsonr

    x, y = _numbers(answers, gold, missing)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Estimate(math.nan, math.nan, math.nan, len(x))
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    correlation: Any = pearsonr(x, y)
    rows = torch.stack([a, b, a * a, b * b, a * b], dim=1)
    return _resampled(rows, _correlated, float(correlation.statistic))


def spearman(answers: Answers, gold: Sequence[str], missing: float | None = None) -> Estimate:
    """Correlation of ranks, which are those among the rows that are drawn in each draw of the bootstrap."""
    from scipy.stats import spearmanr

    x, y = _numbers(answers, gold, missing)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Estimate(math.nan, math.nan, math.nan, len(x))
    weights = resampled_means(torch.eye(len(x), dtype=torch.float64), "rows")
    a, b = _ranks(x, weights), _ranks(y, weights)
    means = [(weights * v).sum(dim=1) for v in (a, b, a * a, b * b, a * b)]
    correlation: Any = spearmanr(x, y)
    draws = _correlated(torch.stack(means, dim=1))
    return spread_of(draws[draws.isfinite()], float(correlation.statistic), len(x))


def _ranks(values: list[float], weights: Float[Tensor, "draw row"]) -> Float[Tensor, "draw row"]:
    """The share of each draw that lies below each row's value, and half of that which equals it."""
    among, place = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True)
    equal = torch.zeros(len(weights), len(among), dtype=weights.dtype).index_add_(1, place, weights)
    return (equal.cumsum(dim=1) - equal / 2)[:, place]


_CORRELATIONS = {"pearson": pearson, "spearman": spearman}
_MIDDLE = 2.5
"""Of the scale of STS-B, 0 to 5."""


def difference(a: Shaped[Tensor, "*runs row"], b: Shaped[Tensor, "*others same"]) -> Estimate:
    """Mean of `a - b` over the same rows; with several runs of either, rows and runs are both drawn again.

    One of the two may have one run and the other several: a model without training beside one of several seeds.
    """
    runs_a, runs_b = torch.atleast_2d(a.double()), torch.atleast_2d(b.double())
    counts, lengths = {len(runs_a), len(runs_b)} - {1}, {runs_a.shape[1], runs_b.shape[1]}
    if len(lengths) > 1 or len(counts) > 1:
        raise ValueError(f"scores of {tuple(a.shape)} and {tuple(b.shape)}, expected the same rows and as many runs")
    if not counts:
        return difference_of(runs_a[0], runs_b[0])
    return over_two(runs_a - runs_b)


def _numbers(answers: Answers, gold: Sequence[str], missing: float | None) -> tuple[list[float], list[float]]:
    absent = [i for i, answer in enumerate(answers) if answer is None]
    if absent and missing is None:
        raise ValueError(
            f"{len(absent)} of {len(answers)} rows have no number, the first is row {absent[0]}: pass missing=, what "
            "stands for them, or leave them out"
        )
    return [float(missing or 0.0) if a is None else float(a) for a in answers], [float(g) for g in gold]


def _correlated(means: Float[Tensor, "draw 5"]) -> Float[Tensor, " draw"]:
    """Pearson's correlation from the means of `x`, `y`, `x²`, `y²` and `xy`."""
    x, y, xx, yy, xy = means.unbind(dim=1)
    return (xy - x * y) / ((xx - x**2) * (yy - y**2)).clamp(min=0).sqrt()


def _resampled(rows: Float[Tensor, "row column"], of: Callable[[Tensor], Tensor], value: float) -> Estimate:
    """A function of means over rows, with the interval of its values where rows are drawn again."""
    draws = of(resampled_means(rows, "rows"))
    return spread_of(draws[draws.isfinite()], value, len(rows))


def _check_paired(rows: Sequence[Row], values: Sequence[Any], name: str) -> None:
    if not rows or len(rows) != len(values):
        raise ValueError(f"{len(rows)} rows and {len(values)} {name}, expected one for each of one row or more")
