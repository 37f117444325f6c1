"""What is wrong only in some ways of computing is caught before it is used, whatever the first batch was."""

import warnings
from dataclasses import replace

import pytest
import torch

from architectures import ARCHITECTURES, D, bridge, fresh_bridge

ROWS = [
    ("the cat sat on the mat and the dog ran over the green hill", " the moon"),
    ("a bird", " in the tree and over the river, far away from the house"),
    ("the dog ran", " on"),
    ("over the hill the moon", " was green and the cat sat there"),
]


def reft(broken: object = None):
    """Where what is broken is used: positions are read at the embedding, the last block is trimmed in long cones."""
    import reftlens as rl

    sites: dict[object, rl.Site] = {wrong_positions: rl.embeddings("last"), early_ends: rl.resid_post(1, "first")}
    site = sites.get(broken, rl.resid_post(1, "last"))
    return rl.ReFT({site: rl.LoReFT(D, rank=2)})


def data(model, rows=ROWS):
    import reftlens as rl

    return rl.encode(model, [rl.Example(*row) for row in rows])


def scorer_of(model, module, rows=ROWS, reuse=None):
    import reftlens as rl
    from reftlens.cone.plans import Plan
    from reftlens.cone.scorer import Scorer

    return Scorer(model, data(model, rows), [Plan(module)], rl.training.Reuse.of(True if reuse is None else reuse))


def logits(scorer, rows):
    from reftlens.cone.plans import Job

    return torch.cat([scored.logits.detach() for group in scorer.score([Job(0, rows)]) for scored in group])


def shifted_mask(monkeypatch):
    """Stored keys: one too many is masked."""
    from reftlens.cone import light_cone

    assemble = light_cone.assemble

    def wrong(*arguments):
        stream, mask, layers = assemble(*arguments)
        mask = mask.clone()
        mask[:, :1] = False
        return stream, mask, layers

    monkeypatch.setattr(light_cone, "assemble", wrong)


def stale_prefix(monkeypatch):
    """Stored keys are those of the tokens before."""
    from reftlens.cone.captured import Captured

    part = Captured.part

    def wrong(self, *arguments):
        whole = part(self, *arguments)
        return replace(whole, pool=replace(whole.pool, keys=tuple(k.roll(1, dims=0) for k in whole.pool.keys)))

    monkeypatch.setattr(Captured, "part", wrong)


def wrong_positions(monkeypatch):
    """Position ids begin one too late."""
    from reftlens.cone import light_cone

    forward = light_cone.forward_inside
    monkeypatch.setattr(
        light_cone,
        "forward_inside",
        lambda model, tokens, mask, places, cache=None: forward(model, tokens, mask, places + 1, cache),
    )


def early_ends(monkeypatch):
    """The trimmed last block takes a wrong token, in rows that have fewer targets than others."""
    from reftlens.cone import trim

    columns = trim._columns

    def wrong(*arguments):
        which, places = columns(*arguments)
        short = places[0].bincount(minlength=len(which)) < which.shape[1]
        return torch.where(short[:, None], (which - 1).clamp(min=0), which), places

    monkeypatch.setattr(trim, "_columns", wrong)


def half_called_exact(monkeypatch):
    """What was captured is rounded to bfloat16, and nobody says so."""
    from reftlens.cone.capture import Capture

    kept = Capture._kept

    def wrong(self, *captured):
        pool = kept(self, *captured)
        return pool.rebuilt([t.bfloat16().to(t.dtype) for t in pool.tensors()])

    monkeypatch.setattr(Capture, "_kept", wrong)


BROKEN = [shifted_mask, stale_prefix, wrong_positions, early_ends, half_called_exact]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_what_is_broken_is_caught_before_it_is_used(architecture, broken, monkeypatch):
    """A first batch of one row, then mixed ones: what follows is the full computation, to the last bit."""
    model, module = fresh_bridge(architecture), reft(broken)
    full = scorer_of(model, module, reuse=False)
    broken(monkeypatch)
    scorer = scorer_of(model, module)
    with pytest.warns(UserWarning, match="is not reused: .* differ"):
        results = [logits(scorer, rows) for rows in ((2,), (0, 1, 2, 3))]
    assert not scorer.reuses and "differ" in scorer.computation
    assert torch.equal(results[1], logits(full, (0, 1, 2, 3)))


