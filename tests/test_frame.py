"""The principal frame is a property of the edit: however its basis is turned, direction 0 is the same."""

import pytest
import torch
from planted import CORNERS, pairs, planted

from architectures import D, bridge

PROMPTS = [
    "the cat sat on the mat",
    "a dog ran by",
    "the moon looked at the green hill",
    "the dog sat",
    "over the hill",
]


def _data(model):
    import reftlens as rl

    return rl.encode_prompts(model, PROMPTS)


def _loreft(rank=3, positions="f2+l2", seed=0, layer=1):
    import reftlens as rl

    module = rl.LoReFT(D, rank, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        module.W.mul_(torch.linspace(4, 1, rank)[:, None])
    return rl.ReFT({rl.resid_post(layer, positions): module}).double()


def _turned(reft, seed=1):
    """The same edit, its basis rotated: `B → B Q`, `W → Qᵀ W`, `b → Qᵀ b`."""
    copy = reft.clone()
    module = copy[0]
    noise = torch.randn(module.rank, module.rank, generator=torch.Generator().manual_seed(seed)).double()
    q = torch.linalg.qr(noise).Q
    with torch.no_grad():
        module.frame.matrix.copy_(module.frame() @ q)
        module.W.copy_(q.T @ module.W)
        module.b.copy_(q.T @ module.b)
    return copy


def _canonical(reft, model, data):
    from reftlens.analysis.subspaces.frame import principal_frame

    return principal_frame(reft, model, data, progress=False)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_rotated_frame_has_the_same_canonical_frame(name):
    from reftlens.analysis.subspaces.projection import plane

    model, reft = bridge(name, torch.float64), _loreft()
    data, other = _data(model), _turned(reft)
    assert (reft[0].basis() - other[0].basis()).abs().max() > 0.1, "the twin: the bases do differ"
    one, two = (_canonical(r, model, data)[0] for r in (reft, other))
    torch.testing.assert_close(one.basis, two.basis, atol=1e-6, rtol=0)  # the sign too: towards the mean edit
    torch.testing.assert_close(one.singular_values, two.singular_values)
    assert one.effective_rank == pytest.approx(two.effective_rank)
    assert one.entropy_rank == pytest.approx(two.entropy_rank)
    a, b = (plane(r, model, data, progress=False).points for r in (reft, other))
    torch.testing.assert_close(torch.cdist(a, a), torch.cdist(b, b), atol=1e-6, rtol=0)


def test_numpy_finds_the_same_axes():
    """Oracle: SVD of the edits `[tokens, d]`, made from hidden states that were read by themselves."""
    import numpy

    import reftlens as rl

    model, reft = bridge("gpt2", torch.float64), _loreft()
    data, site = _data(model), reft.sites[0]
    h = rl.activations(model, data, site, progress=False)
    with torch.no_grad():
        edits = reft[0](h) - h
    _, values, right = numpy.linalg.svd(edits.numpy(), full_matrices=False)
    principal = _canonical(reft, model, data)[0]
    numpy.testing.assert_allclose(principal.singular_values.numpy(), values[:3])
    cosines = numpy.abs((right[:3] * principal.basis.T.numpy()).sum(axis=1))
    numpy.testing.assert_allclose(cosines, 1.0)
    assert (edits.mean(dim=0) @ principal.basis >= 0).all(), "each axis points towards the mean edit"
    shares = values[:3] ** 2 / (values[:3] ** 2).sum()
    assert principal.effective_rank == pytest.approx(1 / (shares**2).sum())
    assert principal.entropy_rank == pytest.approx(numpy.exp(-(shares * numpy.log(shares)).sum()))
    torch.testing.assert_close(principal.mean_square, (edits @ principal.basis).square().mean(dim=0))
    torch.testing.assert_close(reft[0].basis() @ principal.rotation, principal.basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["LoReFT", "DiReFT"])
def test_an_edit_of_rank_1_has_effective_rank_1(kind):
    """Rank 4 by its parameters; all but one of the directions are given nothing to do."""
    import reftlens as rl

    model = bridge("gpt2")
    module = getattr(rl, kind)(D, 4, init="identity")
    with torch.no_grad():
        module.b[2] = 1.0
    reft = rl.ReFT({rl.resid_post(1, "all"): module})
    principal = _canonical(reft, model, _data(model))[0]
    assert principal.effective_rank == pytest.approx(1.0, abs=1e-9)
    assert principal.entropy_rank == pytest.approx(1.0, abs=1e-6)
    direction = torch.nn.functional.normalize(module.basis()[:, 2].detach().double(), dim=0)
    assert principal.basis[:, 0] @ direction == pytest.approx(1.0, abs=1e-6)
    assert principal.basis.shape == (D, 4) and principal.singular_values[1:].max() < 1e-6


def test_an_even_edit_has_effective_rank_2():
    """The planted plane, its corners each as often."""
    import reftlens as rl

    world = planted()
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.Ablation(D, torch.zeros(D), world.subspace)})
    data = pairs(world.value, 400, 0)[1]
    assert _canonical(reft, world.model, data)[0].effective_rank == pytest.approx(2.0, abs=0.03)


