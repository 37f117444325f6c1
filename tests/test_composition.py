"""Several edits at once: the matrix equals separate evaluations, the sum predicts where it must, and algebra holds."""

import pytest
import torch
from planted import CORNERS, pairs, planted

from architectures import D, bridge

QUIET = dict(progress=False)


def _texts(model, completion=" and looked"):
    import reftlens as rl

    prompts = ["the cat sat", "a dog ran by the green hill while", "the moon"]
    return rl.encode(model, [rl.Example(p, completion) for p in prompts])


def _loreft(site, seed, rank=2, kind=None):
    import reftlens as rl

    reft = rl.ReFT({site: (kind or rl.LoReFT)(D, rank=rank)})
    reft.reset(seed)
    return reft


def _gained(reft, model, data):
    import reftlens as rl

    found = rl.evaluate(reft, model, data, **QUIET)
    return found.loss[0] - found.loss[1]


def test_the_matrix_equals_separate_evaluations(gpt2):
    import reftlens as rl

    edits = {"one": _loreft(rl.resid_post(0, "l2"), 1), "two": _loreft(rl.resid_post(0, "last"), 2)}
    edits["three"] = _loreft(rl.resid_post(1, "prompt"), 3)
    metrics = {"looked": _texts(gpt2), "sat": _texts(gpt2, " sat on the mat")[[0, 2]]}
    once, again = (rl.places.composition(edits, gpt2, metrics, **QUIET) for _ in range(2))
    for j, data in enumerate(metrics.values()):
        for i, reft in enumerate(edits.values()):
            assert torch.allclose(once.alone[j][i], _gained(reft, gpt2, data), atol=2e-5)
        together = _gained(edits["one"] | edits["two"] | edits["three"], gpt2, data)
        assert torch.allclose(once.together[j], together, atol=2e-5)
        name = once.metrics[j]
        error = once.joint(name).value - sum(once.effect(edit, name).value for edit in edits)
        assert once.error(name).value == pytest.approx(error, abs=1e-9)
        assert once.predicted(name).count == once.error(name).count == len(data)
    frame = once.to_frame()
    assert frame.equals(again.to_frame())
    assert list(frame["edit"][:6]) == ["one", "two", "three", "together", "sum of effects", "error"]
    ax = once.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["looked", "sat"]
    assert "error" in str(once)


def test_effects_on_different_answers_add_up_and_on_one_answer_do_not():
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows

    truth = planted()
    later = batch_from_rows(
        [[60 + i, 70 + i, 41, 80 + i, 40] for i in range(20)],
        [[1, 1, 2, 2, 2]] * 20,
        [[False, False, True, False, True]] * 20,
    )
    push = [rl.SteeringVector(D, 4 * truth.subspace @ CORNERS[i]) for i in (1, 0)]
    edits = {"first": rl.ReFT({rl.resid_post(1, "last"): push[0]}), "second": rl.ReFT({rl.resid_post(1, [3]): push[1]})}
    apart = rl.places.composition(edits, truth.model, {"both": later}, **QUIET)
    assert apart.error("both").value == pytest.approx(0, abs=1e-5) and apart.joint("both").low > 0.3
    same = {"first": edits["first"], "second": rl.ReFT({rl.resid_post(2, "last"): push[0]})}
    found = rl.places.composition(same, truth.model, {"both": later}, **QUIET)
    assert found.error("both").high < -0.05, "the answer is certain soon: less than the sum"
    rows = found.to_frame().set_index("edit")
    assert rows["p_holm"]["error"] < 0.05 < apart.to_frame().set_index("edit")["p_holm"]["error"]


def test_an_exchange_and_a_vector_compose():
    import reftlens as rl

    truth = planted()
    data, _ = pairs(truth.value, 16, 4)
    das = rl.DAS(D, basis=truth.subspace)
    place = rl.resid_post(1, "last")
    edits = {"exchange": rl.ReFT({place: das}), "push": rl.ReFT({place: rl.SteeringVector(D, truth.subspace[:, 0])})}
    found = rl.places.composition(edits, truth.model, {"answers": data}, **QUIET)
    assert torch.allclose(found.alone[0][0], _gained(edits["exchange"], truth.model, data), atol=1e-5)
    assert torch.allclose(found.alone[0][1], _gained(edits["push"], truth.model, data), atol=1e-5)
    last = rl.places.composition(dict(reversed(edits.items())), truth.model, {"answers": data}, **QUIET)
    assert torch.allclose(last.together[0], last.alone[0][1], atol=1e-5), "an exchange after the push undoes it"
    assert not torch.allclose(found.together[0], found.alone[0][0], atol=1e-3)
    both = edits["exchange"] | edits["push"]
    assert torch.allclose(found.together[0], _gained(both, truth.model, data), atol=1e-5)


def test_edits_at_one_place_act_one_after_the_other(gpt2):
    """Three at the very same site: h3(h2(h1(h))), and the store keeps them."""
    import reftlens as rl

    site, data = rl.resid_post(1, "last"), _texts(gpt2)
    refts = [_loreft(site, seed) for seed in (1, 2, 3)]
    joined = refts[0] | refts[1] | refts[2]
    assert len(joined) == 3 and [joined[i] for i in range(3)] == [reft[0] for reft in refts]
    masks = [s.positions.mask(data.view) for s in joined.sites]
    assert all(torch.equal(masks[0], mask) for mask in masks)
    h = rl.activations(gpt2, data, site, progress=False)
    expected = refts[2][0](refts[1][0](refts[0][0](h)))
    with torch.no_grad(), joined.on(gpt2, data):
        _, cache = gpt2.run_with_cache(data.tokens, attention_mask=data.attention_mask.long())
    assert torch.allclose(cache[site.hook][masks[0]], expected, atol=1e-5)
    assert (
        rl.ReFT({rl.Site.from_dict(s.to_dict()): joined[i] for i, s in enumerate(joined.sites)}).sites == joined.sites
    )


