"""How much a trained subspace means: the same score for everything that could have reached it without meaning it."""

import math
from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import arbitrary_targets

from reftlens.analysis.causal.control_table import Control, Controls, warnings_of
from reftlens.analysis.causal.permutation import movable, shuffled_p
from reftlens.analysis.causal.variable import about_variable, basis_of, pairs_of, rows_of
from reftlens.analysis.statistics import Estimate, difference_of, mean_of, share_of
from reftlens.analysis.subspaces.directions import Direction, difference_of_means, pca
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.cone.reuse import Reuse
from reftlens.editing.reading import activations
from reftlens.editing.reft import ReFT, Variant
from reftlens.interventions.interchange import Exchange, Interchange
from reftlens.interventions.subspace import orthonormal
from reftlens.scoring.answers import answers, first_targets
from reftlens.text.batch import Batch
from reftlens.training.config import FitConfig
from reftlens.training.fitting import run_fit
from reftlens.training.result import FitResult


class Placebo(Exchange):
    """An exchange in a random subspace that moves each vector exactly as far as the trained one does.

    `h' = h + strength · (away R) Rᵀ · ‖away B‖ / ‖away R‖` with `away = source - h`, `B` the trained basis, `R` the
    random one. What it also reaches comes from moving that far.
    """

    kind = "Placebo"

    def __init__(self, trained: Float[Tensor, "d rank"], seed: int) -> None:
        super().__init__(trained.shape[0], trained.shape[1])
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(trained.shape, generator=generator, dtype=torch.float64)
        self.register_buffer("trained", trained.detach().float())
        self.register_buffer("drawn", orthonormal(drawn).float().to(trained.device))

    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        assert basis is not None
        theirs, mine = away[..., 0, :] @ self.get_buffer("trained").to(h.dtype), away[..., 0, :] @ basis
        return mine * theirs.norm(dim=-1, keepdim=True) / mine.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    def basis(self) -> Tensor:
        return self.get_buffer("drawn")

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "rank": self.rank}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Nothing is trained, so nothing changes."""


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
    - `random subspaces`: of equal rank, each moving every vector as far as the trained one. Their spread is shown and
      the trained one's rank among them, not a p: a trained subspace is not exchangeable with random ones.
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
        test: held-out pairs. Every row has one target token.
        base: the rows of `test` with the base's own answers as targets (`pairs.encode_base(model)`).
        values: the variable's value in the source of each row of `train`; the answer itself where it is not given.
        variable: which of several variables the claim is about; its own columns and pairs are then looked at.
        random_model: True for one drawn anew, or that model, or False to leave it out.

    Raises:
        ValueError: for an intervention without a basis or with several variables and none chosen, or a row with
            several target tokens.
    """
    settings = config.config if isinstance(config, FitResult) else config
    maker = _Maker(
        about_variable(reft, variable), model, pairs_of(train, variable), pairs_of(test, variable),
        None if base is None else rows_of(base, test, variable), settings, seed, reuse, progress,
    )  # fmt: skip
    return maker.made(values, random, shuffles, random_model)


