"""Natural activations exchanged for natural ones stay where they are; a long steering vector does not."""

import pytest
import torch
from planted import pairs

from architectures import D, bridge

HOOK = 1


def _pairs(count=60, seed=0, sources=True):
    """Base prompts, and sources of the same kind."""
    return pairs(torch.zeros(400, dtype=torch.long), count, seed)[0 if sources else 1]


def _site(positions="last"):
    import reftlens as rl

    return rl.resid_post(HOOK, positions)


def _steering(model, data, strength):
    """A random direction, as long as `strength` times the residual's root mean square norm at the site."""
    import reftlens as rl

    norms = rl.activations(model, data, _site(), progress=False).norm(dim=1)
    direction = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(1)), dim=0)
    return rl.ReFT({_site(): rl.SteeringVector(D, strength * norms.square().mean().sqrt() * direction)})


def _distance(reft, model, data, **kwargs):
    from reftlens.analysis.causal.manifold import manifold_distance

    return manifold_distance(reft, model, data, progress=False, **{"splits": 199, **kwargs})


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_natural_vectors_exchanged_for_natural_ones_are_not_off_the_manifold(name):
    import reftlens as rl

    model, whole = bridge(name), rl.ReFT({_site(): rl.Interchange(D)})
    runs = [_distance(whole, model, _pairs(seed=s), seed=s) for s in range(20)]
    small = sum(f.rows[0].p < 0.05 for f in runs)
    assert small <= 4, "of 20 draws at a rate of 5 %, five or more have a chance of 0.3 %"
    assert 35 < sum(f.rows[0].percentiles.median().item() for f in runs) / 20 < 65
    assert 0.5 < sum(f.rows[0].ratio for f in runs) / 20 < 1.5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_steering_vector_of_ten_times_the_norm_is(name):
    model, data = bridge(name), _pairs()
    row = _distance(_steering(model, data, 10.0), model, data).rows[0]
    assert row.p == 1 / 200 and row.percentiles.min() == 100 and row.beyond == 1.0 and row.ratio > 10


def test_strength_is_how_far():
    model, data = bridge("gpt2"), _pairs()
    reft = _steering(model, data, 10.0)
    sites = [_distance(reft, model, data, strength=s).rows[0] for s in (0.0, 0.05, 0.2, 1.0)]
    assert torch.equal(sites[0].edited, sites[0].natural), "strength 0 is the unedited model"
    assert sites[0].p > 0.05 and sites[-1].p < 0.05
    means = [row.edited.mean().item() for row in sites]
    assert means == sorted(means)


def test_p_is_calibrated_and_has_power():
    from reftlens.analysis.causal.manifold import _site_distance

    small = {0.0: 0, 0.5: 0}
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        mixing, *drawn = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (16, 40, 40))
        natural, other = (x @ mixing for x in drawn)
        for shift in small:
            edited = other + shift * natural.std(dim=0)
            small[shift] += _site_distance(_site(), natural, edited, torch.arange(40), 0.1, 199, seed).p <= 0.05
    assert 3 <= small[0.0] <= 19, "10 expected of 200; the interval holds 99.5 % of such counts"
    assert small[0.5] > 150


def test_rows_are_split_as_a_whole():
    """Two equal tokens in each row: no more evidence than one."""
    from reftlens.analysis.causal.manifold import _site_distance

    generator = torch.Generator().manual_seed(3)
    natural, edited = torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)
    once = _site_distance(_site(), natural, edited, torch.arange(30), 0.1, 99, 0)
    twice = [x.repeat_interleave(2, dim=0) for x in (natural, edited)]
    again = _site_distance(_site(), *twice, torch.arange(30).repeat_interleave(2), 0.1, 99, 0)
    assert again.p == pytest.approx(once.p, abs=0.03) and again.ratio == pytest.approx(once.ratio, rel=0.05)


def test_distances_are_those_of_the_formulas():
    from reftlens.analysis.causal.manifold import _energies, _mahalanobis, _site_distance

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    covariance = 0.8 * torch.cov(x.T) + 0.2 * torch.cov(x.T).trace() / 5 * torch.eye(5)
    away = y - x.mean(dim=0)
    oracle = torch.stack([(a @ torch.linalg.inv(covariance) @ a / 5).sqrt() for a in away])
    assert torch.allclose(_mahalanobis(y, x, 0.2), oracle)
    both = torch.cat([x, y])
    scaled = both / both.std(dim=0)
    a, b = scaled[:12], scaled[12:]
    mean = lambda p, q: torch.stack([(i - j).norm() for i in p for j in q]).mean()  # noqa: E731
    energy = _energies(both, torch.arange(24)[None] < 12)
    assert torch.allclose(energy, 2 * mean(a, b) - mean(a, a) - mean(b, b))
    row = _site_distance(_site(), both, both, torch.arange(24), 0.1, 9, 0)
    assert torch.equal(row.edited, row.natural) and row.percentiles.max() == 100


def test_activations_are_read_after_the_edit():
    """An ablation to zero leaves one vector: all edited tokens lie equally far, at every kind of site."""
    import reftlens as rl

    model, data = bridge("llama"), _pairs(12)
    for site, d in ((rl.resid_mid(HOOK, "last"), D), (rl.mlp_post(HOOK, "f1+l1"), 48), (rl.attn_z(1, "last", 2), 8)):
        row = _distance(rl.ReFT({site: rl.Ablation(d)}), model, data, splits=9).rows[0]
        assert torch.allclose(row.edited, row.edited[0].expand_as(row.edited)), site
        assert row.natural.std() > 1e-3


def test_any_intervention_is_measured_and_each_site_corrected():
    import reftlens as rl

    model, data = bridge("gpt2"), _pairs(24, sources=False)
    loreft = rl.ReFT({_site("f1+l1"): rl.LoReFT(D, rank=2), rl.resid_post(2, "last"): rl.LoReFT(D, rank=2)})
    distances = _distance(loreft, model, data)
    assert len(distances.rows) == 2 and len(distances.rows[0].edited) == 24 and len(distances.rows[1].edited) == 12
    assert distances.p[0] >= distances.rows[0].p
    frame = distances.to_frame()
    assert list(frame["p"]) == [row.p for row in distances.rows] and list(frame["p_holm"]) == distances.p.tolist()
    assert "percentile" in distances.plot().get_xlabel()
    assert str(distances).count("natural manifold") == 2
    assert _distance(loreft, model, data).to_frame().equals(frame)


def test_what_cannot_be_measured_is_said():
    import reftlens as rl

    model, whole = bridge("gpt2"), rl.ReFT({_site(): rl.Interchange(D)})
    with pytest.raises(ValueError, match=r"edited in 3 row\(s\), and four or more"):
        _distance(whole, model, _pairs(3))
    with pytest.raises(ValueError, match="splits=0"):
        _distance(whole, model, _pairs(8), splits=0)
    with pytest.raises(ValueError, match="shrinkage=0"):
        _distance(whole, model, _pairs(8), shrinkage=0)
    with pytest.raises(ValueError, match="no such source"):
        _distance(whole, model, _pairs(8, sources=False))