def test_jointly_orthogonal_bases_are_orthonormal_and_near():
    import reftlens as rl

    site = rl.resid_post(1, "last")
    kinds = [rl.LoReFT, rl.interventions.OrthoDiReFT, rl.interventions.ConsReFT, rl.interventions.LobiReFT, rl.DAS]
    refts = [_loreft(site, seed, kind=kind) for seed, kind in enumerate(kinds)]
    before = [reft[0].basis().detach().clone() for reft in refts]
    found = rl.subspaces.orthogonalise(refts)
    joint = torch.cat([reft[0].basis() for reft in found], dim=1)
    assert torch.allclose(joint.T @ joint, torch.eye(10), atol=1e-5)
    u, _, v = torch.linalg.svd(torch.cat(before, dim=1).double(), full_matrices=False)
    assert torch.allclose(joint.double(), u @ v, atol=1e-5), "the nearest orthonormal columns"
    assert all(torch.equal(reft[0].basis(), basis) for reft, basis in zip(refts, before, strict=True)), "copies"
    assert torch.equal(found[0][0].W, refts[0][0].W) and torch.equal(found[0][0].b, refts[0][0].b)
    h = torch.randn(5, D)
    after = found[0][0](h)
    assert torch.allclose(after @ found[0][0].basis(), h @ refts[0][0].W.T + refts[0][0].b, atol=1e-5)
    assert torch.allclose(after @ found[4][0].basis(), h @ found[4][0].basis(), atol=1e-5), "and leaves the others"
    assert not torch.allclose(refts[0][0](h) @ before[4], h @ before[4], atol=1e-2), "as it did not before"


def test_bases_that_are_orthogonal_or_meet_nowhere_stay_as_they_are():
    import reftlens as rl

    site, other = rl.resid_post(1, "last"), rl.resid_post(2, "last")
    refts = [_loreft(site, 1), _loreft(site, 2), _loreft(other, 1)]
    again = rl.subspaces.orthogonalise(once := rl.subspaces.orthogonalise(refts))
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(once[2][0].frame.matrix, refts[2][0].frame.matrix)
    assert not torch.equal(once[0][0].frame.matrix, refts[0][0].frame.matrix)


def test_tied_interventions_are_turned_once():
    import reftlens as rl

    here, there = rl.resid_post(1, "last"), rl.resid_post(2, "last")
    tied = rl.LoReFT(D, rank=2)
    refts = [rl.ReFT({here: tied, there: tied}), _loreft(here, 1), _loreft(there, 2)]
    found = rl.subspaces.orthogonalise(refts)
    joint = torch.cat([reft[0].basis() for reft in found], dim=1)
    assert torch.allclose(joint.T @ joint, torch.eye(6), atol=1e-5) and found[0][0] is found[0][1]


def test_a_negative_strength_and_a_negative_weight_are_the_opposite_edit():
    import reftlens as rl

    site, model = rl.resid_post(1, "last"), bridge("gpt2")
    vectors = [torch.randn(D) for _ in range(2)]
    a, b = (rl.ReFT({site: rl.SteeringVector(D, v)}) for v in vectors)
    c = rl.ReFT({rl.resid_post(2, "last"): rl.SteeringVector(D, vectors[0])})
    h = torch.randn(4, D)
    assert torch.allclose(a[0](h, -1.0) - h, h - a[0](h), atol=1e-6)
    assert torch.equal((-a)[0].vector, -vectors[0])
    assert torch.allclose((a - b)[0].vector, vectors[0] - vectors[1])
    three = a + b + 0.5 * c
    assert three.sites == (site, c.sites[0]) and torch.allclose(three[1].vector, 0.5 * vectors[0])
    data = _texts(model)
    opposite = rl.evaluate(a, model, data, [-1.0], **QUIET).loss
    negated = rl.evaluate(-a, model, data, [1], **QUIET).loss
    torch.testing.assert_close(opposite, negated, atol=1e-5, rtol=0)


def test_what_cannot_be_composed_is_refused(gpt2):
    import reftlens as rl

    site = rl.resid_post(1, "last")
    lo, no = _loreft(site, 1), _loreft(site, 2, kind=rl.interventions.NoReFT)
    with pytest.raises(ValueError, match="expected two edits"):
        rl.places.composition({"one": lo}, gpt2, {"x": _texts(gpt2)})
    with pytest.raises(ValueError, match="expected two edits and a metric"):
        rl.places.composition({"one": lo, "two": no}, gpt2, {})
    with pytest.raises(ValueError, match="LoReFT, NoReFT meet at"):
        rl.subspaces.orthogonalise([lo, no])
    with pytest.raises(ValueError, match="linearly dependent"):
        rl.subspaces.orthogonalise([lo, lo.clone()])
    with pytest.raises(ValueError, match="linearly dependent"):
        rl.subspaces.orthogonalise([_loreft(site, seed, rank=20) for seed in (1, 2)])
    vector = rl.ReFT({site: rl.SteeringVector(D)})
    for sum_of in (lambda: -lo, lambda: 2 * lo, lambda: vector + lo, lambda: lo - vector):
        with pytest.raises(ValueError, match="is not one vector"):
            sum_of()
    found = rl.places.composition({"one": lo, "two": no}, gpt2, {"x": _texts(gpt2)}, **QUIET)
    with pytest.raises(ValueError, match="no edit 'three', there are: 'one', 'two'"):
        found.effect("three", "x")
    with pytest.raises(ValueError, match="no metric 'y', there are: 'x'"):
        found.joint("y")
