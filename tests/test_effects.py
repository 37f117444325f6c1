"""Effects with a known truth: what is read has its effect, what is not has none, and parts add up where they must."""

import re
from functools import cache

import pytest
import torch
from planted import CORNERS, VALUES, D, pairs, planted

from architectures import bridge

QUIET = dict(progress=False)


@cache
def _scene():
    """The planted network, 24 rows of three fillers and a value that answer another row's value, and a LoReFT."""
    truth = planted()
    data, _ = pairs(truth.value, 24, 3)
    return truth, data


def _vector(truth, corner=0, length=4.0):
    import reftlens as rl

    return rl.SteeringVector(D, length * truth.subspace @ CORNERS[corner])


def _das(truth, positions="prompt", layer=1):
    import reftlens as rl

    das = rl.DAS(D, basis=truth.subspace)
    return rl.ReFT({rl.resid_post(layer, positions): das})


def test_the_one_position_that_is_read_does_all_of_it_and_the_fillers_nothing():

    import reftlens as rl

    truth, data = _scene()
    found = rl.effects(_das(truth), truth.model, data, **QUIET)
    assert found.parts == ("-4", "-3", "-2", "-1") and found.edited.all()
    assert torch.allclose(found.alone[3], found.whole, atol=1e-6) and found.effect("-1").low > 1.0
    assert (found.left_out[3] == 0).all(), "without it nothing that is read is edited"
    assert (found.alone[:3] == 0).all() and torch.allclose(found.left_out[:3], found.whole.expand(3, -1), atol=1e-6)
    assert found.lost_without("-1").value == pytest.approx(found.effect("-1").value)
    assert found.whole_accuracy.mean() > 0.95 > 0.6 > found.unedited_accuracy.mean()
    assert torch.equal(found.left_out_accuracy[3], found.unedited_accuracy)
    p, corrected = found.tests
    assert (corrected[:, 3] < 0.01).all() and (p[0, :3] == 1).all() and (corrected >= p).all()


def test_positions_and_sites_equal_separate_evaluations():
    import reftlens as rl
    from reftlens.text.positions.spelling import as_positions

    model, data = bridge("gpt2"), _ragged()
    where = {"start": "first", "cat": rl.positions.Tokens("cat", missing="skip"), "end": "l2"}
    reft = _two_layers(model)

    def gained(among=None, sites=None):
        found = rl.evaluate(reft, model, data, [0, rl.Variant(among=among, sites=sites)], **QUIET)
        return found.loss[0] - found.loss[1], found.accuracy[1]

    by_place = rl.effects(reft, model, data, positions=where, **QUIET)
    for i, label in enumerate(where):
        chosen = as_positions(where[label])
        for way, accuracy, among in (
            (by_place.alone, by_place.alone_accuracy, chosen),
            (by_place.left_out, by_place.left_out_accuracy, rl.positions.All() - chosen),
        ):
            rows = by_place.edited[i]
            expected = gained(among=among)
            assert torch.allclose(way[i, rows], expected[0][rows], atol=2e-5)
            assert torch.equal(accuracy[i, rows], expected[1][rows])
    by_site = rl.effects(reft, model, data, of="sites", **QUIET)
    for i in range(2):
        assert torch.allclose(by_site.alone[i], gained(sites=[i])[0], atol=2e-5)
        assert torch.allclose(by_site.left_out[i], gained(sites=[1 - i])[0], atol=2e-5)
    cells = rl.effects(reft, model, data, of="cells", positions=where, **QUIET)
    assert cells.hooks == tuple(site.hook for site in reft.sites) and cells.positions == tuple(where)
    for i in range(2):
        for j, label in enumerate(where):
            rows = cells.edited[i, j]
            assert torch.allclose(cells.gained[i, j, rows], gained(where[label], [i])[0][rows], atol=2e-5)


def _ragged():
    import reftlens as rl

    prompts = ["the cat sat", "a dog ran by the green hill while", "the moon"]
    return rl.encode(bridge("gpt2"), [rl.Example(p, " and looked") for p in prompts])


