"""Seeds that find one subspace overlap, seeds that learn nothing are at chance, and a planted variable has its rank."""

import math

import pytest
import torch
from planted import pairs, planted

from architectures import D, bridge

SITE = "last"


def _frames(base, noise, seeds, d=40):
    """`base`, shaken otherwise for each seed, as interventions."""
    import reftlens as rl

    refts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = base + noise * torch.randn(base.shape, generator=generator) / d**0.5
        module = rl.DAS(d, basis=rl.interventions.orthonormal(drawn))
        refts.append(rl.ReFT({rl.resid_post(0, SITE): module}))
    return refts


def _base(rank=3, d=40):
    return torch.linalg.qr(torch.randn(d, rank, generator=torch.Generator().manual_seed(0))).Q


def _stability(runs):
    from reftlens.analysis.subspaces.seeds import stability

    return stability(runs)


def test_equal_seeds_overlap_by_1_and_unrelated_ones_by_chance():
    same = _stability(_frames(_base(), 0.0, range(4))).sites[0]
    assert same.mean.value == pytest.approx(1.0) and same.mean.low == pytest.approx(1.0) and len(same.overlaps) == 6
    assert same.z > 50
    sites = [_stability(_frames(_base(), 1e4, range(10 * i, 10 * i + 4))).sites[0] for i in range(30)]
    z = torch.tensor([one.z for one in sites])
    assert abs(z.mean()) < 4 / 30**0.5 and 0.6 < z.std() < 1.5, "pairs of random subspaces are uncorrelated"
    assert all(one.chance.mean == pytest.approx(3 / 40) for one in sites)


def test_the_interval_covers_the_mean_overlap():
    truth = _stability(_frames(_base(), 1.0, range(1000, 1040))).sites[0].mean.value
    means = [_stability(_frames(_base(), 1.0, range(6 * i, 6 * i + 6))).sites[0].mean for i in range(100)]
    covered = sum(one.low <= truth <= one.high for one in means)
    assert 0.2 < truth < 0.8 and covered >= 88, "95 of 100 expected; 88 or fewer have a chance of 0.5 %"


def test_two_seeds_have_no_interval_and_one_has_no_pair():
    refts = _frames(_base(), 0.5, range(2))
    assert math.isnan(_stability(refts).sites[0].mean.low)
    with pytest.raises(ValueError, match="two or more"):
        _stability(refts[:1])


def test_other_sites_are_refused():
    import reftlens as rl

    refts = [*_frames(_base(), 0.5, range(1)), rl.ReFT({rl.resid_post(1, SITE): rl.DAS(40, 3)})]
    with pytest.raises(ValueError, match="the runs have other sites"):
        _stability(refts)


def test_seeds_trained_on_a_planted_plane_find_it():
    import reftlens as rl

    world = planted()
    data, das = pairs(world.value, 200, 0)[0], rl.ReFT({rl.resid_post(1, SITE): rl.DAS(D, 2)})
    config = rl.FitConfig(steps=50, lr=3e-2, batch_size=64)
    trained = das.seeds([0, 1, 2])
    rl.training.fit_many(trained, world.model, data, config, progress=False)
    stable = _stability(trained)
    assert stable.sites[0].mean.value > 0.9 and stable.sites[0].z > 10
    assert _stability(das.seeds(range(3))).sites[0].z < 4
    assert stable.to_frame().chance.item() == pytest.approx(2 / D)
    assert "overlap between seeds" in stable.plot().get_xlabel() and "overlap of 3 seeds" in str(stable)


# -- the path ------------------------------------------------------------------------------------------------


def _path(reft, every=10):
    from reftlens.analysis.subspaces.seeds import FramePath

    return FramePath(reft, every=every)


def test_the_path_begins_at_the_first_frame_and_ends_at_the_last():
    import reftlens as rl

    world = planted()
    data, das = pairs(world.value, 100, 0)[0], rl.ReFT({rl.resid_post(1, SITE): rl.DAS(D, 2)})
    start = das[0].basis().detach().double()
    path = _path(das, every=10)
    rl.fit(das, world.model, data, steps=45, lr=3e-2, batch_size=32, on_step=path, progress=False)
    assert path.steps == [0, 10, 20, 30, 40, 45], "the last step, though it is no multiple of 10"
    to_last, to_first = path.overlap(), path.overlap(0)
    assert to_last[-1].item() == pytest.approx(1.0) and to_first[0].item() == pytest.approx(1.0)
    assert to_last[0] == to_first[-1] < 0.6, "it has moved"
    end = das[0].basis().detach().double()
    expected = (start.T @ end).square().sum() / 2
    assert to_last[0].item() == pytest.approx(expected.item(), abs=1e-5)
    projector = path.bases()[-1] @ path.bases()[-1].T
    torch.testing.assert_close(projector, end @ end.T, atol=1e-5, rtol=0)  # the frame settles at the end, in float32
    frame = path.to_frame()
    assert frame.to_last.iloc[-1] == pytest.approx(1.0) and frame.largest_angle.iloc[-1] < 1e-4
    assert path.plot().get_xlabel() == "optimizer step"


