"""Gates: open they are DAS, shut they do nothing, and training finds what was planted."""

import math
from dataclasses import replace

import pytest
import torch
from planted import VALUES, answers_of, pairs, planted

import reftlens as rl

D = 16


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _sae(k=24):
    g = _seeded(3)
    return rl.interventions.SAEMask(D, *(torch.randn(*shape, generator=g) for shape in ((D, k), (k, D), (k,), (D,))))


MAKE = {
    "BoundlessDAS": lambda: rl.interventions.BoundlessDAS(D, 4, generator=_seeded()),
    "MaskedDAS": lambda: rl.interventions.MaskedDAS(D, 4, sparsity=0.0, generator=_seeded()),
    "neurons": lambda: rl.interventions.SigmoidMask(D),
    "PCA": lambda: rl.interventions.SigmoidMask(
        D, rl.directions.pca(torch.randn(50, D, generator=_seeded(1)), 5).basis
    ),
    "SAE": _sae,
}


def _gate(module, logit):
    """Every direction open (+) or shut (-)."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in ("width", "logits"):
                p.fill_(logit)
    return module


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("count", [1, 7])
def test_shut_it_is_the_identity_and_open_the_exchange_in_its_subspace(name, count):
    module = MAKE[name]()
    h, source = torch.randn(2, count, D, generator=_seeded(2))
    torch.testing.assert_close(_gate(module, -1e4)(h, source=source[:, None]), h)
    edited = _gate(module, 1e4)(h, source=source[:, None])
    if name == "SAE":
        expected = h + (module.latents(source) - module.latents(h)) @ module.decoder
    else:
        basis = torch.eye(D) if module.basis() is None else module.basis().float()
        expected = h + (source - h) @ basis @ basis.T
    torch.testing.assert_close(edited, expected)
    assert module(h, 0.0, source=source[:, None]) is h
    half = module(h.bfloat16(), source=source[:, None])  # arithmetic is float32, and the sum is cast back once
    assert torch.equal(half, module(h.bfloat16().float(), source=source[:, None]).bfloat16())
    torch.testing.assert_close(module(h, -0.5, source=source[:, None]), h - 0.5 * (edited - h))
    left = torch.full_like(source, torch.nan)
    torch.testing.assert_close(module(h, source=left[:, None]), h)


def test_formulas_written_out():
    h, source = torch.randn(2, 6, D, generator=_seeded(2))
    das = MAKE["BoundlessDAS"]()
    gate = [1 / (1 + math.exp(-(0.5 * 4 - i - 0.5) / 2.0)) for i in range(4)]
    expected = h.clone()
    for i, m in enumerate(gate):
        column = das.basis()[:, i].detach()
        expected += m * ((source - h) @ column)[:, None] * column
    torch.testing.assert_close(das(h, source=source[:, None]), expected)
    masked = MAKE["MaskedDAS"]()
    with torch.no_grad():
        masked.logits.copy_(torch.tensor([0.3, -2.0, 0.0, 1.0]))
    expected = h.clone()
    for i, logit in enumerate([0.3, -2.0, 0.0, 1.0]):
        column = masked.basis()[:, i].detach()
        expected += ((source - h) @ column)[:, None] * column / (1 + math.exp(-logit))
    torch.testing.assert_close(masked(h, source=source[:, None]), expected)
    assert masked.learned_rank == 2 and masked.is_open().tolist() == [True, False, False, True]
    whole = h + (source - h) @ (b := masked.basis()[:, [0, 3]].detach()) @ b.T
    torch.testing.assert_close(masked.as_das()(h, source=source[:, None]), whole)
    mask = _gate(MAKE["neurons"](), 0.3)
    m = 1 / (1 + math.exp(-0.3))
    torch.testing.assert_close(mask(h, source=source[:, None]), (1 - m) * h + m * source)


@pytest.mark.parametrize("name", MAKE)
def test_the_temperature_falls_as_a_function_of_progress(name):
    module = MAKE[name]()
    start, end = module.temperature
    for progress in (0.0, 0.5, 1.0, 0.5):
        module.anneal(progress)
        assert module.temperature_now.item() == pytest.approx(start ** (1 - progress) * end**progress, rel=1e-5)
    assert module.penalty() is None
    assert module.learned_rank == module.is_open().sum()


@pytest.mark.parametrize("name", MAKE)
def test_it_is_stored_whole(name, gpt2, tmp_path):
    wide = {
        "BoundlessDAS": rl.interventions.BoundlessDAS(32, 3),
        "MaskedDAS": rl.interventions.MaskedDAS(32, 3),
        "neurons": rl.interventions.SigmoidMask(32, sparsity=0.1),
        "PCA": rl.interventions.SigmoidMask(32, rl.directions.random_subspace(32, 5, seed=1).basis),
        "SAE": rl.interventions.SAEMask(32, torch.randn(32, 6), torch.randn(6, 32)),
    }
    module = wide[name]
    module.anneal(0.7)
    rl.save(rl.ReFT({rl.resid_post(0, "last"): module}), tmp_path / "x", gpt2)
    loaded = rl.load(tmp_path / "x", gpt2)[0]
    h, source = torch.randn(2, 3, 32)
    assert torch.equal(loaded(h, source=source[:, None]), module(h, source=source[:, None]))
    assert loaded.settings() == module.settings()


def _planted_data(shuffled=False):
    truth = planted()
    order = torch.randperm(len(truth.value), generator=_seeded(5))
    value = truth.value[order] if shuffled else truth.value
    return truth, pairs(value, 512, 1, list(VALUES)[:200])[0], pairs(value, 150, 2, list(VALUES)[200:])[0]


def _fitted(module, shuffled=False, steps=50):
    truth, train, test = _planted_data(shuffled)
    reft = rl.ReFT({rl.resid_post(1, "last"): module})
    run = rl.fit(reft, truth.model, train, steps=steps, lr=5e-2, batch_size=64, progress=False)
    assert run.computation.startswith("light cone")
    return rl.causal.interchange_scores(reft, truth.model, test, progress=False).accuracy.value


def test_boundless_das_finds_a_planted_width():
    module = rl.interventions.BoundlessDAS(32, 8, sparsity=0.1, generator=_seeded(2))
    assert _fitted(module, steps=200) > 0.95
    assert module.is_open().tolist() == [True, True, *[False] * 6]
    opened = module.basis()[:, :2].detach()
    assert torch.linalg.svdvals(opened.T @ planted().subspace).min() > 0.95


def test_masked_das_learns_a_planted_rank_with_the_settings_it_has():
    """`benchmarks/learned_rank.py` has twenty networks of each rank."""
    truth, rank = planted(rank=4), 4
    train, _ = pairs(truth.value, 256, 1, list(VALUES)[:200], answers_of(rank))
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.interventions.MaskedDAS(32, 8, generator=_seeded(2))})
    rl.fit(reft, truth.model, train, steps=100, lr=5e-2, batch_size=64, progress=False)
    das = reft[0].as_das()
    assert reft[0].learned_rank == das.rank == rank
    assert torch.linalg.svdvals(das.basis().T @ truth.subspace).min() > 0.95


def test_where_the_source_tells_nothing_the_rank_is_0_and_everything_says_so():
    truth, train, test = _planted_data(shuffled=True)
    site = rl.resid_post(1, "last")
    reft = rl.ReFT({site: rl.interventions.MaskedDAS(32, 8, generator=_seeded(2))})
    rl.fit(reft, truth.model, train[:256], steps=60, lr=5e-2, batch_size=64, progress=False)
    assert reft[0].learned_rank == 0
    scores = rl.causal.interchange_scores(reft, truth.model, test, progress=False)
    assert scores.hits.tolist() == scores.unedited_hits.tolist()
    config = rl.FitConfig(steps=1)
    for call in (reft[0].as_das, lambda: rl.causal.controls(reft, truth.model, train, test, config, progress=False)):
        with pytest.raises(ValueError, match=r"no open direction \(learned rank 0\).* worth sparsity=1 nat"):
            call()
    for call in (
        lambda: rl.subspaces.overlap({"a": reft, "b": truth.subspace}),
        lambda: rl.subspaces.direction_tokens(reft, truth.model),
    ):
        with pytest.raises(ValueError, match="no open direction"):
            call()


def test_controls_match_random_subspaces_at_the_rank_that_was_learned():
    """And in how far they move: with the gates as they are, half open ones too."""
    truth, train, test = _planted_data()
    site, shut = rl.resid_post(1, "last"), rl.resid_post(0, "last")
    mask = rl.interventions.MaskedDAS(32, 8)
    with torch.no_grad():
        frame = torch.linalg.qr(torch.cat([truth.subspace, torch.randn(32, 6, generator=_seeded())], dim=1)).Q
        mask.frame.set(frame)
        mask.logits.copy_(torch.tensor([9.0, 9.0, *[-1.0] * 6]))
    reft = rl.ReFT({shut: _gate(rl.interventions.MaskedDAS(32, 4), -9.0), site: mask})
    settings = dict(random=3, random_model=False, shuffles=99, progress=False)
    table = rl.causal.controls(reft, truth.model, train[:64], test[:40], rl.FitConfig(steps=1), **settings)
    assert table.dimensions == (2,) and "of dimension 2, as the trained one" in str(table)
    assert table["trained"].accuracy.value > 0.95 > table["random subspaces"].accuracy.high
    from reftlens.analysis.causal.baselines import Placebo
    from reftlens.analysis.causal.variable import movement_of

    h, source = torch.randn(2, 5, 32, generator=_seeded(1))
    placebo = Placebo(movement_of(mask), 2, seed=0)
    lengths = [(m(h, source=source[:, None]) - h).norm(dim=1) for m in (mask, placebo)]
    assert torch.linalg.matrix_rank(placebo(h, source=source[:, None]) - h, atol=1e-4) == 2
    torch.testing.assert_close(*lengths)


def test_the_light_cone_of_a_mask_is_exact_on_every_architecture(any_model):
    prompts = ["the cat sat on the mat", "a dog ran by", "the moon over the hill"]
    data = rl.encode(any_model, [rl.Example(p, " the") for p in prompts]).resampled(seed=1)
    d = int(any_model.cfg.d_model)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.interventions.MaskedDAS(d, 4, generator=_seeded())})
    cone, full = (rl.evaluate(reft, any_model, data, reuse=reuse, progress=False) for reuse in (True, False))
    assert cone.computation.startswith("light cone") and (full.loss[0] - full.loss[1]).abs().min() > 1e-6
    torch.testing.assert_close(cone.loss, full.loss, atol=1e-5, rtol=0)


def test_a_mask_finds_planted_components_and_nothing_where_there_is_nothing():
    frame = torch.linalg.qr(torch.cat([planted().subspace, torch.randn(32, 30, generator=_seeded())], dim=1)).Q
    mask = rl.interventions.SigmoidMask(32, frame, sparsity=0.05)
    assert _fitted(mask) > 0.95
    assert mask.is_open().nonzero().flatten().tolist() == [0, 1]
    twin = rl.interventions.SigmoidMask(32, frame, sparsity=0.05)
    assert _fitted(twin, shuffled=True) < 0.5


def test_the_penalty_shuts_what_is_not_needed_and_only_it():
    free, priced = rl.interventions.SigmoidMask(32), rl.interventions.SigmoidMask(32, sparsity=0.05)
    assert min(_fitted(free), _fitted(priced)) > 0.95
    assert priced.gate().sum() < free.gate().sum()


def test_masks_that_train_together_train_as_alone():
    truth, train, _ = _planted_data()
    together = [rl.ReFT({rl.resid_post(1, "last"): rl.interventions.SigmoidMask(32, sparsity=s)}) for s in (0.0, 0.1)]
    alone = [reft.clone() for reft in together]
    config = rl.FitConfig(steps=4, lr=5e-2, batch_size=16)
    rl.training.fit_many(dict(zip("ab", together, strict=True)), truth.model, train, config, progress=False)
    for reft, expected in zip(together, alone, strict=True):
        rl.fit(expected, truth.model, train, config, progress=False)
        torch.testing.assert_close(reft[0].logits, expected[0].logits, atol=1e-5, rtol=1e-4)
        assert reft[0].temperature_now == expected[0].temperature_now


def test_what_makes_no_mask_is_said():
    with pytest.raises(ValueError, match="not orthonormal"):
        rl.interventions.SigmoidMask(D, torch.ones(D, 2))
    with pytest.raises(ValueError, match="start >= end > 0"):
        rl.interventions.BoundlessDAS(D, 2, temperature=(0.1, 1.0))
    with pytest.raises(ValueError, match="needs the autoencoder"):
        rl.interventions.SAEMask(D)
    with pytest.raises(ValueError, match="decoder has shape"):
        rl.interventions.SAEMask(D, torch.zeros(D, 3), torch.zeros(4, D))
    with pytest.raises(ValueError, match="sparsity"):
        rl.interventions.SigmoidMask(D, sparsity=-1.0)


def test_noise_is_a_function_of_its_seed():
    h = torch.zeros(3, D)
    noise = rl.interventions.Noise(D, 0.5, seed=1)
    assert torch.equal(noise(h), rl.interventions.Noise(D, 0.5, seed=1)(h))
    assert not torch.equal(noise(h), rl.interventions.Noise(D, 0.5, seed=2)(h))
    assert rl.interventions.Noise(10_000, 0.5)(torch.zeros(1, 10_000)).std() == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(noise(h, 2.0), 2 * noise(h))


def test_joined_batches_are_their_rows(gpt2):
    _, train, test = _planted_data()
    cause, isolate = train[:5].with_sources({"a": train.sources["source"].batch[:5]}), test[:3]
    both = rl.Batch.join([cause, isolate])
    assert len(both) == 8 and set(both.sources) == {"a", "source"}
    assert both.sources["a"].rows.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    for name, batch in (("a", cause), ("source", isolate)):
        rows = (both.sources[name].rows >= 0).nonzero().flatten().tolist()
        mine = both[rows]
        assert mine.with_sources(mine.sources[name]).fingerprint == batch.with_sources(batch.sources[name]).fingerprint
    with pytest.raises(ValueError, match="no batches"):
        rl.Batch.join([])
    with pytest.raises(ValueError, match="different tokenizers"):
        rl.Batch.join([train, replace(test, tokenizer=gpt2.tokenizer)])


def test_a_resampled_row_is_never_its_own_source():
    _, train, _ = _planted_data()
    for count in (2, 3, 20):
        rows = train[:count].resampled(seed=1).sources["source"].rows
        assert sorted(rows.tolist()) == list(range(count)) and not (rows == torch.arange(count)).any()
    assert not torch.equal(rows, train[:20].resampled(seed=2).sources["source"].rows)
    with pytest.raises(ValueError, match="needs another row"):
        train[:1].resampled()


def test_units_are_ranked_by_logit_also_where_their_gates_are_all_0_or_1():
    site, heads, wide = rl.mlp_post(1, "last"), rl.attn_z(0, "last", heads=[3, 1]), rl.attn_z(1, "last")
    masks = {site: rl.interventions.SigmoidMask(5), heads: rl.interventions.SigmoidMask(16)}
    masks |= {wide: rl.interventions.SigmoidMask(32), rl.resid_post(0, "last"): _sae()}
    masks[rl.resid_post(1, "last")] = rl.interventions.MaskedDAS(D, 3)
    with torch.no_grad():
        for n, module in enumerate(masks.values()):
            module.logits.copy_(torch.randn(len(module.logits), generator=_seeded(n)))
            module.anneal(1.0)
            module.temperature_now.fill_(1e-4)  # every gate saturates
        masks[site].logits[3], masks[heads].logits[9], masks[wide].logits[11] = 9.0, 8.0, 7.0
    reft = rl.ReFT(masks)
    frame = rl.places.ranked_units(reft, planted().model).to_frame()
    assert len(frame) == 5 + 16 + 32 + 24 + 3 and frame["logit"].is_monotonic_decreasing
    assert frame["gate"].isin([0.0, 1.0]).mean() > 0.9 and (frame["open"] == (frame["logit"] > 0)).all()
    first = frame.fillna({"head": -1})[["hook", "kind", "head", "unit"]].head(3).values.tolist()
    assert first == [
        ["blocks.1.mlp.hook_post", "neuron", -1, 3],
        ["blocks.0.attn.hook_z", "neuron", 1, 1],
        ["blocks.1.attn.hook_z", "neuron", 1, 3],
    ]
    assert set(frame["kind"]) == {"neuron", "latent", "direction"}
    without = rl.places.ranked_units(reft).to_frame()
    assert without["unit"].iloc[2] == 11 and without["head"].isna().iloc[2]
    gated = rl.places.gated_sites([rl.attn_z(1, "last", heads=[h]) for h in (0, 2)], lambda: rl.DAS(8, 1))
    with torch.no_grad():
        gated[1].gate.trained.fill_(0.4)
    ranked = rl.places.ranked_units(gated)
    assert [(u.head, u.logit, u.gate) for u in ranked.units] == [(2, 4.0, 1.0), (0, 0.0, 0.5)]
    assert "1 of 2 units are open" in str(ranked) and ranked.plot().get_ylabel() == "logit of the gate"
    with pytest.raises(ValueError, match="DAS has no gates to rank"):
        rl.places.ranked_units(rl.ReFT({site: rl.DAS(D, 1)}))
