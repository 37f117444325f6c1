"""The light cone against the full computation: equal loss, logits and gradients wherever reuse is claimed.

Ladder: `torch.equal` where the shapes of every product are the same; float64 where the model truly computes in it;
float32 with a tolerance for sums in another order.
"""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from test_sites import FAST, LEARNING, site, width
from torch.nn import functional as F

from architectures import ARCHITECTURES, bridge, fresh_bridge

ROUNDING, DOUBLE = 1e-5, 1e-10
TEXTS = [
    ("the cat sat on the mat and", " looked at the moon"),
    ("a dog", " ran by the green hill while a dog"),
    ("the moon over the green hill while a cat looked at the mat and the dog ran by", " the"),
    ("the", " cat ran"),
]
PARTS = {
    "depth": dict(tokens=False, scored_only=False, buckets=1, plain=False),
    "tokens": dict(depth=False, scored_only=False, buckets=1, plain=False),
    "scored only": dict(depth=False, tokens=False, buckets=1, plain=False),
    "buckets": dict(depth=False, scored_only=False, plain=False),
    "plain": dict(depth=False, tokens=False, scored_only=False, buckets=1),
    "everything": {},
}


@cache
def texts(architecture):
    import reftlens as rl

    return rl.encode(bridge(architecture), [rl.Example(p, c) for p, c in TEXTS])


def scored(model, reft, data, reuse, rows=(2, 0, 3, 1), variant=None):
    """`[loss, logits, gradients…]`, and what the scorer says of itself."""
    from reftlens.cone.plans import Job, Plan
    from reftlens.cone.scorer import Scorer
    from reftlens.editing.variant import Variant

    scorer = Scorer(model, data, [Plan(reft, variant or Variant())], reuse)
    results = []
    for ((one,),) in [list(scorer.score([Job(0, rows)]))]:
        loss = F.cross_entropy(one.logits, one.batch.target_ids)
        grads = torch.autograd.grad(loss, list(reft.parameters()), allow_unused=True)
        results = [loss.detach(), one.logits.detach(), *(g for g in grads if g is not None)]
    return results, scorer.computation


def worst(found, expected):
    """The largest relative error; a gradient that is zero in theory (a bias of keys) is measured by the others."""
    from reftlens.cone.probe import relative_error

    largest = max(g.abs().max().item() for g in expected[2:])
    floors = [0.0, 0.0] + [1e-3 * largest] * (len(expected) - 2)
    assert len(found) == len(expected)
    return max(relative_error(a, b, floor) for a, b, floor in zip(found, expected, floors, strict=True))


def one_site(architecture, kind, positions="last", dtype=torch.float32):
    import reftlens as rl

    return rl.ReFT({site(kind, positions): rl.LoReFT(width(architecture, kind), rank=3)}).to(dtype)


def off(**parts):
    import reftlens as rl

    return rl.training.Reuse(verify=False, remember=False, **parts)


# -- the laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["resid_post", "k head 1"])
def test_the_cone_equals_the_full_computation_up_to_rounding(architecture, kind):
    """In the precision of use; in float64 the same is shown below at every kind of site."""
    model, reft = bridge(architecture), one_site(architecture, kind)
    expected, _ = scored(model, reft, texts(architecture), None)
    found, said = scored(model, reft, texts(architecture), off())
    assert said.startswith("light cone") and worst(found, expected) < ROUNDING


@pytest.mark.parametrize("architecture, kind", LEARNING)
def test_depth_alone_is_equal_bit_for_bit(architecture, kind):
    model, reft = bridge(architecture), one_site(architecture, kind, "f1+l1")
    expected, _ = scored(model, reft, texts(architecture), None)
    found, _ = scored(model, reft, texts(architecture), off(**PARTS["depth"]))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture, kind", LEARNING)
