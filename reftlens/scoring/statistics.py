"""A number with its 95 % interval, by TransformerLens' statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from transformer_lens.utilities.statistics import (
    bootstrap_ci,
    derive_generator,
    sign_flip_permutation_pvalue,
    success_rate_ci,
)

_DRAWS = 2000
FEW = 10
"""Examples below which an interval is told with their number: the bootstrap's is then too narrow."""


@dataclass(frozen=True)
class Estimate:
    """`value`, with the 95 % interval `[low, high]` and the number of examples behind it."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self:.2f}"

    def __format__(self, form: str) -> str:
        """Value and interval in the format of a number, by default `.2f`; what is special about the interval beside."""
        form = form or ".2f"
        interval = f"{self.low:{form}}, {self.high:{form}}" if self.low < self.high else "all alike"
        interval = "no interval" if math.isnan(self.low) else interval
        few = f"; only {self.count} example{'s' * (self.count > 1)}" if self.count < FEW else ""
        return f"{self.value:{form}} [{interval}{few}]"

    def as_columns(self, name: str) -> dict[str, float]:
        """`{name: value, name_low: …, name_high: …}`, for a data frame."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def share_of(hits: Shaped[Tensor, " example"]) -> Estimate:
    """Share of hits with the exact (Clopper-Pearson) interval."""
    _require_some(hits)
    rate = success_rate_ci([bool(h) for h in hits.tolist()])
    return Estimate(rate.point_estimate, rate.ci_low, rate.ci_high, len(hits))


def mean_of(values: Float[Tensor, " example"]) -> Estimate:
    """Mean with a percentile-bootstrap interval over examples (2,000 draws from a fixed seed).

    One example has none. Of fewer than ten it is too narrow (of five normal ones it holds the mean in 83 % of cases),
    and its text tells their number; that of values that are all alike is a point, and its text says so.
    """
    _require_some(values)
    if len(values) == 1:
        return Estimate(values.item(), math.nan, math.nan, 1)
    low, high = bootstrap_ci(values.double(), n_resamples=_DRAWS)
    return Estimate(values.double().mean().item(), low.item(), high.item(), len(values))


def accuracy_of(shares: Float[Tensor, " example"]) -> Estimate:
    """Mean of each example's share of right answers: `share_of` where every example is all right or all wrong."""
    whole = bool(((shares == 0) | (shares == 1)).all())
    return share_of(shares == 1) if whole else mean_of(shares)


def difference_of(a: Shaped[Tensor, " example"], b: Shaped[Tensor, " example"]) -> Estimate:
    """Mean of `a - b` over the same examples, paired bootstrap."""
    return mean_of(a.double() - b.double())


def average_of(a: Shaped[Tensor, " m"], b: Shaped[Tensor, " n"]) -> Estimate:
    """Mean of the means of two groups of examples, each resampled by itself."""
    _require_some(a)
    _require_some(b)
    draws = torch.stack([resampled_means(x, str(i)) for i, x in enumerate((a, b))]).mean(dim=0)
    value = (a.double().mean() + b.double().mean()).item() / 2
    return spread_of(draws, value, len(a) + len(b))


def ratio_of(above: Float[Tensor, " example"], below: Float[Tensor, " example"]) -> Estimate:
    """`sum(above) / sum(below)`, examples resampled together."""
    _require_some(above)
    both = resampled_means(torch.stack([above, below], dim=1), "ratio")
    return spread_of(both[:, 0] / both[:, 1], (above.double().sum() / below.double().sum()).item(), len(above))


