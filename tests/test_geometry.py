"""Equal subspaces overlap by 1, orthogonal ones by 0, unrelated ones by chance, and only the span of a basis counts."""

import numpy
import pytest
import torch
from planted import planted

from architectures import D, bridge

WIDE = 40


def _frame(rank, seed, d=WIDE):
    return torch.linalg.qr(torch.randn(d, rank, generator=torch.Generator().manual_seed(seed)).double()).Q


def _overlap(subspaces, **kwargs):
    from reftlens.analysis.subspaces.geometry import overlap

    return overlap(subspaces, **kwargs)


def test_equal_is_1_and_orthogonal_is_0():
    whole = _frame(6, 0)
    one, other = whole[:, :3], whole[:, 3:]
    rotated = 5 * one @ torch.randn(3, 3, dtype=torch.float64)  # another basis of the same span
    overlaps = _overlap({"one": one, "rotated": rotated, "twice": torch.cat([one, one], dim=1), "other": other})
    assert overlaps.ranks == (3, 3, 3, 3), "columns that depend on others do not count"
    torch.testing.assert_close(overlaps.overlap[:3, :3], torch.ones(3, 3, dtype=torch.float64))
    torch.testing.assert_close(overlaps.overlap[:3, 3], torch.zeros(3, dtype=torch.float64))
    assert overlaps.angles[0][1].max() < 1e-4 and overlaps.angles[0][3].min() > 90 - 1e-4


def test_part_of_a_subspace_overlaps_with_it_by_1():
    whole = _frame(6, 0)
    overlaps = _overlap({"part": whole[:, :2], "whole": whole})
    assert overlaps.overlap[0, 1].item() == pytest.approx(1.0)
    assert overlaps.chance(0, 1).mean == pytest.approx(6 / WIDE)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (4, 4)])
def test_numpy_finds_the_same_angles(a, b):
    one, other = (torch.randn(WIDE, n, generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate((a, b)))
    overlaps = _overlap({"one": one, "other": other})
    u, v = (numpy.linalg.svd(x.double().numpy(), full_matrices=False)[0] for x in (one, other))
    cosines = numpy.linalg.svd(u.T @ v, compute_uv=False)
    assert overlaps.overlap[0, 1].item() == pytest.approx((cosines**2).mean())
    numpy.testing.assert_allclose(overlaps.angles[0][1].numpy(), numpy.degrees(numpy.arccos(cosines)), atol=1e-6)


@pytest.mark.parametrize(("a", "b", "d"), [(1, 1, 40), (2, 5, 40), (4, 4, 12)])
def test_the_chance_level_is_that_of_random_subspaces(a, b, d):
    from reftlens.analysis.subspaces.geometry import chance_overlap

    generator, count = torch.Generator().manual_seed(0), 4000
    one, other = (torch.linalg.qr(torch.randn(count, d, n, generator=generator).double()).Q for n in (a, b))
    drawn = (one.mT @ other).square().sum(dim=(1, 2)) / min(a, b)
    chance = chance_overlap(d, a, b)
    assert abs(drawn.mean().item() - chance.mean) < 4 * chance.spread / count**0.5
    assert drawn.std().item() == pytest.approx(chance.spread, rel=0.08), "4 standard errors, with heavy tails"


def test_an_unrelated_subspace_is_at_chance_and_a_related_one_is_not():
    base = _frame(3, 0)
    near = base + 0.1 * torch.randn(WIDE, 3, generator=torch.Generator().manual_seed(1)).double()
    overlaps = _overlap({"base": base, "near": near} | {f"random {i}": _frame(3, 10 + i) for i in range(30)})
    frame = overlaps.to_frame()
    mine = frame[(frame.a == "base") & frame.b.str.startswith("random")]
    assert abs(mine.z.mean()) < 4 / 30**0.5 and mine.z.max() < 5
    assert frame[(frame.a == "base") & (frame.b == "near")].z.item() > 10
    assert len(frame) == 32 * 31 / 2 and frame.chance.eq(3 / WIDE).all()


def test_everything_that_spans_is_taken():
    import reftlens as rl

    plane = _frame(2, 3, D)
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([3.0, 2.0]) @ plane.T
    das, gated = rl.DAS(D, basis=plane), rl.interventions.BoundlessDAS(D, 4)
    gated.frame.set(rl.interventions.orthonormal(torch.cat([plane, _frame(2, 5, D)], dim=1)).float())
    gated.anneal(1.0)  # half of it is open: the first two columns
    reft = rl.ReFT({rl.resid_post(0, "last"): das, rl.resid_post(1, "last"): rl.LoReFT(D, 2)})
    overlaps = _overlap({"PCA": rl.directions.pca(x, 2), "ReFT": reft, "DAS": das, "boundless": gated, "tensor": plane})
    assert [n for n in overlaps.names if n.startswith("ReFT, ")] == [f"ReFT, {s}" for s in reft.sites]
    same = [i for i, name in enumerate(overlaps.names) if name != f"ReFT, {reft.sites[1]}"]
    torch.testing.assert_close(
        overlaps.overlap[same][:, same],
        torch.ones(5, 5, dtype=torch.float64),
        atol=1e-6,
        rtol=0,  # frames are float32
    )
    assert _overlap({"a": reft, "b": plane}, site=0).overlap[0, 1] > 1 - 1e-6
    assert _overlap({"a": reft, "b": plane}, site=reft.sites[1]).overlap[0, 1] < 0.9


def test_what_has_no_angle_is_said():
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(0, "last"): rl.SteeringVector(D)})
    with pytest.raises(ValueError, match="'mine' is zero"):
        _overlap({"mine": reft})
    with pytest.raises(ValueError, match="different spaces"):
        _overlap({"a": _frame(2, 0), "b": _frame(2, 0, 12)})
    with pytest.raises(ValueError, match="columns that span it"):
        _overlap({"a": torch.ones(3)})
    with pytest.raises(ValueError, match="expected one or more"):
        _overlap({})
    with pytest.raises(ValueError, match="not among the sites"):
        _overlap({"mine": reft}, site=3)