def test_the_difference_vanishes_in_float64_at_every_kind_of_site(architecture, kind, doubles):
    model, reft = bridge(architecture, torch.float64), one_site(architecture, kind, dtype=torch.float64)
    expected, _ = scored(model, reft, texts(architecture), None)
    found, said = scored(model, reft, texts(architecture), off())
    assert found[1].dtype == torch.float64 and said.startswith("light cone")
    assert worst(found, expected) < DOUBLE


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_part_alone_and_all_together(architecture, part):
    import reftlens as rl

    model = bridge(architecture)
    sites = {rl.resid_post(0, "l2"): rl.LoReFT(32, 2), rl.attn_out(2, "f1+l1"): rl.DiReFT(32, 2)}
    expected, _ = scored(model, rl.ReFT(sites), texts(architecture), None)
    found, _ = scored(model, rl.ReFT(sites), texts(architecture), off(**PARTS[part]))
    assert worst(found, expected) < ROUNDING


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_of_one_in_a_billion_in_the_stored_keys_is_seen(architecture, doubles, monkeypatch):
    from reftlens.cone import light_cone

    model, reft = bridge(architecture, torch.float64), one_site(architecture, "resid_pre", dtype=torch.float64)
    exact, _ = scored(model, reft, texts(architecture), off())
    assemble = light_cone.assemble

    def noisy(*arguments):
        stream, mask, layers = assemble(*arguments)
        for layer in layers:
            keys = layer.stored.keys
            layer.stored = layer.stored._replace(keys=keys + 1e-9 * torch.randn_like(keys))
        return stream, mask, layers

    monkeypatch.setattr(light_cone, "assemble", noisy)
    found, _ = scored(model, reft, texts(architecture), off())
    assert 1e-13 < worst(found, exact) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["f2+l2", "all", "response", "skipping"])
def test_positions_of_every_reach(architecture, positions):
    import reftlens as rl

    where = {"response": rl.positions.Response(), "skipping": rl.positions.Nth(5, missing="skip")}.get(
        positions, positions
    )
    model = bridge(architecture)
    reft = rl.ReFT({rl.resid_post(layer, where): rl.LoReFT(32, 2) for layer in (0, 2)})
    expected, _ = scored(model, reft, texts(architecture), None)
    found, _ = scored(model, reft, texts(architecture), off())
    assert worst(found, expected) < ROUNDING


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_prompts_far_longer_than_a_sliding_window(architecture):
    import reftlens as rl

    model = bridge(architecture)
    long = " ".join(p for p, _ in TEXTS * 2)
    rows = [(long, " the cat"), (long + " and a dog", " ran"), ("a", " cat")]
    data = rl.encode(model, [rl.Example(p, c) for p, c in rows])
    assert data.prompt_mask.sum(dim=1).max() > 2 * model.original_model.config.sliding_window
    for positions in ("last", "l20", "f1"):
        reft = rl.ReFT({rl.resid_pre(1, positions): rl.LoReFT(32, 2)})
        expected, _ = scored(model, reft, data, None, rows=(0, 1, 2))
        found, _ = scored(model, reft, data, off(), rows=(0, 1, 2))
        assert worst(found, expected) < ROUNDING