def _two_layers(model, positions="prompt"):
    import reftlens as rl

    sites = [rl.resid_post(layer, positions) for layer in (0, 1)]
    reft = rl.ReFT({site: rl.LoReFT(int(model.cfg.d_model), rank=2) for site in sites})
    reft.reset(3)
    return reft


def test_short_prompts_are_not_counted_where_they_have_no_token():

    import reftlens as rl

    model, data = bridge("gpt2"), _ragged()
    found = rl.effects(_two_layers(model, "all"), model, data, **QUIET)
    lengths = data.prompt_mask.sum(dim=1)
    assert found.parts == (*(str(-k) for k in range(int(lengths.max()), 0, -1)), "response")
    expected = [int((lengths >= k).sum()) for k in range(int(lengths.max()), 0, -1)] + [len(data)]
    assert found.edited.sum(dim=1).tolist() == expected == found.to_frame()["n"].tolist()
    assert found.effect(found.parts[0]).count == 1


def test_with_one_site_alone_is_the_whole_and_left_out_is_nothing():

    import reftlens as rl

    truth, data = _scene()
    found = rl.effects(_das(truth, "last"), truth.model, data, of="sites", **QUIET)
    assert torch.allclose(found.alone[0], found.whole, atol=1e-6) and (found.left_out == 0).all()


def test_a_site_that_nothing_reads_has_no_effect_at_all():
    import reftlens as rl

    truth, data = _scene()
    reft = rl.ReFT({rl.resid_post(0, "f1"): _vector(truth), rl.resid_post(1, "last"): _vector(truth)})
    found = rl.effects(reft, truth.model, _plain(data), of="sites", **QUIET)
    assert (found.alone[0] == 0).all() and found.effect(found.parts[1]).value != 0
    both = rl.effects(reft, truth.model, _plain(data), of="pairs", **QUIET)
    assert both.excess[0, 1].abs().max() < 1e-5
    cells = rl.effects(reft, truth.model, _plain(data), of="cells", **QUIET)
    assert cells.edited.any(dim=-1).tolist() == [[True, False], [False, True]] and cells.positions == ("-4", "-1")
    assert cells.tests[0][0, 0] == 1.0 and cells.mean[0, 0] == 0 and cells.mean[0, 1].isnan()
    assert len(cells.to_frame()) == 2


def _plain(data):
    from dataclasses import replace

    return replace(data, sources={})


def test_sites_that_act_on_different_answers_add_up_and_two_on_one_answer_do_not():
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows

    truth, _ = _scene()
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor(list(VALUES))[torch.randint(0, len(VALUES), (20, 2), generator=generator)]
    data = batch_from_rows(
        [[60, int(a), 41, int(b), 40] for a, b in value],
        [[1, 1, 2, 2, 2]] * 20,
        [[False, False, True, False, True]] * 20,
    )
    first, later, again = rl.resid_post(1, "last"), rl.resid_post(1, [3]), rl.resid_post(2, "last")
    reft = rl.ReFT({site: _vector(truth, corner) for site, corner in ((first, 1), (later, 0), (again, 1))})
    found = rl.effects(reft, truth.model, data, of="pairs", **QUIET)
    assert found.excess[0, 1].abs().max() < 1e-5 and found.excess[1, 2].abs().max() < 1e-5
    assert found.interaction(found.sites[0], found.sites[2]).high < -0.1, (
        "both push the same answer, which is certain soon"
    )
    variants = [rl.Variant(sites=s) for s in ([0], [2], [0, 2])]
    alone = [rl.evaluate(reft, truth.model, data, [0, variant], **QUIET).loss for variant in variants]
    one, two, both = (unedited - edited for unedited, edited in alone)
    assert torch.allclose(found.excess[0, 2], both - one - two, atol=1e-5)
    assert found.excess[0, 2].equal(found.excess[2, 0]) and found.excess[0, 0].isnan().all()
    frame = found.to_frame().set_index(["site", "other"])
    p = frame["p_holm"]
    assert found.sites == (str(first), str(later), again.hook), "hooks, and positions where they tell sites apart"
    assert p.loc[(found.sites[0], found.sites[2])] < 0.05 < p.loc[(found.sites[0], found.sites[1])]


