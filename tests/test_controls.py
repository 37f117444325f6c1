"""Planted truth and its twin: the controls let a real subspace through, and nothing else."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from planted import ANSWERS, VALUES, D, pairs, planted

from reftlens.cone.plans import plans_of

TRAIN, TEST = list(VALUES)[:200], list(VALUES)[200:]


def _data(value):
    train, _ = pairs(value, 512, 1, TRAIN)
    return train, *pairs(value, 130, 2, TEST)


@cache
def _trained(rank, shuffled=False):
    """`(planted, das, config, train, test, base)`; `shuffled` gives every value token another value's answer."""
    import reftlens as rl

    truth = planted()
    value = truth.value[torch.randperm(len(truth.value), generator=torch.Generator().manual_seed(5))]
    train, test, base = _data(value if shuffled else truth.value)
    config = rl.FitConfig(steps=50, lr=3e-2, batch_size=64)
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(D, rank=rank)})
    das.reset(0)
    rl.fit(das, truth.model, train, config, progress=False)
    return truth, das, config, train, test, base


def _controls(rank, shuffled=False, **kwargs):
    import reftlens as rl

    truth, das, config, train, test, base = _trained(rank, shuffled)
    return rl.controls(das, truth.model, train, test, config, base=base, progress=False, **kwargs)


def test_das_of_the_right_rank_finds_the_planted_plane():
    import reftlens as rl

    truth, das, _, _, test, base = _trained(2)
    scores = rl.causal.interchange_scores(das, truth.model, test, base=base, progress=False)
    assert scores.accuracy.value > 0.99 and scores.restricted.value > 0.99
    assert torch.linalg.svdvals(das[0].basis().T @ truth.subspace).min() > 0.99
    assert scores.log_odds_ratio.low > 1.0
    assert scores.logit_difference_recovered.value == pytest.approx(1.0, abs=0.1)


def test_too_small_a_rank_does_not():
    import reftlens as rl

    truth, das, _, _, test, base = _trained(1)
    scores = rl.causal.interchange_scores(das, truth.model, test, base=base, progress=False)
    assert scores.accuracy.high < 0.9


@pytest.mark.slow
def test_a_planted_subspace_survives_every_control():
    table = _controls(2, random=40)
    assert table.p < 0.01 and table.rank == 1 and len(table.random) == 40
    assert table["trained"].accuracy.low > 0.97 and table["full vector"].accuracy.value > 0.99
    assert table.selectivity.low > 0.5
    assert table["random model"].accuracy.high < 0.6
    assert table["random subspaces"].accuracy.value < 0.6
    untrained = [w for w in table.warnings if "without training" not in w]
    assert not untrained, "what is planted linearly, difference of means may find too; nothing else is said"


@pytest.mark.slow
def test_shuffled_labels_do_not_survive_them():
    table = _controls(2, shuffled=True, random=10, random_model=False)
    assert table.p > 0.05 and table["trained"].accuracy.value < 0.5
    assert any("shuffled labels" in w for w in table.warnings) and any("no edit" in w for w in table.warnings)


@pytest.mark.slow
def test_random_subspaces_do_not_survive_them():
    import reftlens as rl

    truth, _, _, train, test, base = _trained(2)
    ranks = []
    for seed in (11, 12, 13):
        das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(D, rank=2, generator=torch.Generator().manual_seed(seed))})
        settings = dict(base=base[:80], random=30, random_model=False, progress=False)
        table = rl.controls(das, truth.model, train[:64], test[:80], rl.FitConfig(steps=1), **settings)
        ranks.append(table.rank)
        assert any("no edit" in w for w in table.warnings)
    assert sum(ranks) > 15, "their place among others of their kind is anywhere"


def test_the_table_can_be_read_and_seen():
    import reftlens as rl

    truth, das, _, train, test, base = _trained(2)
    settings = dict(base=base[:40], random=3, random_model=False, shuffles=99, progress=False)
    once, again = (
        rl.controls(das, truth.model, train[:64], test[:40], rl.FitConfig(steps=3), **settings) for _ in range(2)
    )
    assert list(once.to_frame().index) == [row.name for row in once.rows]
    assert "selectivity" in str(once) and "permutation p" in str(once)
    assert "accuracy" in once.plot().get_xlabel()
    assert once == again, "seeds are explicit: the same again"