@pytest.mark.parametrize(
    "architecture", [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
@pytest.mark.parametrize("where", ["below", "last block", "every block", "before all"])
def test_the_last_block_runs_at_scored_tokens_only(architecture, where, monkeypatch):
    import reftlens as rl
    from reftlens.cone import light_cone

    ran = []
    trimmed = light_cone.Trimmed
    monkeypatch.setattr(light_cone, "Trimmed", lambda *a: ran.append(1) or trimmed(*a))
    model = bridge(architecture)
    data = rl.encode(model, [rl.Example(p + " while", c) for p, c in TEXTS if len(p) > 20], end=False)
    hooks = {
        "below": [rl.resid_post(1, "f2+l2")],
        "last block": [rl.resid_post(2, "f2+l2"), rl.resid_pre(1, "f1")],
        "every block": [rl.resid_post(i, "f2+l2") for i in range(3)],
        "before all": [rl.embeddings("f1")],
    }[where]
    reft = rl.ReFT({s: rl.LoReFT(32, 2) for s in hooks})
    for rows in ((0,), (0, 1)):
        expected, _ = scored(model, reft, data, None, rows=rows)
        for reuse in (off(), off(plain=False, buckets=1)):
            found, _ = scored(model, reft, data, reuse, rows=rows)
            assert worst(found, expected) < ROUNDING
    assert ran


# -- when it is not valid, and when it is stale --------------------------------------------------------------------


def test_hooks_of_the_user_mean_full_computation(gpt2):
    reft = one_site("gpt2", "resid_post")
    seen = []
    handle = gpt2.blocks[0].hook_out.add_hook(lambda h, hook: seen.append(h.shape) and None)
    try:
        _, said = scored(gpt2, reft, texts("gpt2"), off())
    finally:
        gpt2.reset_hooks()
    assert said.startswith("full computation: another hook is active at blocks.0.hook_out") and seen
    handle = gpt2.original_model.transformer.h[1].ln_1.register_forward_hook(lambda *_: seen.append("torch"))
    try:
        _, said = scored(gpt2, reft, texts("gpt2"), off())
    finally:
        handle.remove()
    assert said.startswith("full computation: another hook is active at transformer.h.1.")
    assert said.endswith("ln_1") and seen[-1] == "torch"
    assert scored(gpt2, reft, texts("gpt2"), off())[1].startswith("light cone")


def test_a_hook_added_in_mid_training_is_never_missed(gpt2):
    import reftlens as rl

    seen = []

    def on_step(step):
        if step.step == 2:
            gpt2.blocks[0].hook_out.add_hook(lambda h, hook: seen.append(tuple(h.shape)) and None)

    try:
        run = rl.fit(one_site("gpt2", "resid_post"), gpt2, texts("gpt2"), steps=4, on_step=on_step, progress=False)
    finally:
        gpt2.reset_hooks()
    assert len(seen) == 2 and "another hook" in run.computation


def test_behind_layers_of_another_kind_nothing_goes_on_from_stored_keys(monkeypatch):
    import reftlens as rl
    from reftlens.cone.body import Body

    model = fresh_bridge("gemma3")
    assert Body(model).stateful == "" == Body(model).obstacle()
    monkeypatch.setattr(model.original_model.config, "layer_types", ["linear_attention", "full_attention"])
    assert "linear_attention" in Body(model).stateful and Body(model).obstacle() == ""
    assert rl.training.Reuse.of(False) is None


def test_where_the_check_fails_everything_is_computed_and_said_so(monkeypatch):
    import reftlens as rl
    from reftlens.cone import light_cone

    gpt2 = fresh_bridge("gpt2")
    torch.manual_seed(3)
    expected = one_site("gpt2", "resid_post")
    found = expected.clone()
    rl.fit(expected, gpt2, texts("gpt2"), steps=3, reuse=False, progress=False)
    assemble = light_cone.assemble

    def wrong(*arguments):
        stream, mask, layers = assemble(*arguments)
        return stream + 0.5, mask, layers

    monkeypatch.setattr(light_cone, "assemble", wrong)
    with pytest.warns(UserWarning, match="the frozen computation is not reused: on short rows"):
        run = rl.fit(found, gpt2, texts("gpt2"), steps=3, progress=False)
    assert "differ from the full computation" in run.computation
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_change_of_the_models_weights_is_never_missed():
    from reftlens.cone.plans import Job, Plan
    from reftlens.cone.scorer import Scorer

    model, reft, data = fresh_bridge("llama"), one_site("llama", "resid_post"), texts("llama")
    scorer = Scorer(model, data, [Plan(reft)], off())

    def logits():
        ((one,),) = scorer.score([Job(0, (0, 1))])
        return one.logits.detach()

    before = logits()
    with torch.no_grad():
        model.original_model.model.layers[0].input_layernorm.weight.mul_(1.5)
    after = logits()
    fresh, _ = scored(model, reft, data, None, rows=(0, 1))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, fresh[1], atol=2e-5, rtol=0)  # float32, sums in another order


def test_the_model_is_as_it_was(any_model):
    from reftlens.bridge import foreign
    from reftlens.cone.body import Body

    reft = one_site("gpt2", "resid_post")
    data = texts("gpt2")
    modules = [(name, id(module)) for name, module in any_model.original_model.named_modules()]
    attention = any_model.original_model.config._attn_implementation
    scored(any_model, reft, data, off())
    body = Body(any_model)
    with pytest.raises(KeyboardInterrupt), body.arranged(plain=True, used=frozenset()):
        assert [id(m) for _, m in any_model.original_model.named_modules()] != [i for _, i in modules]
        raise KeyboardInterrupt
    assert [(name, id(module)) for name, module in any_model.original_model.named_modules()] == modules
    assert any_model.original_model.config._attn_implementation == attention
    assert not foreign.foreign_hook(foreign.hook_points(any_model), foreign.modules(any_model))


# -- where it is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory, disk, where", [(None, None, "on the device"), (0, None, "on disk"), (0, 0, "recomputed")]
)
def test_over_budget_the_numbers_are_the_same(gpt2, memory, disk, where, tmp_path, monkeypatch):
    import tempfile

    import reftlens as rl

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(5)
    reft = one_site("gpt2", "resid_post")
    expected = reft.clone()
    settings = dict(steps=4, batch_size=2, progress=False)
    rl.fit(expected, gpt2, texts("gpt2"), reuse=rl.training.Reuse(), **settings)
    run = rl.fit(reft, gpt2, texts("gpt2"), reuse=rl.training.Reuse(memory=memory, disk=disk), **settings)
    assert where in run.computation
    assert not list(tmp_path.iterdir()), "the file has no name by now: nothing that a later run could trust"
    for a, b in zip(reft.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # recomputed in batches of other sizes


@pytest.mark.slow
def test_a_kill_during_capture_leaves_nothing(tmp_path):
    """The file that is captured into has lost its name before the first number is in it."""
    script = (
        "import sys, time, torch\n"
        "from reftlens.cone.store import Shelf\n"
        "shelf = Shelf('on disk', torch.device('cpu'), 1 << 20)\n"
        "stored = shelf.room(torch.empty(1000)).fill_(1.0)\n"
        "print(stored.sum().item(), flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline().strip() == "1000.0"
    assert not list(tmp_path.glob("reftlens-*"))
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("reftlens-*"))


@pytest.mark.slow
def test_the_cone_equals_the_full_computation_on_the_default_model(smol):
    import reftlens as rl

    data = rl.encode(smol, [rl.Example("The cat sat on the", " mat."), rl.Example("Why?", " Because it can be done.")])
    for hook in (
        rl.resid_post(8, "last"),
        rl.attn_z(20, "l2", heads=3),
        rl.mlp_out(28, "f1+l1"),
        rl.final_norm("last"),
    ):
        d = {"attn": 64}.get(hook.hook.split(".")[2] if hook.hook.count(".") > 2 else "", smol.cfg.d_model)
        errors = []
        for seed in range(3):  # of one draw, rounding alone reaches 1.4e-5 on some processors
            reft = rl.ReFT({hook: rl.LoReFT(d, 4, generator=torch.Generator().manual_seed(seed))})
            expected, _ = scored(smol, reft, data, None, rows=(0, 1))
            found, said = scored(smol, reft, data, off(), rows=(0, 1))
            assert said.startswith("light cone")
            errors.append(worst(found, expected))
        assert sorted(errors)[1] < ROUNDING and max(errors) < 3 * ROUNDING, errors
        exact, _ = scored(smol, reft, data, off(**PARTS["depth"]), rows=(0, 1))
        assert all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True))