def test_only_what_exchanges_needs_the_source():
    """A ReFT of an exchange and a vector: each is scored alone though only one of them takes a source."""
    import reftlens as rl

    truth, data = _scene()
    das = _das(truth, "last")
    reft = rl.ReFT({das.sites[0]: das[0], rl.resid_post(2, "last"): _vector(truth)})
    found = rl.effects(reft, truth.model, data, of="sites", **QUIET)
    alone = rl.evaluate(das, truth.model, data, **QUIET)
    expected = alone.loss[0] - alone.loss[1]
    assert torch.allclose(found.alone[0], expected, atol=1e-5)
    assert rl.effects(reft, truth.model, data, of="pairs", **QUIET).excess[0, 1].abs().max() > 0.1
    with pytest.raises(ValueError, match="has no such source"):
        rl.effects(reft, truth.model, _plain(data), of="sites", **QUIET)
    with pytest.raises(ValueError, match="no intervention exchanges"):
        more = data.with_sources({**data.sources, "other": data.sources["source"]})
        rl.effects(reft, truth.model, more, of="sites", **QUIET)


def test_the_map_of_a_planted_network_finds_the_one_position_and_corrects_its_p():
    import reftlens as rl
    from reftlens.scoring.statistics import holm

    truth, data = _scene()
    found = rl.effects(_das(truth), truth.model, data, of="cells", **QUIET)
    p, corrected = found.tests
    assert torch.equal(corrected.flatten(), holm(p.flatten()))
    assert (corrected[0] < 0.05).tolist() == [False, False, False, True]
    assert corrected[0, 3] == pytest.approx(min(1.0, 4 * p[0, 3].item()))


def test_sign_flips_are_uniform_where_there_is_no_effect_and_small_where_there_is():
    from reftlens.scoring.statistics import sign_flip_p

    generator = torch.Generator().manual_seed(0)
    for n in (10, 25):  # all patterns, and drawn ones
        values = torch.randn(400, n, generator=generator)
        p = torch.tensor([sign_flip_p(row, draws=199) for row in values]).sort().values
        gap = (p - torch.arange(1, 401) / 400).abs().max().item()
        assert gap < 1.63 / 400**0.5 + 1 / 200, "Kolmogorov-Smirnov at 1 %, p being a multiple of 1/200"
        assert sign_flip_p(values[0] + 3, draws=199) < 0.02
    assert sign_flip_p(torch.zeros(20)) == 1.0
    assert sign_flip_p(torch.tensor([1.0] * 5)) == 2 / 2**5


def test_enough_signs_are_flipped_for_the_correction():
    from reftlens.scoring.statistics import sign_flip_tests

    rows = [torch.randn(20, generator=torch.Generator().manual_seed(i)) for i in range(299)] + [torch.ones(20) * 9]
    p, corrected = sign_flip_tests(rows)
    assert corrected[-1] < 0.05 and corrected[-1] == pytest.approx(300 * p[-1].item())


def _drawn(ax):
    """The numbers of a figure: heights of points, or the cells of a heat map."""
    if ax.images:
        return ax.images[0].get_array().compressed().tolist()
    return [bars.lines[0].get_ydata().item() for bars in ax.containers]


def test_a_second_run_gives_the_same_and_the_figure_shows_the_numbers_of_the_table():
    import reftlens as rl

    model, data = bridge("gpt2"), _ragged()
    reft = _two_layers(model)
    for of in ("positions", "sites", "cells", "pairs", {"half": rl.Variant(0.5), "first": rl.Variant(sites=[0])}):
        once, again = (rl.effects(reft, model, data, of, **QUIET) for _ in range(2))
        frame = once.to_frame()
        assert frame.equals(again.to_frame())
        columns = {"cells": ["effect"], "pairs": ["interaction"] * 2}.get(str(of), ["effect"])
        columns = ["alone", "left_out"] if of in ("positions", "sites") else columns
        expected = [value for column in columns for value in frame[column]]
        assert sorted(_drawn(once.plot())) == pytest.approx(sorted(expected), abs=1e-6), of
    parts = rl.effects(reft, model, data, **QUIET)
    assert "alone" in str(parts) and "nats" in parts.plot().get_ylabel()