def test_what_controls_cannot_be_made_of_is_said():
    import reftlens as rl

    truth, _, config, train, test, _ = _trained(2)
    place = rl.resid_post(1, "last")
    with pytest.raises(ValueError, match="exchanges nothing"):
        rl.controls(rl.ReFT({place: rl.LoReFT(D, rank=1)}), truth.model, train, test, config)
    with pytest.raises(ValueError, match="say which with variable"):
        rl.controls(rl.ReFT({place: rl.DAS(D, variables={"a": 1, "b": 1})}), truth.model, train, test, config)
    _, das, _, _, _, base = _trained(2)
    with pytest.raises(ValueError, match=f"base has 4 row.*, and the data {len(test)}"):
        rl.controls(das, truth.model, train, test, config, base=base[:4])
    with pytest.raises(ValueError, match="row 0: base has the prompt"):
        rl.controls(das, truth.model, train, test, config, base=base[list(range(len(base)))[::-1]])
    itself = train.with_sources(replace(train, sources={}))
    with pytest.raises(ValueError, match="an exchange changes nothing"):
        rl.controls(das, truth.model, itself, test, config)
    with pytest.raises(ValueError, match="no subspace to compare"):
        rl.controls(rl.ReFT({place: rl.Interchange(D)}), truth.model, train, test, config)


def test_values_are_of_all_rows_where_one_of_several_variables_is_looked_at():
    import reftlens as rl

    truth, _, _, train, test, _ = _trained(2)

    def of_two(data):
        half = len(data) // 2
        halves = {"p": data[:half], "q": data[half:]}
        return data.join([replace(half, sources={n: half.sources["source"]}) for n, half in halves.items()])

    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(D, variables={"p": 2, "q": 1})})
    settings = dict(variable="p", random=1, shuffles=9, random_model=False, progress=False)
    both, held_out, config = of_two(train[:64]), of_two(test[:40]), rl.FitConfig(steps=1)
    answers = both.target_ids.tolist()
    named = rl.controls(das, truth.model, both, held_out, config, values=answers, **settings)
    assert named == rl.controls(das, truth.model, both, held_out, config, **settings), "the answers are the values"
    with pytest.raises(ValueError, match="values has 32 entries, and the training data 64 rows"):
        rl.controls(das, truth.model, both, held_out, config, values=answers[:32], **settings)


def test_labels_shuffle_within_their_strata():
    from reftlens.analysis.causal.permutation import shuffled_p

    gained = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert shuffled_p(gained, labels, None, 999, 0) < 0.05
    assert shuffled_p(gained, labels, labels, 99, 0) == 1.0, "within a stratum of equal labels nothing changes"


def test_labels_that_no_shuffle_can_change_give_no_p():
    from reftlens.analysis.causal.permutation import movable

    own, changed = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 1, 0])
    assert movable(changed, None) and not movable(changed, own)
    assert movable(torch.tensor([1, 0, 0, 0]), own) and not movable(torch.zeros_like(own), None)


def test_what_cannot_be_told_is_not_called_no_evidence():
    from reftlens.analysis.causal.control_table import Control, Controls
    from reftlens.scoring.statistics import Estimate

    def warnings(p, shuffles):
        good, poor = Estimate(0.9, 0.8, 1.0, 50), Estimate(0.5, 0.4, 0.6, 50)
        rows = [Control("trained", good, good), Control("full vector", good, good), Control("no edit", poor, poor)]
        return Controls(tuple(rows), (), p, shuffles, Estimate(0.4, 0.3, 0.5, 50), (1,)).warnings

    assert warnings(0.001, 999) == ()
    (few,) = warnings(0.05, 19)
    assert few == "19 shuffles are too few to tell: p cannot be below 0.05"
    (none,) = warnings(math.nan, 999)
    assert "no shuffle can change an answer" in none
    (high,) = warnings(0.3, 999)
    assert "no evidence" in high


def test_p_is_calibrated_on_labels_that_mean_nothing():
    """The labels of one network's pairs drawn anew 300 times, apart from its inputs: 2 % to 8 % have p < 0.05."""
    import reftlens as rl
    from architectures import fresh_bridge
    from reftlens.analysis.causal.permutation import shuffled_p
    from reftlens.scoring.answers import answers, first_targets

    def labelled(seed):
        value = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1000 + seed))
        return pairs(value, 60, 1, TEST)  # the same prompts, other answers

    model = fresh_bridge("gpt2", 0)
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(D, rank=2)})
    das.reset(0)
    value = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0))
    rl.fit(das, model, pairs(value, 64, 0, TRAIN)[0], steps=10, lr=3e-2, batch_size=32, progress=False)
    classes, (test, base) = torch.tensor(ANSWERS), labelled(0)
    plans = plans_of(das, {"unedited": rl.Variant(strength=0.0), "edited": rl.Variant()})
    unedited, edited = answers(model, test, plans, classes.expand(60, -1), progress=False).log_probs
    p = []
    for seed in range(300):
        targets, own = (torch.searchsorted(classes, first_targets(data)) for data in labelled(seed))
        p.append(shuffled_p(edited - unedited, targets, own, 199, seed))
    assert p[0] == rl.causal.permutation_p(das, model, test, base=base, shuffles=199), "as it is called"
    assert 0.02 <= sum(x < 0.05 for x in p) / len(p) <= 0.08
    assert 0.4 < sum(p) / len(p) < 0.6
