"""How much a trained subspace means: the same score for everything that could have reached it without meaning it."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens.analysis.causal.baselines import Placebo, filled_up, relabelled, untrained_copy
from reftlens.analysis.causal.control_table import Control, Controls
from reftlens.analysis.causal.ledger import of_variable
from reftlens.analysis.causal.permutation import movable, shuffled_p
from reftlens.analysis.causal.variable import about_variable, basis_of, movement_of, pairs_of, rows_of, values_of
from reftlens.analysis.subspaces.directions import difference_of_means, pca
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reading import activations
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.sources import check_differs
from reftlens.editing.variant import Variant
from reftlens.interventions.interchange import Interchange
from reftlens.scoring.answers import Answers, answers, first_targets
from reftlens.scoring.statistics import difference_of, mean_of, share_of, spread_of
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit
from reftlens.training.result import FitResult


def controls(
    reft: ReFT,
    model: Bridge,
    train: Batch,
    test: Batch,
    config: FitConfig | FitResult = FitConfig(),
    *,
    base: Batch | None = None,
    values: Sequence[Hashable] | None = None,
    variable: str | None = None,
    random: int = 100,
    shuffles: int = 999,
    random_model: Bridge | bool = True,
    seed: int = 0,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Controls:
    """Score a trained exchange on held-out pairs, beside everything it has to beat, at equal budget.

    - `no edit`: the unedited model. `full vector`: the whole vector exchanged at the same sites, the ceiling.
    - `random subspaces`: of equal rank, each moving every vector as far as the trained one. The rank is that which was
      learned, where gates chose it. Their spread is shown and the trained one's rank among them, not a p: a trained
      subspace is not exchangeable with random ones.
    - `difference of means` (filled up with principal components where it has fewer directions), `PCA`: of the sources'
      activations, at equal rank.
    - `arbitrary labels`: the same training on answers that a hash of the source prompt draws. Held-out prompts are
      other ones, so what is left is what such training gives without anything to learn, about the rate of the answers;
      its training accuracy says how much can be memorised. Selectivity is what the trained subspace scores beyond it.
    - `random model`: the same training on the same architecture with random weights; scored among the answers that
      occur, as it would hardly ever name one of them.
    - p: the held-out answers shuffled among pairs (with equal own answers, where `base` is given), the subspace fixed;
      statistic: mean log-probability of the answer, edited less unedited. `p = (1 + #{≥}) / (1 + shuffles)`.

    Args:
        train: the pairs that `reft` was trained on; `config`, or the run itself: how.
        test: held-out pairs. Every row has one target token: `encode` with `end=False`, or `first_token=True` of pairs.
        base: the rows of `test` with the base's own answers as targets (`pairs.encode_base(model)`).
        values: the variable's value in the source of each row of `train`; the answer itself where it is not given.
        variable: which of several variables the claim is about; its own columns and pairs are then looked at.
        random_model: True for one drawn anew, or that model, or False to leave it out.

    Raises:
        ValueError: for an intervention without a basis or with several variables and none chosen, a row with
            several target tokens, or pairs that are equal up to what is exchanged.
    """
    for name, data in (("train", train), ("test", test)):
        if not isinstance(data, Batch):
            raise TypeError(
                f"{name} is a {type(data).__name__}, expected a Batch: controls(reft, model, train, test, run)"
            )
    settings = config.config if isinstance(config, FitResult) else config
    about, held_out = about_variable(reft, variable), pairs_of(test, variable)
    own, reused = None if base is None else rows_of(base, test, variable), Reuse.of(reuse)
    pairs = pairs_of(train, variable)
    check_differs(about.sites, pairs)
    battery = _Battery(about, model, pairs, held_out, own, settings, seed, reused, progress)
    known = None if values is None else values_of(values, train, variable)
    table = battery.table(known, random, shuffles, random_model)
    return replace(table, ledger=of_variable({"training": train, "held out": test}, variable))


@dataclass
class _Battery:
    """What all controls share."""

    reft: ReFT
    model: Bridge
    train: Batch
    test: Batch
    base: Batch | None
    config: FitConfig
    seed: int
    reuse: Reuse | None
    progress: bool

    @cached_property
    def classes(self) -> Int[Tensor, " classes"]:
        """The answers that occur."""
        data = [self.test, self.train, *([] if self.base is None else [self.base])]
        return torch.cat([first_targets(batch) for batch in data]).unique()

    def table(
        self, values: Sequence[Hashable] | None, random: int, shuffles: int, random_model: Bridge | bool
    ) -> Controls:
        fixed = self._untrained(values)
        placebos = [self._placebo(self.seed + i) for i in range(random)]
        refts = [*fixed.values(), *placebos]
        scores, gained = self._scores(self.model, self.test, refts, progress=self.progress)
        names = ["no edit", *fixed]
        rows = {n: Control(n, share_of(scores.hits[i]), mean_of(gained[i])) for i, n in enumerate(names)}
        accuracy = self._scores(self.model, self.train, [self.reft])[0].hits[1].float().mean().item()
        rows["trained"] = replace(rows["trained"], train_accuracy=accuracy)
        drawn = torch.stack([x[len(names) :].double().mean(dim=1) for x in (scores.hits, gained)])
        if random:
            hits, gain = (spread_of(values, values.mean().item(), random) for values in drawn)
            rows["random subspaces"] = Control("random subspaces", hits, gain)
        rows["arbitrary labels"], arbitrary = self._arbitrary()
        if random_model is not False:
            rows["random model"] = self._random_model(random_model)
        trained = names.index("trained")
        gains, column = scores.log_probs[trained] - scores.log_probs[0], self._column(self.test)
        own = None if self.base is None else first_targets(self.base)
        p = shuffled_p(gains, column, own, shuffles, self.seed) if movable(column, own) else math.nan
        selectivity = difference_of(scores.hits[trained], arbitrary)
        spread, dimensions = tuple(map(tuple, drawn.T.tolist())), tuple(self.dimensions.values())
        return Controls(tuple(rows.values()), spread, p, shuffles, selectivity, dimensions, self.test.among)

    @cached_property
    def dimensions(self) -> dict[Site, int]:
        """Of the subspace at each site: the rank it was given, or learned."""
        return {site: basis_of(module).shape[1] for site, module in self.reft.items()}

    def _placebo(self, seed: int) -> ReFT:
        ranks = self.dimensions
        return ReFT({site: Placebo(movement_of(m), ranks[site], seed) for site, m in self.reft.items()})

    def _untrained(self, values: Sequence[Hashable] | None) -> dict[str, ReFT]:
        """What is not trained anew: the subspace itself, the ceiling, the directions of the sources' activations."""
        keys = first_targets(self.train).tolist() if values is None else list(values)
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        source = self.train.sources["source"]
        donors = source.batch[source.rows.tolist()]
        means, principal = {}, {}
        for site in self.reft:
            x = activations(self.model, donors, site, progress=False)
            counts = site.positions.mask(donors.view).sum(dim=1).cpu()
            labels = torch.tensor([order[key] for key in keys]).repeat_interleave(counts)
            components = pca(x, self.dimensions[site])
            if len(order) > 1:
                means[site] = filled_up(difference_of_means(x, labels), components).as_exchange()
            principal[site] = components.as_exchange()
        refts = {"trained": self.reft, "full vector": ReFT({s: Interchange(m.d) for s, m in self.reft.items()})}
        if means:
            refts["difference of means"] = ReFT(means)
        return refts | {"PCA": ReFT(principal)}

    def _trained_anew(self, model: Bridge, data: Batch) -> ReFT:
        copy = self.reft.clone().to(device_of(model))
        copy.reset(self.seed)
        fit(copy, model, data, self.config, reuse=self.reuse or False, progress=self.progress)
        return copy

    def _column(self, data: Batch) -> Int[Tensor, " pair"]:
        """The place of each row's answer among the classes."""
        return torch.searchsorted(self.classes, first_targets(data))

    def _scores(
        self, model: Bridge, data: Batch, refts: Sequence[ReFT], *, progress: bool = False
    ) -> tuple[Answers, Float[Tensor, "plan pair"]]:
        """Of the unedited model and each of `refts`; and how much log-probability the answer gains."""
        plans = {"no edit": Plan(refts[0], Variant(strength=0.0))}
        plans |= {str(number): Plan(reft) for number, reft in enumerate(refts)}
        tokens = self.classes.expand(len(data), -1)
        scores = answers(model, data, plans, tokens, reuse=self.reuse, progress=progress, describe="controls")
        return scores, (scores.log_probs - scores.log_probs[:1])[:, torch.arange(len(data)), self._column(data)]

    def _arbitrary(self) -> tuple[Control, Bool[Tensor, " pair"]]:
        """The control, and its hits."""
        train, test = (relabelled(data, self.classes, self.seed) for data in (self.train, self.test))
        reft = self._trained_anew(self.model, train)
        scores, gained = self._scores(self.model, test, [reft])
        accuracy = self._scores(self.model, train, [reft])[0].hits[1].float().mean().item()
        return Control("arbitrary labels", share_of(scores.hits[1]), mean_of(gained[1]), accuracy), scores.hits[1]

    def _random_model(self, network: Bridge | bool) -> Control:
        """Hits are among the candidate answers: of all tokens, an untrained model hardly ever names one of them."""
        model = untrained_copy(self.model, self.seed) if isinstance(network, bool) else network
        reft = self._trained_anew(model, self.train)
        hits = []
        for data in (self.train, self.test):
            scores, gained = self._scores(model, data, [reft])
            hits.append(scores.log_probs[1].argmax(dim=1) == self._column(data))
        return Control("random model", share_of(hits[1]), mean_of(gained[1]), hits[0].float().mean().item())