def test_the_figure_shows_overlap_and_chance():
    axes = _overlap({"a": _frame(2, 0), "b": _frame(2, 1)}).plot()
    labels = [text.get_text() for text in axes.texts]
    assert "1.00" in labels and "0.05±0.03" in labels and len(labels) == 8


# -- the causal inner product --------------------------------------------------------------------------------


def _rows(d, count=200):
    """An unembedding with a mean, and a covariance far from round."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(count, d, generator=generator).double()
    return rows @ torch.diag(torch.logspace(-1, 1, d).double()) @ _frame(d, 3, d).T + 2.0


def _same(one, other, atol=1e-9):
    torch.testing.assert_close(one.overlap, other.overlap, atol=atol, rtol=0)
    for a in range(len(one.names)):
        for b in range(len(one.names)):
            torch.testing.assert_close(one.angles[a][b].cos(), other.angles[a][b].cos(), atol=atol, rtol=0)


def test_a_round_unembedding_gives_the_euclidean_metric():
    import reftlens as rl

    rows = WIDE**0.5 * torch.cat([torch.eye(WIDE), -torch.eye(WIDE)]).double() + 5.0  # covariance: the identity
    subspaces = {"a": _frame(2, 0), "b": _frame(3, 1), "c": torch.randn(WIDE, 2)}
    round_one, euclidean = _overlap(subspaces, metric=rl.subspaces.metric_of(rows)), _overlap(subspaces)
    _same(round_one, euclidean)
    assert round_one.d == euclidean.d and round_one.chance(0, 1) == euclidean.chance(0, 1)


def test_what_softmax_cannot_tell_apart_leaves_the_causal_overlap_and_moves_the_euclidean_one():
    """Unembedding γ → Aγ + β and hidden state h → A⁻ᵀh give the same probabilities."""
    import reftlens as rl

    rows, subspaces = _rows(WIDE), {"a": _frame(2, 0), "b": _frame(3, 1), "c": _frame(1, 2)}
    generator = torch.Generator().manual_seed(4)
    turn = torch.randn(WIDE, WIDE, generator=generator).double() / WIDE**0.5 + torch.eye(WIDE).double()
    others, h = rows @ turn.T + torch.randn(WIDE, generator=generator), torch.randn(WIDE, generator=generator).double()
    back = torch.linalg.inv(turn).T
    torch.testing.assert_close((others @ back @ h).softmax(0), (rows @ h).softmax(0), atol=1e-9, rtol=0)
    moved = {name: back @ columns for name, columns in subspaces.items()}
    causal = [_overlap(s, metric=rl.subspaces.metric_of(r)) for s, r in ((subspaces, rows), (moved, others))]
    _same(*causal, atol=1e-8)
    assert (_overlap(moved).overlap - _overlap(subspaces).overlap).abs().max() > 0.01
    assert (causal[0].overlap - _overlap(subspaces).overlap).abs().max() > 0.01


def test_lengths_are_how_far_logits_spread_over_the_vocabulary(any_model):
    """Oracle: the model's own final norm and unembedding, with the norm's division by the length undone."""
    import reftlens as rl

    metric, norm = rl.subspaces.causal_metric(any_model), any_model.ln_final
    generator = torch.Generator().manual_seed(0)
    h, *pair = torch.randn(3, D, generator=generator)

    def logits(x):
        centred = x if norm.uses_rms_norm else x - x.mean()
        bias = getattr(norm.original_component, "bias", None)
        scaled = (norm(x[None, None])[0, 0] - (0.0 if bias is None else bias)) * centred.square().mean().sqrt()
        return any_model.unembed(scaled[None, None])[0, 0]

    with torch.no_grad():
        moves = torch.stack([logits(h + u) - logits(h) for u in pair]).double()
    expected = torch.cov(moves, correction=0)
    x = metric.coordinates(torch.stack(pair, dim=1))
    torch.testing.assert_close(x.T @ x, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_seeds_and_frames_are_compared_in_the_metric_that_is_given(gpt2):
    import reftlens as rl
    from reftlens.training.run import Step

    metric = rl.subspaces.causal_metric(gpt2)
    assert metric.root.shape == (D - 1, D), "what a LayerNorm centres away has no length"
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 2)})
    runs = reft.seeds([0, 1, 2])
    stable, overlaps = rl.subspaces.stability(runs, metric=metric), _overlap(runs, metric=metric)
    pairs = [overlaps.overlap[a, b].item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert stable.sites[0].overlaps.tolist() == pytest.approx(pairs)
    assert stable.sites[0].chance == overlaps.chance(0, 1)
    assert rl.subspaces.stability(runs).sites[0].overlaps.tolist() != pytest.approx(pairs, abs=1e-3)
    for result in (stable, overlaps):
        assert metric.name in result.plot().get_xlabel() and set(result.to_frame()["metric"]) == {metric.name}
        assert metric.name in str(result) and "Euclidean" not in str(result)
    path = rl.subspaces.FramePath(runs["seed 0"], metric=metric)
    path(Step(1, 0.0, 0.0, 0.0, runs["seed 1"]))
    assert path.overlap().tolist() == pytest.approx([pairs[0], 1.0])
    assert metric.name in path.plot().get_ylabel() and set(path.to_frame()["metric"]) == {metric.name}
    euclidean = rl.subspaces.stability(runs)
    assert "Euclidean" in str(euclidean) and "Euclidean" in euclidean.plot().get_xlabel()


def test_euclidean_random_directions_are_as_alike_as_the_effective_dimensions_say():
    import reftlens as rl

    metric, count = rl.subspaces.metric_of(_rows(WIDE)), 4000
    drawn = torch.randn(2, WIDE, count, generator=torch.Generator().manual_seed(0)).double()
    one, other = (metric.coordinates(x) for x in drawn)
    cosines = (one * other).sum(dim=0) / one.norm(dim=0) / other.norm(dim=0)
    assert cosines.square().mean().item() == pytest.approx(1 / metric.effective_dimensions, rel=0.15)
    assert metric.effective_dimensions < WIDE / 2


def test_what_the_causal_metric_is_not_of_is_refused(gpt2):
    import reftlens as rl

    metric = rl.subspaces.causal_metric(gpt2)
    for site in (rl.attn_out(1, "last"), rl.final_norm("last"), rl.mlp_out(0, "last")):
        reft = rl.ReFT({site: rl.DAS(D, 2)})
        for call in (lambda r: _overlap({"a": r}, metric=metric), lambda r: rl.subspaces.FramePath(r, metric=metric)):
            with pytest.raises(ValueError, match=r"is not the residual stream, .* or compare in the Euclidean metric"):
                call(reft)
        assert _overlap({"a": reft, "b": reft}).overlap[0, 1] > 1 - 1e-6
    with pytest.raises(ValueError, match="'a' has width 40, and the metric 'causal inner product' is of 32"):
        _overlap({"a": _frame(2, 0)}, metric=metric)
    with pytest.raises(ValueError, match="'ones' is zero or not finite: it spans nothing"):
        _overlap({"ones": torch.ones(D, 1)}, metric=metric)
    with pytest.raises(ValueError, match="all alike"):
        rl.subspaces.metric_of(torch.ones(5, 3))


# -- weights -------------------------------------------------------------------------------------------------


def _weights(reft, model, **kwargs):
    from reftlens.analysis.subspaces.weights import weight_overlap

    return weight_overlap(reft, model, **kwargs)


def _at(site, basis):
    import reftlens as rl

    return rl.ReFT({site: rl.directions.Direction("given", basis.double(), torch.ones(basis.shape[1])).as_exchange()})


def test_the_planted_plane_is_what_embedding_writes_and_unembedding_reads():
    import reftlens as rl

    world = planted()
    shares = _weights(_at(rl.resid_post(1, "last"), world.subspace), world.model)
    assert [r.weight for r in shares.rows if r.role == "writes"] == ["embed"], "blocks that write nothing are left out"
    assert shares["embed"].chance.z(shares["embed"].share) > 4 and shares["unembed"].share > 0.95
    unrelated = _weights(_at(rl.resid_post(1, "last"), rl.directions.random_subspace(D, 2, seed=5).basis), world.model)
    assert abs(unrelated["embed"].chance.z(unrelated["embed"].share)) < 3
    assert abs(unrelated["unembed"].chance.z(unrelated["unembed"].share)) < 3
    read = world.model.W_U.double()  # the norm's gain is 1: it only centres
    centred = read - read.mean(dim=0)
    share = (world.subspace.double().T @ centred).square().sum() / centred.square().sum()
    assert shares["unembed"].share == pytest.approx(share.item())


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2", "llama"])
def test_writers_are_before_a_site_and_readers_after(name):
    import reftlens as rl

    model, plane = bridge(name), _frame(2, 0, D)
    layers = {r.weight: (r.role, r.layer) for r in _weights(_at(rl.resid_post(1, "last"), plane), model).rows}
    assert {layer for role, layer in layers.values() if role == "writes"} == {-1, 0, 1}
    assert {layer for role, layer in layers.values() if role == "reads"} == {2, 3}
    first = _weights(_at(rl.resid_pre(0, "last"), plane), model)
    assert all(r.layer == -1 for r in first.rows if r.role == "writes")
    only = [r.weight for r in _weights(_at(rl.mlp_out(1, "last"), plane), model).rows if r.role == "writes"]
    assert only == ["blocks.1.mlp.out"]
    heads = [r.weight for r in _weights(_at(rl.attn_out(1, "last"), plane), model).rows if r.role == "writes"]
    assert heads == [f"blocks.1.attn.o.{i}" for i in range(4)]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_what_the_heads_write_is_what_the_model_adds(name):
    import reftlens as rl

    model = bridge(name)
    data = rl.encode_prompts(model, ["the cat sat on the mat"])
    z = rl.activations(model, data, rl.attn_z(1, "all"), progress=False).double()
    out = rl.activations(model, data, rl.attn_out(1, "all"), progress=False).double()
    heads = [weight for _, weight in _writers(model, rl.attn_out(1, "last"))]
    total = sum(mine @ weight.T for mine, weight in zip(z.split(8, dim=1), heads, strict=True))
    if name == "gpt2":
        torch.testing.assert_close(total + model.blocks[1].attn.b_O.detach(), out, atol=1e-5, rtol=1e-5)  # float32
    else:  # the norm behind attention divides by a length: the direction is what is linear
        assert torch.nn.functional.cosine_similarity(total, out, dim=1).min() > 1 - 1e-6


def _writers(model, site):
    from reftlens.analysis.subspaces.weights import stream_writers

    return stream_writers(model, site)


def test_the_spread_of_a_share_is_that_of_random_subspaces():
    import reftlens as rl

    model, site = bridge("llama"), rl.resid_post(1, "last")
    drawn = {"unembed": [], "blocks.0.attn.o.1": [], "blocks.2.mlp.in": []}
    for seed in range(150):
        weights = _weights(_at(site, rl.directions.random_subspace(D, 2, seed=seed).basis), model)
        for name, values in drawn.items():
            values.append(weights[name].share)
    for name, values in drawn.items():
        shares, chance = torch.tensor(values), weights[name].chance
        assert abs(shares.mean() - chance.mean) < 4 * chance.spread / 150**0.5
        assert shares.std().item() == pytest.approx(chance.spread, rel=0.25), "4 standard errors"


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_subspace_of_neurons_or_heads_is_compared_as_what_it_writes(name):
    import reftlens as rl

    model = bridge(name)
    for site, stream, width in (
        (rl.mlp_post(1, "last"), rl.mlp_out(1, "last"), 48),
        (rl.attn_z(1, "last", heads=[3, 0]), rl.attn_out(1, "last"), 16),
        (rl.attn_z(1, "last"), rl.attn_out(1, "last"), D),
    ):
        writes = dict(_writers(model, stream))
        heads = [f"blocks.1.attn.o.{i}" for i in (site.heads or range(4))]
        matrix = torch.cat([writes[w] for w in (heads if stream.hook.endswith("attn_out") else writes)], dim=1)
        basis = _frame(2, 0, width)
        written = rl.interventions.orthonormal(matrix @ basis.double())
        through, plain = _weights(_at(site, basis), model), _weights(_at(stream, written), model)
        assert [r.weight for r in through.rows] == [r.weight for r in plain.rows] and through.site == site
        shares = [[r.share for r in result.rows] for result in (through, plain)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-5)


def test_one_head_writes_into_its_own_span_and_is_told_from_the_others():
    import reftlens as rl

    shares = _weights(_at(rl.attn_z(1, "last", heads=2), torch.eye(8)), bridge("gpt2"))
    assert shares.rank == 8 and shares["blocks.1.attn.o.2"].share == pytest.approx(1.0)
    assert all(shares[f"blocks.1.attn.o.{i}"].share < 0.6 for i in (0, 1, 3)) and "blocks.0.attn.o.2" not in str(shares)


def test_sites_outside_the_stream_are_refused():
    import reftlens as rl

    for site in (rl.attn_q(1, "last"), rl.final_norm("last"), rl.Site("blocks.1.mlp.hook_pre", "last")):
        with pytest.raises(ValueError, match=r"not part of the residual stream.*mid, resid_post, attn_out or mlp_out$"):
            _weights(_at(site, _frame(2, 0, D)), bridge("gpt2"))
    with pytest.raises(ValueError, match="width 32, and what reads them 48"):
        _weights(_at(rl.mlp_post(1, "last"), _frame(2, 0, D)), bridge("gpt2"))


def test_weights_have_a_figure_and_a_table():
    import reftlens as rl

    shares = _weights(_at(rl.resid_post(1, "last"), _frame(2, 0, D)), bridge("gpt2"))
    frame = shares.to_frame()
    assert frame.loc["blocks.0.attn.o.0"].overlap_chance == 8 / D and frame.loc["unembed"].chance == 2 / D
    assert "subspace at blocks.1" in shares.plot().get_xlabel() and "chance 0.062" in str(shares)
    with pytest.raises(ValueError, match=r"no weight .*there are: .* more; close: blocks"):
        shares["blocks.9.mlp.in"]