def test_half_precision_storage_is_smaller_and_close(gpt2):
    reft = one_site("gpt2", "resid_post")
    exact, whole = scored(gpt2, reft, texts("gpt2"), off())
    found, half = scored(gpt2, reft, texts("gpt2"), off(half=True))
    assert 1e-4 < worst(found, exact) < 0.1
    size = [float(said.split("(")[1].split(" ")[0]) for said in (whole, half)]
    assert size[1] <= size[0]


def test_one_epoch_keeps_nothing(gpt2):
    import reftlens as rl

    run = rl.fit(one_site("gpt2", "resid_post"), gpt2, texts("gpt2"), epochs=1, batch_size=2, progress=False)
    assert "recomputed" in run.computation


# -- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_runs_that_train_together_equal_runs_of_their_own(architecture):
    import reftlens as rl

    model, data = bridge(architecture, torch.float64), texts(architecture)

    def made(seed, rank, kind):
        generator = torch.Generator().manual_seed(seed)
        return rl.ReFT({rl.resid_post(1, "last"): kind(32, rank, generator=generator).double()})

    table = [(seed, rank, kind) for seed in (0, 1) for rank in (1, 3) for kind in (rl.LoReFT, rl.interventions.NoReFT)]
    config = rl.FitConfig(steps=5, lr=0.02, batch_size=2)
    configs = {str(row): config.replace({"seed": row[0]}) for row in table}
    together = {str(row): made(*row) for row in table}
    results = rl.training.fit_many(together, model, data, configs, progress=False)
    for row in table:
        alone = made(*row)
        run = rl.fit(alone, model, data, config, seed=row[0], progress=False)
        assert run.losses == pytest.approx(results[str(row)].losses, abs=1e-12)
        for a, b in zip(together[str(row)].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_training_together_refuses_what_it_cannot_do(gpt2):
    import reftlens as rl

    pair = {name: one_site("gpt2", "resid_post") for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"interventions \['a', 'b'\] and configs \['a'\]"):
        rl.training.fit_many(pair, gpt2, texts("gpt2"), {"a": rl.FitConfig()}, progress=False)
    with pytest.raises(ValueError, match="one precision"):
        configs = {"a": rl.FitConfig(), "b": rl.FitConfig(precision="bfloat16")}
        rl.training.fit_many(pair, gpt2, texts("gpt2"), configs, progress=False)
    with pytest.raises(ValueError, match="have seeds of their own"):
        rl.training.fit_many(pair["a"].seeds([1, 2]), gpt2, texts("gpt2"), seed=3, progress=False)
    with pytest.raises(TypeError, match="argument and no setting; settings: epochs, steps, lr"):
        rl.training.fit_many(pair, gpt2, texts("gpt2"), epoch=3, progress=False)


def test_interventions_with_dropout_train_as_they_would_alone(gpt2):
    import reftlens as rl

    random = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2, dropout=0.5)})
    copies, config = random.seeds([3, 4]), rl.FitConfig(steps=3, batch_size=2)
    results = rl.training.fit_many(copies, gpt2, texts("gpt2"), config, progress=False)
    for seed in (3, 4):
        alone = random.clone()
        alone.reset(seed)
        run = rl.fit(alone, gpt2, texts("gpt2"), config, seed=seed, progress=False)
        assert run.losses == results[f"seed {seed}"].losses
        for a, b in zip(copies[f"seed {seed}"].parameters(), alone.parameters(), strict=True):
            assert torch.equal(a, b)