def test_kinds_named_together_are_scored_once_and_give_what_each_gives_alone(gpt2_double, monkeypatch):
    import reftlens as rl
    from reftlens.scoring import responses

    data, scored = _ragged(), []
    honest = responses.scorer_of
    monkeypatch.setattr(responses, "scorer_of", lambda *a: scored.append([p.variant for p in a[2]]) or honest(*a))
    reft, where = _two_layers(gpt2_double).double(), {"first two": "f2", "start": "first", "end": "last"}
    kinds = ("positions", "sites", "cells", "pairs")
    together = rl.effects(reft, gpt2_double, data, kinds, positions=where, **QUIET)
    assert tuple(together) == kinds and len(scored) == 1
    # unedited; whole; three positions alone and left out; two sites (also left out of one another); three of each cell
    assert len(scored[0]) == 1 + 1 + 6 + 2 + 6
    for kind, result in together.items():
        settings = {"positions": where} if kind in ("positions", "cells") else {}
        rl.training.forget()
        alone = rl.effects(reft, gpt2_double, data, kind, **settings, **QUIET)
        assert type(result) is type(alone) and vars(result).keys() == vars(alone).keys()
        for name, value in vars(alone).items():
            same = torch.equal if isinstance(value, torch.Tensor) and value.dtype == torch.bool else None
            if isinstance(value, torch.Tensor) and not same:
                torch.testing.assert_close(getattr(result, name), value, rtol=1e-12, atol=1e-12, equal_nan=True)
            else:
                assert same(getattr(result, name), value) if same else getattr(result, name) == value
    assert together["cells"].gained[0, 1].abs().max() > 1e-6, "and it is not that nothing happens"


def test_of_one_site_what_its_positions_and_its_cells_do_is_scored_once(monkeypatch):
    import reftlens as rl
    from reftlens.scoring import responses

    truth, data = _scene()
    scored, honest = [], responses.scorer_of

    def counted(*a):
        scored.append(sum(plan.variant.strength != 0 for plan in a[2]))
        return honest(*a)

    monkeypatch.setattr(responses, "scorer_of", counted)
    found = rl.effects(_das(truth), truth.model, data, ["cells", "positions", "sites"], **QUIET)
    assert scored == [4 + 1 + 4], "four cells, the whole edit, and it with each of four left out"
    assert torch.equal(found["cells"].gained[0], found["positions"].alone)
    assert torch.equal(found["sites"].alone[0], found["positions"].whole)


def test_strength_is_a_knob_here_too():
    import reftlens as rl

    model, data = bridge("gpt2"), _ragged()
    reft = _two_layers(model)
    found = rl.effects(reft, model, data, positions={"end": "last"}, strength=0.5, **QUIET)
    expected = rl.evaluate(reft, model, data, [0, 0.5], **QUIET)
    gained = expected.loss[0] - expected.loss[1]
    assert torch.allclose(found.whole, gained, atol=1e-5)
    idle = rl.effects(reft, model, data, positions={"end": "last"}, strength=0.0, **QUIET)
    assert (idle.whole == 0).all() and (idle.alone == 0).all() and (idle.left_out == 0).all()