@dataclass
class _Maker:
    """What all controls share."""

    reft: ReFT
    model: Bridge
    train: Batch
    test: Batch
    base: Batch | None
    config: FitConfig
    seed: int
    reuse: bool | Reuse
    progress: bool

    def made(
        self, values: Sequence[Hashable] | None, random: int, shuffles: int, random_model: Bridge | bool
    ) -> Controls:
        labels = first_targets(self.test)
        owns = None if self.base is None else first_targets(self.base)
        classes = torch.cat([labels, first_targets(self.train)] + ([] if owns is None else [owns])).unique()
        fixed = self._fixed(values)
        placebos = [self._each(lambda m, i=i: Placebo(basis_of(m), self.seed + i)) for i in range(random)]
        plans = [(self.reft, Variant(strength=0.0)), *((r, Variant()) for r in [*fixed.values(), *placebos])]
        found = answers(self.model, self.test, plans, classes.expand(len(self.test), -1), batch_size=16,
                        reuse=self.reuse, progress=self.progress, describe="controls")  # fmt: skip
        gained = found.log_probs - found.log_probs[:1]
        column = torch.searchsorted(classes, labels)
        per_pair = gained[:, torch.arange(len(labels)), column]
        names = ["no edit", *fixed]
        rows = {n: Control(n, share_of(found.hits[i]), mean_of(per_pair[i])) for i, n in enumerate(names)}
        rows["trained"] = replace(rows["trained"], train_accuracy=self._accuracy(self.reft, self.model, self.train))
        drawn = slice(len(names), None)
        if random:
            hits, gains = found.hits[drawn].float().mean(dim=1), per_pair[drawn].mean(dim=1)
            rows["random subspaces"] = Control("random subspaces", _spread(hits), _spread(gains))
            spread = tuple(zip(hits.tolist(), gains.tolist(), strict=True))
        else:
            spread = ()
        arbitrary, hits = self._arbitrary(classes)
        rows["arbitrary labels"] = arbitrary
        if random_model is not False:
            rows["random model"] = self._random_model(random_model, classes)
        trained = names.index("trained")
        p = shuffled_p(gained[trained], column, owns, shuffles, self.seed) if movable(column, owns) else math.nan
        selectivity = difference_of(found.hits[trained], hits)
        result = Controls(tuple(rows.values()), spread, p, shuffles, selectivity, ())
        return replace(result, warnings=tuple(warnings_of(result)))

    def _each(self, make: Any) -> ReFT:
        return ReFT({site: make(module) for site, module in self.reft.items()})

    def _fixed(self, values: Sequence[Hashable] | None) -> dict[str, ReFT]:
        """What is not trained anew: the subspace itself, the ceiling, the directions of the sources' activations."""
        keys = first_targets(self.train).tolist() if values is None else list(values)
        if len(keys) != len(self.train):
            raise ValueError(f"values has {len(keys)} entries, and the training data {len(self.train)} rows")
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        source = self.train.sources["source"]
        rows = source.rows.tolist()
        read = source.batch[rows]
        means, principal = {}, {}
        for site, module in self.reft.items():
            x = activations(self.model, read, site, progress=False)
            counts = site.positions.mask(read.view).sum(dim=1).cpu()
            labels = torch.tensor([order[key] for key in keys]).repeat_interleave(counts)
            components = pca(x, module.rank)
            if len(order) > 1:
                means[site] = _filled(difference_of_means(x, labels), components).as_exchange()
            principal[site] = components.as_exchange()
        named = {"trained": self.reft, "full vector": self._each(lambda m: Interchange(m.d))}
        if len(means) == len(self.reft):
            named["difference of means"] = ReFT(means)
        return named | {"PCA": ReFT(principal)}

    def _trained_anew(self, model: Bridge, data: Batch) -> ReFT:
        copy = self.reft.clone().to(device_of(model))
        copy.reset(self.seed)
        run_fit(copy, model, data, self.config, reuse=Reuse.of(self.reuse), progress=self.progress)
        return copy

    def _accuracy(self, reft: ReFT, model: Bridge, data: Batch) -> float:
        return self._scored(reft, model, data)[0].float().mean().item()

    def _scored(self, reft: ReFT, model: Bridge, data: Batch) -> tuple[Bool[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Hits, and the log-probability of the answer gained by the edit."""
        plans = [(reft, Variant(strength=0.0)), (reft, Variant())]
        found = answers(model, data, plans, first_targets(data)[:, None], reuse=self.reuse, progress=False)
        return found.hits[1], found.log_probs[1, :, 0] - found.log_probs[0, :, 0]

    def _arbitrary(self, classes: Int[Tensor, " classes"]) -> tuple[Control, Bool[Tensor, " pair"]]:
        train, test = (relabelled(data, classes, self.seed) for data in (self.train, self.test))
        reft = self._trained_anew(self.model, train)
        hits, gained = self._scored(reft, self.model, test)
        trained = self._accuracy(reft, self.model, train)
        return Control("arbitrary labels", share_of(hits), mean_of(gained), trained), hits

    def _random_model(self, given: Bridge | bool, classes: Int[Tensor, " classes"]) -> Control:
        """Hits are among the candidate answers: of all tokens, an untrained model hardly ever names one of them."""
        twin = untrained_copy(self.model, self.seed) if isinstance(given, bool) else given
        reft = self._trained_anew(twin, self.train)
        plans, hits = [(reft, Variant(strength=0.0)), (reft, Variant())], []
        for data in (self.train, self.test):
            found = answers(twin, data, plans, classes.expand(len(data), -1), reuse=self.reuse, progress=False)
            column = torch.searchsorted(classes, first_targets(data))
            hits.append(found.log_probs[1].argmax(dim=1) == column)
        gained = (found.log_probs[1] - found.log_probs[0])[torch.arange(len(column)), column]
        return Control("random model", share_of(hits[1]), mean_of(gained), hits[0].float().mean().item())


def relabelled(data: Batch, classes: Int[Tensor, " classes"], seed: int) -> Batch:
    """`data` with another answer for each row: one of `classes`, drawn by a hash of its source prompt."""
    counts = data.target_mask.sum(dim=1)
    for row in (counts != 1).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"row {row} has {int(counts[row])} target tokens, and controls relabel one: encode the first token of "
            "each answer only"
        )
    source = data.sources["source"]
    keys = [
        tuple(ids[real].tolist()) for ids, real in zip(source.batch.tokens, source.batch.attention_mask, strict=True)
    ]
    drawn = arbitrary_targets([keys[i] for i in source.rows.tolist()], len(classes), seed)
    tokens = data.tokens.clone()
    tokens[data.target_mask] = classes[drawn].to(tokens)
    return replace(data, tokens=tokens)


def untrained_copy(model: Bridge, seed: int) -> Any:
    """A bridge of the same architecture with weights drawn as the architecture draws them, never trained."""
    from transformer_lens.model_bridge import TransformerBridge

    original: Any = model.original_model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        twin = type(original)(deepcopy(original.config))
    dtype, device = next(original.parameters()).dtype, device_of(model)
    return TransformerBridge.boot_transformers(
        model.cfg.model_name, hf_model=twin.to(device, dtype).eval(), tokenizer=model.tokenizer, device=str(device),
        dtype=dtype,
    ).eval()  # fmt: skip


def _spread(values: Float[Tensor, " draws"]) -> Estimate:
    """Mean of the random draws, with their own 2.5 % and 97.5 % quantiles."""
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(values.double().mean().item(), low, high, len(values))


def _filled(means: Direction, components: Direction) -> Direction:
    """The first columns of `means`, as many as `components`; where there are too few, filled up with those."""
    rank, basis = components.basis.shape[1], means.basis
    missing = rank - basis.shape[1]
    if missing <= 0:
        return replace(means, basis=basis[:, :rank], scale=means.scale[:rank])
    left = components.basis - basis @ (basis.T @ components.basis)
    more = torch.linalg.svd(left, full_matrices=False).U[:, :missing]
    return replace(means, basis=orthonormal(torch.cat([basis, more], dim=1)), scale=means.scale.new_ones(rank))