def test_a_frame_that_does_not_train_does_not_move():
    import reftlens as rl

    model = bridge("gpt2")
    data = rl.encode(model, [rl.Example("the cat", " sat on"), rl.Example("a dog", " ran by")])
    reft = rl.ReFT({rl.resid_post(1, SITE): rl.LoReFT(D, 2)})
    reft[0].frame.matrix.requires_grad_(False)
    path = _path(reft, every=2)
    rl.fit(reft, model, data, steps=4, on_step=path, progress=False)
    torch.testing.assert_close(path.overlap(), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="every=0"):
        _path(reft, every=0)


# -- ranks ---------------------------------------------------------------------------------------------------


def _sweep(world, ranks, **kwargs):
    import reftlens as rl
    from reftlens.analysis.subspaces.ranks import rank_sweep

    train, test = (pairs(world.value, n, seed)[0] for seed, n in enumerate((300, 100)))
    config = rl.FitConfig(steps=60, lr=5e-2, batch_size=64)
    settings = dict(validation=test, kind=rl.DAS, seeds=(0, 1), config=config, progress=False)
    return rank_sweep(world.model, train, rl.resid_post(1, SITE), ranks, **{**settings, **kwargs})


def test_the_elbow_of_a_planted_plane_is_2():
    import reftlens as rl

    world = planted()
    sweep = _sweep(world, (4, 1, 2))
    assert sweep.ranks == (1, 2, 4) and sweep.elbow == 2
    assert sweep.means[0] > sweep.means[1] + 5 * sweep.errors[1] and sweep.means[0] < sweep.unedited.mean()
    test = pairs(world.value, 100, 1)[0]
    alone = rl.evaluate(sweep.refts[2][1], world.model, test, progress=False)  # oracle: scored by itself
    torch.testing.assert_close(sweep.losses[1, 1], alone.loss[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sweep.unedited, alone.loss[0], atol=1e-5, rtol=1e-5)
    frame = sweep.to_frame()
    assert len(frame) == 6 and set(frame[frame.elbow]["rank"]) == {2}
    assert "elbow: rank 2" in [t.get_text() for t in sweep.plot().get_legend().get_texts()] and "elbow 2" in str(sweep)


def test_each_rank_trains_as_it_would_alone():
    import reftlens as rl

    world = planted()
    config = rl.FitConfig(steps=5, lr=3e-2, batch_size=16)
    sweep = _sweep(world, (1, 3), config=config)
    alone = rl.ReFT({sweep.site: rl.DAS(D, 3)})
    train = pairs(world.value, 300, 0)[0]
    alone.reset(1)
    rl.fit(alone, world.model, train, config, seed=1, progress=False)
    torch.testing.assert_close(alone[0].basis(), sweep.refts[3][1][0].basis(), atol=1e-5, rtol=0)  # stacked, in float32


def _table(means, spread=0.0):
    import reftlens as rl
    from reftlens.analysis.subspaces.ranks import RankSweep

    ranks = tuple(2**i for i in range(len(means)))
    noise = spread * (torch.arange(100) % 2 - 0.5).double()
    losses = torch.tensor(means).double()[:, None, None] + noise.expand(len(means), 2, 100)
    return RankSweep(rl.resid_post(0, SITE), ranks, (0, 1), losses, torch.zeros(100).double(), {})


def test_the_elbow_is_the_smallest_rank_within_one_standard_error():
    assert _table([3.0, 2.0, 1.0, 1.02]).elbow == 4
    assert _table([3.0, 1.08, 1.04, 1.0], spread=2.0).elbow == 2, "the standard error is 0.1"
    assert _table([1.0, 2.0]).elbow == 1


def test_ranks_are_given_once():
    with pytest.raises(ValueError, match="each of them once"):
        _sweep(planted(), (2, 2))
    with pytest.raises(ValueError, match="each of them once"):
        _sweep(planted(), (2,), seeds=())