def test_what_is_right_is_not_suspected(any_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = scorer_of(any_model, reft())
        for rows in ((2,), (0, 1, 2, 3)):
            logits(scorer, rows)
    assert scorer.reuses


@pytest.mark.parametrize("kind", ["Interchange", "DAS", "SteeringVector", "Ablation"])
def test_every_kind_is_probed_with_sources_of_its_own(kind):
    import reftlens as rl

    model, settings = bridge("llama"), {"rank": 2} if kind in ("DAS", "Ablation") else {}
    module = rl.ReFT({rl.resid_post(1, "last"): getattr(rl, kind)(D, **settings)})
    batch = data(model)
    if any(m.variables for _, m in module.items()):
        batch = batch.resampled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.evaluate(module, model, batch, progress=False).computation.startswith("light cone")


def test_nothing_is_compared_where_nobody_asks(monkeypatch):
    import reftlens as rl
    from reftlens.cone import probe

    monkeypatch.setattr(probe.Probe, "check", lambda *arguments: pytest.fail("compared"))
    logits(scorer_of(fresh_bridge("gpt2"), reft(), reuse=rl.training.Reuse(verify=False)), (0, 1))


# -- generation --------------------------------------------------------------------------------------------------

PROMPTS = ["the cat sat on the mat and the", "a dog", "the moon over"]


def written(model, module, **settings):
    import reftlens as rl

    return rl.generate(module, model, PROMPTS, rl.Decoding(max_new_tokens=5, **settings))


def everywhere():
    import reftlens as rl

    module = rl.ReFT({rl.resid_post(0, "all"): rl.SteeringVector(D), rl.resid_post(1, "last"): rl.SteeringVector(D)})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize(
    ("architecture", "beams"),
    [
        pytest.param(a, beams, marks=pytest.mark.slow if beams > 1 and a not in ("gpt2", "gemma3") else ())
        for a in ARCHITECTURES
        for beams in (1, 3)
    ],
)
def test_texts_written_in_full_are_those_written_from_the_cache(architecture, beams, monkeypatch):
    from reftlens.generation import writing

    model = bridge(architecture)
    expected = written(model, everywhere(), beams=beams)

    def in_full(session):
        session.in_full = True
        return session

    monkeypatch.setattr(writing, "checked", in_full)
    result = written(model, everywhere(), beams=beams)
    assert result.ids == expected.ids and result.edited == expected.edited


def late_positions(monkeypatch):
    """What is written stands one place too far."""
    from reftlens.generation import runner

    forward = runner.forward_inside

    def wrong(model, tokens, mask, places, cache=None):
        return forward(model, tokens, mask, places + (tokens.shape[1] == 1), cache)

    monkeypatch.setattr(runner, "forward_inside", wrong)


def forgotten_cache(monkeypatch):
    """The newest token is computed as if it were the first."""
    from dataclasses import replace

    from reftlens.generation import runner

    run = runner._run

    def wrong(body, rows, new, cache, places, used):
        if new == 1:
            cache = runner.cache_of([runner.DynamicLayer() for _ in body.blocks])
            newest = {name: getattr(rows, name)[:, -1:] for name in ("tokens", "role", "edited")}
            rows = replace(rows, **newest)
        return run(body, rows, new, cache, places, used)

    monkeypatch.setattr(runner, "_run", wrong)


def beams_that_stay(monkeypatch):
    """The cache does not follow the rows when they change places."""
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: None)


@pytest.mark.parametrize("broken", [late_positions, forgotten_cache, beams_that_stay])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_broken_cache_is_caught_before_anything_is_written(architecture, broken, monkeypatch):
    model, settings = fresh_bridge(architecture), {"beams": 3} if broken is beams_that_stay else {}
    expected = written(bridge(architecture), everywhere(), **settings)
    broken(monkeypatch)
    with pytest.warns(UserWarning, match="written in full, one row at a time.*differ"):
        assert written(model, everywhere(), **settings).ids == expected.ids


def test_a_users_hook_is_not_called_for_the_check():
    model, seen = fresh_bridge("gpt2"), []
    with model.hooks(fwd_hooks=[("blocks.0.hook_out", lambda h, hook: seen.append(h.shape))]):
        written(model, everywhere())
    assert seen[0][:2] == (3, 9) and len(seen) == 5, "the prompts, and four tokens"


def failing(model, exception):
    """An edit whose own code raises, and what computes with it."""
    import reftlens as rl

    class Failing(rl.interventions.LobiReFT):
        def forward(self, h, *args, **kwargs):
            raise exception

    reft = rl.ReFT({rl.resid_post(1, "last"): Failing(D, rank=2)})
    return [
        lambda: rl.generate(reft, model, ["the cat"], rl.Decoding(max_new_tokens=2)),
        lambda: rl.evaluate(reft, model, data(model), progress=False),
        lambda: rl.fit(reft, model, data(model), steps=1, progress=False),
    ]


@pytest.mark.parametrize("exception", [RuntimeError("a mistake of one's own"), KeyError("k"), ValueError("x\ny" * 200)])
def test_an_error_of_the_edit_itself_is_raised_and_not_remembered_of_the_model(exception):
    import reftlens as rl

    model = fresh_bridge("llama")
    for call in failing(model, exception):
        with pytest.raises(type(exception)):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        working = rl.ReFT({rl.resid_post(1, "last"): rl.interventions.LobiReFT(D, rank=2)})
        rl.generate(working, model, ["the cat"], rl.Decoding(max_new_tokens=2))
        assert rl.fit(working, model, data(model), steps=1, progress=False).computation.startswith("light cone")


def test_a_cache_that_fails_is_named_in_one_line(monkeypatch):
    from transformers import DynamicCache

    model = fresh_bridge("gpt2")
    expected = written(bridge("gpt2"), everywhere())

    def update(self, keys, values, layer, *args, **kwargs):
        raise TypeError("no cache here\n" + "and here is why " * 40)

    monkeypatch.setattr(DynamicCache, "update", update)
    with pytest.warns(UserWarning, match="stored keys and values failed: TypeError: no cache here") as seen:
        assert written(model, everywhere()).ids == expected.ids
    assert all("\n" not in str(w.message) for w in seen)


def test_a_site_that_acts_only_after_the_targets_raises_no_false_alarm():
    """The way of computing without it is compared without it."""
    import reftlens as rl

    model = fresh_bridge("llama")
    batch = rl.encode_prompts(model, ["the cat sat on the mat", "a dog ran by the moon"])
    mask = torch.zeros_like(batch.target_mask)
    mask[:, 3] = True
    sites = {rl.resid_post(0, "first"): rl.LoReFT(D, rank=2), rl.mlp_out(2, "last"): rl.LoReFT(D, rank=2)}
    reft, batch = rl.ReFT(sites), replace(batch, target_mask=mask)
    expected = rl.evaluate(reft, model, batch, reuse=False, progress=False).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = rl.evaluate(reft, model, batch, progress=False)
    assert result.computation.startswith("light cone") and torch.allclose(result.loss, expected, atol=1e-5)
