"""Interventions with a source: what they compute, that sources reach the right tokens, and that reuse is exact."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

D = 16


def _das(d=D, **kwargs):
    import reftlens as rl

    return rl.DAS(d, generator=torch.Generator().manual_seed(1), **(kwargs or {"rank": 3}))


def _data(lengths=((5, 2), (8, 1), (6, 3)), seed=0):
    """Rows of random tokens; the sources have other lengths."""
    from reftlens.text.batch import batch_from_rows

    generator = torch.Generator().manual_seed(seed)

    def rows(sizes):
        ids = [torch.randint(1, 60, (p + c,), generator=generator).tolist() for p, c in sizes]
        return batch_from_rows(ids, [[1] * p + [2] * c for p, c in sizes])

    return rows(lengths), rows([(p + 3 - i, 0) for i, (p, _) in enumerate(lengths)])


def test_das_exchanges_what_lies_in_its_subspace_and_nothing_else():
    das, h, s = _das(), torch.randn(7, D), torch.randn(7, D)
    basis = das.basis()
    out = das(h, source=s[:, None])
    torch.testing.assert_close(out @ basis, s @ basis)
    outside = torch.eye(D) - basis @ basis.T
    torch.testing.assert_close(out @ outside, h @ outside)
    assert torch.equal(das(h, 0.0, source=s[:, None]), h)
    torch.testing.assert_close(das(h, 0.5, source=s[:, None]), (h + out) / 2)


def test_each_variable_owns_its_columns_and_takes_its_own_source():
    das, h, s = _das(variables={"left": 1, "right": 2}), torch.randn(4, D), torch.randn(4, 2, D)
    left, right = das.subspace("left"), das.subspace("right")
    out = das(h, source=s)
    torch.testing.assert_close(out @ left, s[:, 0] @ left)
    torch.testing.assert_close(out @ right, s[:, 1] @ right)
    s[0, 0], s[1, 1] = torch.nan, torch.nan
    out = das(h, source=s)
    torch.testing.assert_close(out[0] @ left, h[0] @ left)
    torch.testing.assert_close(out[0] @ right, s[0, 1] @ right)
    torch.testing.assert_close(out[1] @ right, h[1] @ right)
    assert torch.isfinite(out).all()
    with pytest.raises(ValueError, match="no variable 'up'"):
        das.subspace("up")


def test_a_source_is_required_where_something_is_exchanged_and_refused_elsewhere():
    import reftlens as rl

    with pytest.raises(ValueError, match="was given no source"):
        _das()(torch.randn(2, D))
    with pytest.raises(ValueError, match="exchanges nothing"):
        rl.LoReFT(D, rank=2)(torch.randn(2, D), source=torch.randn(2, 1, D))
    for settings in ({}, {"rank": 2, "variables": {"a": 2}}):
        with pytest.raises(ValueError, match="not both rank and variables"):
            rl.DAS(D, **settings)
    with pytest.raises(ValueError, match="expected 1 or more"):
        rl.DAS(D, variables={"a": 0})


def test_interchange_at_the_last_token_gives_the_sources_own_next_token(any_model):
    """The whole vector of the last block exchanged: the logits there are those of the source."""
    import reftlens as rl
    from reftlens.editing.engine import forward

    base, source = _data()
    data = base.with_sources(source)
    last = any_model.cfg.n_layers - 1
    reft = rl.ReFT({rl.resid_post(last, "last"): rl.Interchange(any_model.cfg.d_model)})
    with torch.no_grad(), reft.on(any_model, data):
        edited = forward(any_model, data.tokens, data.attention_mask)
    with torch.no_grad():
        theirs = forward(any_model, source.tokens, source.attention_mask)
    for row in range(3):
        here, there = int(base.prompt_mask[row].sum()) - 1, int(source.attention_mask[row].sum()) - 1
        torch.testing.assert_close(edited[row, here], theirs[row, there], atol=1e-5, rtol=1e-4)


def test_a_row_that_is_its_own_source_is_not_changed(gpt2):
    import reftlens as rl

    base, _ = _data()
    sites = {rl.resid_post(0, "f2+l1"): _das(gpt2.cfg.d_model), rl.mlp_out(1, "all"): _das(gpt2.cfg.d_model)}
    score = rl.evaluate(rl.ReFT(sites), gpt2, base.with_sources(base), progress=False)
    assert score.loss[1].tolist() == pytest.approx(score.loss[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_sources_follow_their_rows_into_any_batch(gpt2, order):
    """Rows in another order, in batches of any size, with reuse or without: the loss of each row is its own."""
    import reftlens as rl

    base, source = _data()
    data = base.with_sources(source)
    reft = rl.ReFT({rl.resid_post(0, "f1+l2"): _das(gpt2.cfg.d_model)})
    expected = rl.evaluate(reft, gpt2, data, reuse=False, progress=False).loss[1].tolist()
    assert len(set(expected)) == 3
    for reuse in (False, True):
        for size in (1, 2, 3):
            evaluation = rl.evaluate(reft, gpt2, data[order], reuse=reuse, batch_size=size, progress=False)
            assert evaluation.loss[1].tolist() == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_only_the_sources_that_rows_take_from_are_read_and_equal_ones_once(gpt2, monkeypatch):
    """And every row gets what it would get from a source of its own."""
    import reftlens as rl
    from reftlens.editing import reading
    from reftlens.text.batch import Batch

    seen, forward = [], reading.forward
    monkeypatch.setattr(
        reading, "forward", lambda m, tokens, mask: seen.append(len(tokens)) or forward(m, tokens, mask)
    )
    base, source = _data()
    reft = rl.ReFT({rl.resid_post(0, "f1+l2"): _das(gpt2.cfg.d_model)})

    def losses(data):
        seen.clear()
        return rl.evaluate(reft, gpt2, data, progress=False, reuse=False).loss[1].tolist()

    apart = losses(base.with_sources((source, [2, 0, 2])))
    assert seen == [2]
    twice = Batch.join([source, source])
    assert losses(base.with_sources((twice, [2, 3, 5]))) == pytest.approx(apart, abs=1e-6) and seen == [2]
    own = losses(base.with_sources((source, [-1, -1, -1])))
    assert len(set(apart) | set(own)) == 6 and seen == [1], "one, for its width"


def test_reuse_is_exact_for_das_at_several_sites_and_positions(gpt2_double):
    import reftlens as rl

    base, source = _data()
    data = base.with_sources({"a": source, "b": source[[1, 2, 0]]})
    refts = [
        rl.ReFT(
            {
                rl.resid_post(0, "l2"): _das(gpt2_double.cfg.d_model, variables={"a": 1, "b": 2}),
                rl.attn_z(1, "l1", heads=[1]): _das(
                    gpt2_double.cfg.d_model // gpt2_double.cfg.n_heads, variables={"b": 1}
                ),
            }
        ).double()
        for _ in range(2)
    ]
    runs = [
        rl.fit(reft, gpt2_double, data, steps=4, batch_size=2, reuse=reuse, progress=False)
        for reft, reuse in zip(refts, (False, True), strict=True)
    ]
    assert runs[1].computation.startswith("light cone")
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-10)
    for a, b in zip(refts[0].parameters(), refts[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_several_das_train_together_as_they_would_alone(gpt2_double):
    import reftlens as rl

    base, source = _data()
    data = base.with_sources(source)
    reft = rl.ReFT({rl.resid_post(0, "last"): _das(gpt2_double.cfg.d_model)}).double()
    config = rl.FitConfig(steps=3, batch_size=2)
    copies = reft.seeds([0, 1])
    results = rl.training.fit_many(copies, gpt2_double, data, config, progress=False)
    for seed in (0, 1):
        alone = reft.clone()
        alone.reset(seed)
        expected = rl.fit(alone, gpt2_double, data, config, seed=seed, progress=False)
        assert results[f"seed {seed}"].losses == pytest.approx(expected.losses, rel=1e-10)
        torch.testing.assert_close(next(copies[f"seed {seed}"].parameters()), next(alone.parameters()))


def test_what_does_not_fit_together_is_named(gpt2):
    import reftlens as rl

    base, source = _data()
    reft = rl.ReFT({rl.resid_post(0, "last"): _das(gpt2.cfg.d_model)})
    with pytest.raises(ValueError, match="no such source"):
        rl.evaluate(reft, gpt2, base, progress=False)
    with pytest.raises(ValueError, match="no intervention exchanges"):
        rl.evaluate(reft, gpt2, base.with_sources({"source": source, "other": source}), progress=False)
    with pytest.raises(ValueError, match="2 row"):
        base.with_sources(source[:2])
    with pytest.raises(ValueError, match="rows outside"):
        base.with_sources((source, torch.tensor([0, 1, 3])))
    everywhere = rl.ReFT({rl.resid_post(0, "all"): _das(gpt2.cfg.d_model)})
    with pytest.raises(ValueError, match=r"row 0: .* token\(s\), and .* in its source"):
        rl.evaluate(everywhere, gpt2, base.with_sources(source), progress=False)


def test_a_variable_that_is_left_in_a_row_changes_nothing_there(gpt2):
    import reftlens as rl

    base, source = _data()
    data = base.with_sources((source, torch.tensor([0, -1, 0])))
    reft = rl.ReFT({rl.resid_post(0, "last"): _das(gpt2.cfg.d_model)})
    score = rl.evaluate(reft, gpt2, data, progress=False)
    assert ((score.loss[1] - score.loss[0]).abs() < 1e-6).tolist() == [False, True, False]


def test_das_is_saved_and_loaded_with_its_variables(gpt2, tmp_path):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(0, "last"): _das(gpt2.cfg.d_model, variables={"op2": 2, "op1": 1})})
    rl.save(reft, tmp_path / "das", gpt2)
    loaded = rl.load(tmp_path / "das", gpt2)
    assert loaded[0].variables == ("op2", "op1")
    assert torch.equal(loaded[0].subspace("op1"), reft[0].subspace("op1"))


def test_das_equals_pyvenes_low_rank_rotation_on_equal_weights():
    import reftlens as rl

    stored = load_file(Path(__file__).parent / "reference" / "pyreft_functions.safetensors")
    base, source, out, basis = (
        stored[f"LowRankRotatedSpaceIntervention.{key}"] for key in ("base", "source", "out", "R")
    )
    das = rl.DAS(len(basis), basis=basis)
    torch.testing.assert_close(das(base, source=source[:, None]), out, atol=1e-6, rtol=0)
    assert (out - base).abs().max() > 0.1


def test_das_starts_from_a_basis_and_keeps_it_where_it_is_frozen(gpt2, tmp_path):
    import reftlens as rl

    base, source = _data()
    data, d = base.with_sources(source), gpt2.cfg.d_model
    basis = torch.linalg.qr(torch.randn(d, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    start, frozen = rl.DAS(d, basis=basis), rl.DAS(d, 3, basis=basis, frozen=True)
    for das in (start, frozen):
        assert das.rank == 3 and das.frame.matrix.dtype == torch.float32
        torch.testing.assert_close(das.basis().double(), basis, atol=1e-6, rtol=0)
        das.reset(torch.Generator().manual_seed(1))
    torch.testing.assert_close(frozen.basis().double(), basis, atol=1e-6, rtol=0)
    assert (start.basis().double() - basis).abs().max() > 0.1
    place, pushed = rl.resid_post(0, "last"), rl.SteeringVector(d)
    before = frozen.basis().detach().clone()
    rl.fit(rl.ReFT({place: frozen, rl.resid_post(1, "last"): pushed}), gpt2, data, steps=3, lr=0.1, progress=False)
    assert torch.equal(frozen.basis(), before) and pushed.vector.abs().max() > 0.1
    with pytest.raises(ValueError, match="nothing to train: DAS"):
        rl.fit(rl.ReFT({place: frozen}), gpt2, data, steps=3, progress=False)
    rl.save(rl.ReFT({place: frozen}), tmp_path / "frozen", gpt2)
    loaded = rl.load(tmp_path / "frozen", gpt2)[0]
    assert loaded.frozen and torch.equal(loaded.basis(), frozen.basis()) and not loaded.frame.matrix.requires_grad
    with pytest.raises(ValueError, match=r"the basis has shape \[32, 3\], expected \[32, 2\]"):
        rl.DAS(d, 2, basis=basis)
    with pytest.raises(ValueError, match="the basis is not orthonormal"):
        rl.DAS(d, basis=2 * basis)


def test_an_interchange_is_saved_and_has_a_strength_per_direction(gpt2, tmp_path):
    import reftlens as rl

    base, source = _data()
    data, d = base.with_sources(source), gpt2.cfg.d_model
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.Interchange(d)})
    rl.save(reft, tmp_path / "swap", gpt2)
    loaded = rl.load(tmp_path / "swap", gpt2)
    half = rl.evaluate(loaded, gpt2, data, [rl.Variant([1.0] * (d // 2) + [0.0] * (d - d // 2))], progress=False)
    first = rl.ReFT({rl.resid_post(0, "last"): rl.DAS(d, basis=torch.eye(d, d // 2))})
    expected = rl.evaluate(first, gpt2, data, [1], progress=False)
    torch.testing.assert_close(half.loss, expected.loss, atol=1e-5, rtol=0)


def test_what_needs_a_source_and_gets_none_is_refused(gpt2):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(0, "last"): _das(gpt2.cfg.d_model)})
    prompts = rl.encode_prompts(gpt2, ["one two"])
    with pytest.raises(ValueError, match="no such source"), reft.on(gpt2, prompts):
        pass
    with pytest.raises(ValueError, match="generation has none to copy from"):
        rl.generate(reft, gpt2, ["one two"], rl.Decoding(max_new_tokens=1), progress=False)


def test_a_source_may_be_intervened_on_itself(gpt2):
    """Nested: the source of a row is another row, in which a variable was exchanged before it was read."""
    import reftlens as rl

    base, source = _data()
    inner = source[[2, 0, 1]]
    site, later = rl.resid_post(0, "last"), rl.resid_post(2, "last")
    nested = source.with_sources({"first": inner})
    reft = rl.ReFT(
        {site: _das(gpt2.cfg.d_model, variables={"first": 3}), later: _das(gpt2.cfg.d_model, variables={"second": 4})}
    )
    nobody = (source, torch.tensor([-1, -1, -1]))
    losses = rl.evaluate(reft, gpt2, base.with_sources({"first": nobody, "second": nested}), progress=False).loss[1]
    plain = rl.evaluate(reft, gpt2, base.with_sources({"first": nobody, "second": source}), progress=False).loss[1]
    assert (losses - plain).abs().max() > 1e-4, "the inner exchange reaches the row"
    full = rl.evaluate(
        reft, gpt2, base.with_sources({"first": nobody, "second": nested}), reuse=False, progress=False
    ).loss[1]
    torch.testing.assert_close(losses, full, atol=1e-5, rtol=0)
    read = _after_block_2(gpt2, source, source.with_sources({"first": inner}), rl.ReFT({site: reft[0]}))
    expected = reft[1](_after_block_2(gpt2, base), source=read[:, None])
    data = base.with_sources({"first": nobody, "second": nested})
    torch.testing.assert_close(_after_block_2(gpt2, base, data, reft), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def _after_block_2(model, batch, data=None, reft=None):
    """Hidden states of the last prompt tokens, read by a hook of torch, so after every edit."""
    seen = []
    handle = model.blocks[2].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if type(out) is tuple else out)
    )
    with reft.on(model, data) if reft is not None else nullcontext():
        model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
    handle.remove()
    return seen[-1][torch.arange(len(batch)), batch.prompt_mask.sum(dim=1) - 1]


def _opened(openings, seed=0):
    """Rows that begin with the given tokens and go on at random, and sources that begin with a 0 and a 1."""
    from reftlens.text.batch import batch_from_rows

    g = torch.Generator().manual_seed(seed)

    def rows(starts):
        ids = [[*start, *torch.randint(10, 60, (5,), generator=g).tolist()] for start in starts]
        return batch_from_rows(ids, [[1] * 5 + [2] * 2 for _ in ids])

    return rows(openings).with_sources(rows([(0, 1)] * len(openings)))


@pytest.mark.parametrize("place", [0, 1])
def test_an_exchange_of_equal_text_is_refused_where_it_is_to_be_trained(gpt2, place):
    import reftlens as rl

    das = rl.ReFT({rl.resid_post(1, rl.positions.Nth(place)): _das(gpt2.cfg.d_model)})
    same = _opened([(0, 1)] * 3)
    before = [p.clone() for p in das.parameters()]
    with pytest.raises(ValueError, match=r"chooses is that of its source.* choose tokens at or after the first that"):
        rl.fit(das, gpt2, same, steps=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, das.parameters(), strict=True))
    loss = rl.evaluate(das, gpt2, same, progress=False).loss
    # measured, it does nothing; sources are read in passes of other shapes, which round differently
    torch.testing.assert_close(loss[0], loss[1])


@pytest.mark.parametrize(
    ("openings", "place"), [([(0, 1)] * 3, 2), ([(0, 1), (0, 1), (0, 2)], 1), ([(0, 1), (3, 1)], 1)]
)
def test_one_token_that_differs_is_enough_to_train_an_exchange(gpt2, openings, place):
    import reftlens as rl

    das = rl.ReFT({rl.resid_post(1, rl.positions.Nth(place)): _das(gpt2.cfg.d_model)})
    before = [p.clone() for p in das.parameters()]
    rl.fit(das, gpt2, _opened(openings), steps=1, lr=1e-1, progress=False)
    assert not all(torch.equal(a, b) for a, b in zip(before, das.parameters(), strict=True))