def test_many_variants_are_evaluated_as_each_alone(any_model):
    import reftlens as rl

    reft, data = one_site("gpt2", "resid_post", "l2"), texts("gpt2")
    variants = [0.0, 1.0, rl.Variant(2.0, among="last"), rl.Variant((1.0, 0.0, -1.0))]
    found = rl.evaluate(reft, any_model, data, variants, progress=False)
    assert found.computation.startswith("light cone")
    for i, variant in enumerate(found.variants):
        alone = rl.evaluate(reft, any_model, data, [variant], reuse=False, progress=False)
        torch.testing.assert_close(found.loss[i], alone.loss[0], atol=2e-5, rtol=0)  # float32, sums in another order
        torch.testing.assert_close(found.accuracy[i], alone.accuracy[0])
    frame = found.to_frame()
    assert len(frame) == 4 * len(data) and set(frame.columns) >= {"strength", "example", "loss", "accuracy"}
    assert found.plot().get_xlabel() == "variant"
    assert rl.evaluate(reft, any_model, data, [0, 0.5, 1], progress=False).plot().get_xlabel() == "strength"
    with pytest.raises(ValueError, match="no variants"):
        rl.evaluate(reft, any_model, data, [], progress=False)


def test_training_with_reuse_is_training_without_it():
    import reftlens as rl

    model, data = bridge("neox", torch.float64), texts("neox")
    torch.manual_seed(2)
    first = one_site("neox", "mlp_out", "l2", torch.float64)
    second = first.clone()
    settings = dict(steps=12, lr=0.02, batch_size=2, progress=False)
    a = rl.fit(first, model, data, **settings)
    b = rl.fit(second, model, data, reuse=False, **settings)
    assert a.losses == pytest.approx(b.losses, abs=1e-9)
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-8, rtol=0)
    assert a.computation.startswith("light cone") and b.computation == "full computation: reuse is switched off"


