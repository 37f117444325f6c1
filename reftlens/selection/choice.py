"""The last choice of a search, and how much better than it is the chosen one looks where it was chosen."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.numbers import seeded, whole
from reftlens.scoring.statistics import Estimate, accuracy_of, mean_of, ratio_of, spread_of


@dataclass(frozen=True, eq=False)
class Options:
    """What may be chosen last, with the score of each on rows that nothing was chosen by before."""

    score: Float[Tensor, "option row"]
    """Higher is better; the mean over seeds, which is what is chosen by."""
    first: Float[Tensor, "option row"]
    """Of the weights that are handed out: those of the first seed."""
    cost: Float[Tensor, "option row"]
    """What the budget is spent on; of options that are as good, the cheaper one is taken."""
    limit: float
    """The mean cost that is allowed."""
    size: Int[Tensor, " option"]
    """Trained numbers; of options that are as good, the smaller one is taken."""
    group: Int[Tensor, " row"]
    """Rows of one group are drawn together."""

    def chosen(self, weight: Float[Tensor, " row"]) -> int:
        """The option that the rule takes, each row counted so many times.

        Of those within the limit (or where none is, the cheapest), the smallest, then cheapest one whose score is
        within one standard error, by group, of the best.
        """
        total, cost = weight.sum(), self.cost @ weight / weight.sum()
        allowed = cost <= self.limit
        if not allowed.any():
            return int(cost.argmin())
        means = (self.score @ weight / total).masked_fill(~allowed, -torch.inf)
        best = int(means.argmax())
        off = (self.score[best] - means[best]) * weight
        sums = off.new_zeros(int(self.group.max()) + 1).index_add_(0, self.group, off)
        near = allowed & (means >= means[best] - sums.square().sum().sqrt() / total)
        near[best] = True
        ranks = zip(self.size.tolist(), cost.tolist(), (-means).tolist(), range(len(means)), strict=True)
        return min(rank for rank, good in zip(ranks, near.tolist(), strict=True) if good)[-1]


@dataclass(frozen=True)
class Optimism:
    """How much the score of the chosen one is too high where it was chosen, and what the best of n is by luck."""

    expected: Estimate
    """Score where it was chosen less its score on rows not used to choose."""
    permuted: Estimate | None
    """The score of the best of all options when the labels of the rows are permuted; None where rows have no labels."""
    options: int
    """How many were chosen from."""

    def __repr__(self) -> str:
        line = f"optimism of the choice of one in {self.options}: {self.expected.value:.3f}"
        return line + ("" if self.permuted is None else f"; best of them on shuffled labels {self.permuted:.3f}")


def optimism(options: Options, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Expected score of the chosen option where it was chosen less its score on rows not used to choose.

    Groups of rows are drawn with replacement, the option is chosen anew by what was drawn, and its mean there is
    compared with that on the groups that were not drawn; nothing is retrained. A draw of `n` groups with counts `w`
    weighs them unequally: its mean varies as that of `n² / Σw²` groups, about half of them. What luck adds to the best
    grows with the spread of a mean, so each difference is multiplied by `√(n / Σw²)`. That is exact where all options
    are equally good, and where one is far better; in between it errs on the side of too much.

    Returns:
        The mean over resamples, with their 2.5 and 97.5 % quantiles.
    """
    groups = int(options.group.max()) + 1
    generator, differences = seeded(seed), list[Tensor]()
    for _ in range(whole(resamples, "resamples", 1)):
        counts = torch.bincount(torch.randint(groups, (groups,), generator=generator), minlength=groups).double()
        if not bool((counts == 0).any()) or groups == 1:
            continue
        weight = counts[options.group]
        scores = options.first[options.chosen(weight)]
        inside, outside = (scores * weight).sum() / weight.sum(), scores[weight == 0].mean()
        differences.append((inside - outside) * (groups / counts.square().sum()).sqrt())
    if not differences:
        raise ValueError("one group of rows alone: nothing is left out of a resample")
    draws = torch.stack(differences).double()
    return spread_of(draws, draws.mean().item(), len(options.group))


def permuted(
    labelled: Float[Tensor, "option row label"],
    options: Options,
    label: Int[Tensor, " row"],
    *,
    draws: int = 200,
    seed: int = 0,
) -> Estimate:
    """The score of the chosen option when the labels of the rows are permuted, over so many permutations.

    Args:
        labelled: what each option would score on each row if the row had that label.
    """
    generator, best = seeded(seed), list[Tensor]()
    rows = torch.arange(len(label))
    for _ in range(whole(draws, "draws", 1)):
        other = label[torch.randperm(len(label), generator=generator)]
        scores = labelled[:, rows, other]
        shuffled = Options(scores, scores, options.cost, options.limit, options.size, options.group)
        best.append(scores[shuffled.chosen(torch.ones(len(label), dtype=scores.dtype))].mean())
    values = torch.stack(best).double()
    return spread_of(values, values.mean().item(), len(label))


def grouped_mean(values: Float[Tensor, " row"], group: Int[Tensor, " row"]) -> Estimate:
    """Mean over rows with its 95 % interval: groups are resampled; exact for 0 or 1 where no rows share a group."""
    if len(group.unique()) == len(group):
        return accuracy_of(values) if bool(((values == 0) | (values == 1)).all()) else mean_of(values)
    groups = int(group.max()) + 1
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values.double())
    return ratio_of(sums, torch.bincount(group, minlength=groups).double())