def test_an_exchange_has_the_axes_of_what_is_exchanged():
    import reftlens as rl

    world = planted()
    das = rl.DAS(D, basis=world.subspace)
    data = pairs(world.value, 50, 0)[0]
    principal = _canonical(rl.ReFT({rl.resid_post(1, "last"): das}), world.model, data)[0]
    column = data.target_mask.long().argmax(dim=1)
    values = [world.value[b.tokens[torch.arange(50), column - 1]] for b in (data, data.sources["source"].batch)]
    away = 3 * (CORNERS[values[1]] - CORNERS[values[0]])
    torch.testing.assert_close(
        principal.singular_values,
        torch.linalg.svdvals(away.double()),
        atol=1e-4,
        rtol=1e-5,  # activations are float32
    )
    with pytest.raises(ValueError, match="has no such source"):
        _canonical(rl.ReFT({rl.resid_post(1, "last"): das}), world.model, pairs(world.value, 5, 0)[1])


def test_a_later_site_sees_what_an_earlier_one_has_done():
    import reftlens as rl

    model, first, second = bridge("gpt2"), rl.SteeringVector(D, torch.ones(D)), rl.Ablation(D)
    early, late = rl.resid_pre(1, "all"), rl.resid_pre(1, "last")
    data = _data(model)
    h = rl.activations(model, data, late, progress=False)
    principal = _canonical(rl.ReFT({early: first, late: second}), model, data)
    torch.testing.assert_close(
        principal[late].singular_values[:5], torch.linalg.svdvals((h + 1).double()), atol=1e-4, rtol=0
    )
    assert set(principal.bases) == {early, late} and principal[early].basis.shape == (D, 1)
    alone = _canonical(rl.ReFT({late: second}), model, data)
    torch.testing.assert_close(alone[0].singular_values[:5], torch.linalg.svdvals(h.double()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_rows_that_a_site_leaves_out_do_not_shift_the_others(batch_size):
    """In some batches a site chooses nothing; the tokens stay with their rows."""
    import reftlens as rl
    from reftlens.analysis.subspaces.recorded import edits_of

    model = bridge("gpt2", torch.float64)
    data, where = _data(model), rl.positions.Tokens("dog", missing="skip")
    reft = rl.ReFT(
        {rl.resid_post(0, where): rl.Ablation(D).double(), rl.resid_post(1, "last"): rl.Ablation(D).double()}
    )
    edits = edits_of(reft, model, data, batch_size=batch_size, progress=False)
    h = rl.activations(model, data, reft.sites[0], progress=False)
    torch.testing.assert_close(edits[0].hidden @ edits[0].span.T, h)
    torch.testing.assert_close(edits[0].edits, -edits[0].hidden)
    assert set(edits[0].rows.tolist()) == {1, 3} and edits[1].rows.tolist() == list(range(5))


def test_heads_are_read_as_they_are_edited():
    import reftlens as rl

    model, site = bridge("gpt2"), rl.attn_z(1, "last", heads=[1, 3])
    principal = _canonical(rl.ReFT({site: rl.Ablation(16)}), model, _data(model))[0]
    h = rl.activations(model, _data(model), site, progress=False)
    torch.testing.assert_close(principal.singular_values[:5], torch.linalg.svdvals(h.double()), atol=1e-5, rtol=1e-5)


def test_nothing_is_left_on_the_model_and_no_edit_has_no_axes():
    import reftlens as rl

    model = bridge("gpt2")
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 2, init="identity")})
    with pytest.raises(ValueError, match="the edit is zero at all 5 tokens"):
        _canonical(reft, model, _data(model))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_table_and_figure():
    model, reft = bridge("gpt2", torch.float64), _loreft()
    principal = _canonical(reft, model, _data(model))
    frame = principal.to_frame()
    assert frame.share.sum() == pytest.approx(1.0) and frame.cumulative.iloc[-1] == pytest.approx(1.0)
    assert frame.share.is_monotonic_decreasing and len(frame) == 3
    axes = principal.plot()
    assert [line.get_ydata()[0] for line in axes.lines][1] == pytest.approx(1 / 3)
    assert "effective rank" in str(principal)