def test_what_has_no_answer_is_refused():

    import reftlens as rl

    truth, data = _scene()
    das = _das(truth, "last")
    with pytest.raises(ValueError, match=r"position 'start' .* holds no edited token"):
        rl.effects(das, truth.model, data, positions={"start": "first"}, **QUIET)
    with pytest.raises(ValueError, match=r"position 'start' .* holds no edited token"):
        rl.effects(das, truth.model, data, of="cells", positions={"start": "first"}, **QUIET)
    with pytest.raises(ValueError, match=r"expected \{label: positions\}"):
        rl.effects(das, truth.model, data, positions={}, **QUIET)
    with pytest.raises(ValueError, match="an interaction is of two"):
        rl.effects(das, truth.model, data, of="pairs", **QUIET)
    for of in ("sites", ("sites",), "pairs", {"half": rl.Variant(0.5)}):
        with pytest.raises(ValueError, match="positions= is for"):
            rl.effects(das, truth.model, data, of, positions={"end": "last"}, **QUIET)
    for of, problem in ((["sites", "sites"], "each of them once"), ([], "expected one or more")):
        with pytest.raises(ValueError, match=problem):
            rl.effects(das, truth.model, data, of, **QUIET)
    with pytest.raises(TypeError, match=r"of='layers', expected 'positions', 'sites', 'cells', 'pairs'"):
        rl.effects(das, truth.model, data, ["sites", "layers"], **QUIET)
    with pytest.raises(ValueError, match="a variant says its own"):
        rl.effects(das, truth.model, data, {"half": rl.Variant(0.5)}, strength=2.0, **QUIET)
    with pytest.raises(TypeError, match=r"expected \{label: Variant\}"):
        rl.effects(das, truth.model, data, {}, **QUIET)
    with pytest.raises(ValueError, match="variant 'start' edits no token"):
        rl.effects(das, truth.model, data, {"start": rl.Variant(among="first")}, **QUIET)
    with pytest.raises(ValueError, match="expected one or more of 0 to 0"):
        rl.effects(das, truth.model, data, {"third": rl.Variant(sites=[2])}, **QUIET)


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    import reftlens as rl

    model, data = bridge("gpt2"), _ragged()
    reft = _two_layers(model, "last")
    first, second = (site.hook for site in reft.sites)
    cells, pairs = (rl.effects(reft, model, data, of, **QUIET) for of in ("cells", "pairs"))
    variants = rl.effects(reft, model, data, {"half": rl.Variant(0.5)}, **QUIET)
    for ask, answer in (
        (lambda: rl.effects(reft, model, data, **QUIET).effect("-9"), "no position '-9', there are: '-1'"),
        (lambda: cells.effect("attn", "-1"), f"no hook 'attn', there are: '{first}', '{second}'"),
        (lambda: cells.effect(first, "-2"), "no position '-2', there are: '-1'"),
        (lambda: pairs.interaction(first, "mlp"), f"no site 'mlp', there are: '{first}', '{second}'"),
        (lambda: pairs.interaction(first, first), "an interaction is of two sites"),
        (lambda: variants.effect("full"), "no variant 'full', there are: 'half'"),
        (lambda: variants.difference("half", "full"), "no variant 'full'"),
    ):
        with pytest.raises(ValueError, match=re.escape(answer)):
            ask()


def test_variants_equal_separate_evaluations_and_the_parts_that_they_spell():
    import reftlens as rl

    model, data = bridge("gpt2"), _ragged()
    sites = {rl.resid_post(0, "f2"): rl.LoReFT(int(model.cfg.d_model), rank=2)}
    reft = rl.ReFT(sites | {rl.resid_post(1, "last"): rl.SteeringVector(int(model.cfg.d_model))})
    reft.reset(3)
    torch.nn.init.ones_(reft[1].vector)
    asked = {"half": rl.Variant(0.5), "upper": rl.Variant(sites=[1]), "end": rl.Variant(among="last")}
    asked["fourth"] = rl.Variant(among=rl.positions.Nth(3, missing="skip"), sites=[1])
    found = rl.effects(reft, model, data, asked, **QUIET)
    for i, label in enumerate(("half", "upper")):
        alone = rl.evaluate(reft, model, data, [0, asked[label]], **QUIET)
        gained = alone.loss[0] - alone.loss[1]
        assert found.edited[i].all() and torch.allclose(found.gained[i], gained, atol=2e-5)
        assert found.effect(label).value == pytest.approx(gained.mean().item(), abs=2e-5)
    end = rl.effects(reft, model, data, positions={"end": "last"}, **QUIET)
    assert torch.allclose(found.gained[2], end.alone[0], atol=1e-6), "sites that keep no token do not act"
    lengths = data.prompt_mask.sum(dim=1)
    assert found.edited[3].tolist() == (lengths == 4).tolist() and found.effect("fourth").count == 1
    gap = found.difference("half", "upper")
    assert gap.value == pytest.approx(found.effect("half").value - found.effect("upper").value) and gap.count == 3
    frame = found.to_frame()
    assert list(frame["variant"]) == list(asked) and frame["n"].tolist() == [3, 3, 3, 1]
    assert (frame["p_holm"] >= frame["p"]).all()