# -- found by a critical reader --------------------------------------------------------------------------------------


def test_runs_at_one_hook_that_differ_in_the_skip_connection_stay_apart():
    import reftlens as rl

    model, data = bridge("gpt2", torch.float64), texts("gpt2")

    def made():
        torch.manual_seed(0)
        return [
            rl.ReFT({hook: rl.LoReFT(32, 2).double()})
            for hook in (rl.resid_mid(1, "last"), rl.Site("blocks.1.ln2.hook_in", "last"))
        ]

    together, alone = made(), made()
    rl.training.fit_many(dict(zip("ab", together, strict=True)), model, data, steps=3, lr=0.02, progress=False)
    for one, other in zip(together, alone, strict=True):
        rl.fit(other, model, data, steps=3, lr=0.02, progress=False)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_a_site_after_the_last_target_changes_nothing(gpt2):
    import reftlens as rl

    data = rl.encode(gpt2, [rl.Example("the cat sat on the", " mat")], end=False)
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(32, 2), rl.resid_post(1, "response"): rl.LoReFT(32, 2)})
    before = reft[1].W.clone()
    run = rl.fit(reft, gpt2, data, steps=2, progress=False)
    assert run.computation.startswith("light cone") and torch.equal(reft[1].W, before)


def test_a_torch_hook_on_a_hook_point_is_seen(gpt2):
    import reftlens as rl

    seen = []
    handle = gpt2.hook_dict["blocks.0.hook_out"].register_forward_hook(lambda *_: seen.append(1) and None)
    try:
        rl.generate(None, gpt2, ["the cat"], rl.Decoding(max_new_tokens=3))
        _, said = scored(gpt2, one_site("gpt2", "resid_post"), texts("gpt2"), off())
    finally:
        handle.remove()
    assert len(seen) == 4 and said.startswith("full computation")


def test_interventions_that_share_parameters_do_not_train_together(gpt2):
    import reftlens as rl

    reft = one_site("gpt2", "resid_post")
    with pytest.raises(ValueError, match="share parameters"):
        rl.training.fit_many({"a": reft, "b": reft}, gpt2, texts("gpt2"), progress=False)


def test_numbers_of_any_library_are_strengths_and_bad_sizes_are_refused(gpt2):
    import reftlens as rl

    reft = one_site("gpt2", "resid_post")
    found = rl.evaluate(reft, gpt2, texts("gpt2"), list(torch.linspace(0, 1, 3)), progress=False)
    assert [v.strength for v in found.variants] == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="batch_size=-1"):
        rl.evaluate(reft, gpt2, texts("gpt2"), [1.0], batch_size=-1, progress=False)
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        rl.fit(reft, gpt2, texts("gpt2"), steps=1, checkpoint_every=0, progress=False)
