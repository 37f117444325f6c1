"""The parts of an edit that do its work are kept, on rows that they were not chosen by."""

from functools import cache

import pytest
import torch
from planted import pairs, planted

QUIET = {"progress": False}


@cache
def trained():
    """DAS at every token of the prompt, of which the last holds the value; and the rows."""
    import reftlens as rl

    data = pairs(planted().value, 48, 1)[0]
    das = rl.ReFT({rl.resid_post(layer, "prompt"): rl.DAS(32, basis=planted().subspace) for layer in (0, 1)})
    return das, data


def test_the_token_that_holds_the_value_is_critical():
    import reftlens as rl

    das, data = trained()
    result = rl.selection.critical(das, planted().model, data, count=1, **QUIET)
    assert result.parts == ("-1",) and len(result.ranking.whole) == len(result.test.gained[0]) == 24
    whole, alone = result.test.effect("whole edit").value, result.test.effect("critical").value
    assert alone == pytest.approx(whole, rel=0.05) and alone > 0.5
    assert all(abs(result.test.effect(label).value) < 0.1 for label in result.others) and result.others
    assert [str(site.positions) for site in result.reft.sites] == ["Nth(k=-1, missing='skip')"] * 2
    assert "100% of the effect" in str(result)
    scores = rl.causal.interchange_scores(result.reft, planted().model, data, **QUIET)
    assert torch.equal(scores.hits, rl.causal.interchange_scores(das, planted().model, data, **QUIET).hits)


def test_a_site_that_does_nothing_is_not_critical():
    import reftlens as rl

    das, data = trained()
    model, sites = planted().model, [rl.resid_post(0, "first"), rl.resid_post(1, "last"), rl.resid_post(1, "first")]
    both = rl.ReFT({site: das[0].__class__(32, basis=planted().subspace) for site in sites})
    result = rl.selection.critical(both, model, data, "sites", count=1, by="lost", **QUIET)
    assert result.reft.sites == (sites[1],) and result.plot().get_ylabel()
    with pytest.raises(ValueError, match="3 sites, and count=3 are to be kept"):
        rl.selection.critical(both, model, data, "sites", count=3, **QUIET)


def test_a_part_that_few_rows_have_counts_as_nothing_in_the_others(gpt2):
    """By its mean over the rows that have it, a token of the one long prompt was critical, for more than all."""
    import reftlens as rl

    data = rl.encode(gpt2, [rl.Example(f"the cat {word}" + " a dog" * (i > 5), " a") for i, word in enumerate(WORDS)])
    reft = rl.ReFT({rl.resid_post(1, "prompt"): rl.LoReFT(gpt2.cfg.d_model, 2)})
    reft.reset(4)
    result = rl.selection.critical(reft, gpt2, data, count=1, seed=2, **QUIET)
    sums = torch.where(result.ranking.edited, result.ranking.alone, 0.0).nansum(dim=1)
    assert not result.ranking.edited.all() and result.parts == (result.ranking.parts[sums.argmax()],)
    means = torch.tensor([result.ranking.effect(part).value for part in result.ranking.parts])
    assert means.argmax() != sums.argmax()
    gained = torch.where(result.test.edited, result.test.gained, 0.0).sum(dim=1)
    assert f"{gained[1] / gained[0]:.0%} of the effect of the whole edit" in str(result)


WORDS = ("sat", "ran", "looked", "moon", "hill", "mat", "green", "dog")


def test_the_best_places_of_a_map_are_sites():
    import reftlens as rl
    from reftlens.analysis.causal.map_results import Cell

    right, wrong = (True,) * 4, (False,) * 4
    cells = [
        Cell(layer, position, rank, 0, hits, hits[::-1], 0.5)
        for layer, position, rank, hits in (
            (0, "last", 1, wrong), (2, "last", 1, wrong), (2, "last", 2, right), (1, "name", 1, right[:3] + wrong[:1]),
        )
    ]  # fmt: skip
    grid = rl.causal.InterchangeMap(tuple(cells), 0.0)
    (site,) = rl.selection.critical_sites(grid)
    assert site == rl.resid_post(2, "last")
    named = rl.selection.critical_sites(grid, 2, positions={"last": "last", "name": "f1"}, at=rl.resid_pre)
    assert list(named) == [rl.resid_pre(2, "last"), rl.resid_pre(1, "f1")]
    assert [estimate.value for estimate in named.values()] == [1.0, 0.75]
    with pytest.raises(ValueError, match="count=4, and the map has 3 places"):
        rl.selection.critical_sites(grid, 4)
    with pytest.raises(TypeError, match="InterchangeMap"):  # or by the annotation, where that is checked
        rl.selection.critical_sites({})