def over_two(values: Float[Tensor, "run example"], seed: int = 0) -> Estimate:
    """Mean over runs and examples that are crossed, with an interval in which both are drawn again.

    Runs and examples are drawn with replacement, independently (Owen 2007, the pigeonhole bootstrap); NaN is left out.
    As runs are few, their deviations are stretched by `√(S / (S - 1)) · t₀.₉₇₅(S - 1) / 1.96` for `S` of them: the
    interval then holds the truth in 95 % of cases or more (of 3 runs that differ 0.97, without it 0.75).
    """
    runs, count = values.shape
    if runs < 2 or not count:
        raise ValueError(f"{runs} run(s) of {count} example(s), expected two runs or more, and an example")
    counted = ~values.isnan()
    numbers = torch.where(counted, values, 0.0).double()
    v = _drawn(count, "examples", seed)
    w = 1 / runs + (runs / (runs - 1)) ** 0.5 * student_t(runs - 1) / 1.96 * (_drawn(runs, "runs", seed) - 1 / runs)
    per_run = (numbers @ v.T) / (counted.double() @ v.T)
    value = (numbers.sum(dim=1) / counted.sum(dim=1)).mean().item()
    return spread_of((w.T * per_run).sum(dim=0), value, count)


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom."""


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.372 / freedom + 2.82 / freedom**2


def spread_of(draws: Float[Tensor, " draws"], value: float, count: int) -> Estimate:
    """`value`, with the 2.5 % and 97.5 % quantiles of `draws` as its interval."""
    low, high = torch.quantile(draws.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, count)


def resampled_means(values: Shaped[Tensor, "n *rest"], label: str, seed: int = 0) -> Float[Tensor, "draws *rest"]:
    """Means over examples drawn with replacement, as many as there are, 2,000 times."""
    return _drawn(len(values), label, seed) @ values.double()


def _drawn(count: int, label: str, seed: int) -> Float[Tensor, "draws count"]:
    """How often each of `count` is among as many drawn with replacement, as a share, 2,000 times."""
    drawn = torch.randint(count, (_DRAWS, count), generator=derive_generator(seed, label))
    once = torch.ones_like(drawn, dtype=torch.float64) / count
    return torch.zeros_like(once).scatter_add_(1, drawn, once)


def _require_some(values: Tensor) -> None:
    if not len(values):
        raise ValueError("no example is left to estimate from")


def shrunk_covariance(centred: Float[Tensor, "n d"], freedom: int, shrinkage: float) -> Float[Tensor, "d d"]:
    """`(1 - shrinkage) S + shrinkage · tr(S)/d · I`, with `S` the covariance over so many degrees of freedom."""
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}, expected above 0 and at most 1")
    covariance = centred.T @ centred / max(1, freedom)
    sphere = torch.eye(len(covariance), dtype=covariance.dtype) * covariance.trace() / len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * sphere


def holm(p: Float[Tensor, " tests"]) -> Float[Tensor, " tests"]:
    """p-values corrected for their number by Holm's step-down rule (Holm 1979), which holds under any dependence."""
    order, count = p.argsort(), len(p)
    steps = (p[order] * torch.arange(count, 0, -1, dtype=p.dtype)).cummax(dim=0).values
    return torch.empty_like(p).scatter(0, order, steps.clamp(max=1))


def sign_flip_p(values: Float[Tensor, " example"], *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p that paired effects are symmetric about 0, by flipping their signs; exact up to 12 examples."""
    _require_some(values)
    flips = derive_generator(seed, "sign flips")
    return sign_flip_permutation_pvalue(values.double(), n_permutations=draws, generator=flips).item()


def sign_flip_tests(
    rows: Sequence[Float[Tensor, " _"]], *, seed: int = 0
) -> tuple[Float[Tensor, " tests"], Float[Tensor, " tests"]]:
    """`sign_flip_p` of each row, and the same after Holm's correction; enough draws that one row can pass it."""
    draws = max(9999, 40 * len(rows))
    p = torch.tensor([sign_flip_p(row, draws=draws, seed=seed) for row in rows], dtype=torch.float64)
    return p, holm(p)


def sign_flip_table(
    values: Float[Tensor, "*cells example"], counted: Bool[Tensor, "*cells example"], *, seed: int = 0
) -> tuple[Float[Tensor, "*cells"], Float[Tensor, "*cells"]]:
    """`sign_flip_tests` of each cell of a table, over the examples that are counted in it; NaN where none is."""
    some = counted.any(dim=-1)
    tests = sign_flip_tests([row[use] for row, use in zip(values[some], counted[some], strict=True)], seed=seed)
    empty = torch.full(some.shape, torch.nan, dtype=torch.float64)
    return empty.masked_scatter(some, tests[0]), empty.masked_scatter(some, tests[1])
