"""The one stateful moment: hooks come and go, gradients flow, and nothing of the model is ever changed."""

from functools import cache

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, D_HEAD, D, bridge, fresh_bridge, hf_model

PROMPTS = ["the cat sat on the mat and", "a dog", "the green hill over the moon ran by the dog and the cat sat on it"]


def tokens_of(batch):
    return dict(attention_mask=batch.attention_mask.long(), use_cache=False)


def run(model, batch):
    with torch.no_grad():
        return model(batch.tokens, **tokens_of(batch))


def on(reft, model, batch, **variant):
    import reftlens as rl

    with reft.on(model, batch, rl.Variant(**variant)):
        return run(model, batch)


def test_modules_and_parameters_are_torchs_own_lists(any_model):
    from reftlens.bridge.protocol import modules_of, parameters_of

    shared = nn.Linear(3, 3)
    tied = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.ModuleList([shared, nn.Linear(3, 2)])})
    tied["b"][1].bias = shared.bias
    tied["a"].register_module("none", None)
    for root in (any_model.original_model, tied, nn.ReLU()):
        assert list(map(id, modules_of(root))) == list(map(id, root.modules()))
        assert list(map(id, parameters_of(root))) == list(map(id, root.parameters()))
    assert len(parameters_of(tied)) == 3 and len(modules_of(tied)) == 6


def encoded(model):
    import reftlens as rl

    pairs = [
        ("the cat sat", " on the mat"),
        ("a dog ran by the green hill and looked", " at the moon"),
        ("the", " cat"),
    ]
    return rl.encode(model, [rl.Example(p, c) for p, c in pairs])


def left_padded(batch):
    """The same rows with the padding on the left."""
    from dataclasses import replace

    roll = [int((~keep).sum()) for keep in batch.attention_mask]
    moved = {
        k: torch.stack([row.roll(n) for row, n in zip(getattr(batch, k), roll, strict=True)])
        for k in ("tokens", "role", "target_mask")
    }
    return replace(batch, **moved)


def several_sites(seed=0):
    import reftlens as rl

    torch.manual_seed(seed)
    return rl.ReFT(
        {
            rl.embeddings("f1"): rl.LoReFT(D, rank=2),
            rl.mlp_out(0, "all"): rl.LoReFT(D, rank=2),
            rl.attn_z(1, "prompt", [0, 3]): rl.LoReFT(2 * D_HEAD, rank=2),
            rl.resid_post(1, "last"): rl.LoReFT(D, rank=2),
        }
    )


# -- padding, positions, cache -------------------------------------------------------------------------------------


def test_B9_B10_padding_on_either_side_shifts_no_position_and_no_edit(any_model):
    batch = encoded(any_model)
    other, reft = left_padded(batch), several_sites()
    assert other.attention_mask[:, -1].all() and not batch.attention_mask[:, -1].all()
    for use in (None, reft):
        right = run(any_model, batch) if use is None else on(reft, any_model, batch)
        left = run(any_model, other) if use is None else on(reft, any_model, other)
        # float32: a padded row attends over more masked keys, so sums are ordered in another way
        torch.testing.assert_close(left[other.attention_mask], right[batch.attention_mask], atol=1e-5, rtol=0)
        for i in range(len(batch)):
            alone = batch[i]
            single = run(any_model, alone) if use is None else on(reft, any_model, alone)
            torch.testing.assert_close(right[i, : single.shape[1]], single[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])  # the others compute norms and rotations in float32 always
def test_what_differs_between_paddings_is_rounding_and_vanishes_in_float64(architecture):
    model = bridge(architecture, torch.float64)
    batch, reft = encoded(model), several_sites().double()
    other = left_padded(batch)
    right, left = on(reft, model, batch)[batch.attention_mask], on(reft, model, other)[other.attention_mask]
    assert right.dtype == torch.float64
    torch.testing.assert_close(left, right, atol=1e-13, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_an_edit_equals_a_patch_of_plain_transformers_to_float64(architecture):
    import reftlens as rl

    model, plain = bridge(architecture, torch.float64), hf_model(architecture).double()
    batch, vector = encoded(model), torch.linspace(-2, 2, D, dtype=torch.float64)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.SteeringVector(D).double()})
    with torch.no_grad():
        reft[0].vector.copy_(vector)
    blocks = plain.transformer.h if architecture == "gpt2" else plain.gpt_neox.layers

    def add(block, args, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        for i in range(len(batch)):
            h[i, int(batch.prompt_mask[i].sum()) - 1] += vector
        return (h, *output[1:]) if isinstance(output, tuple) else h

    blocks[1].register_forward_hook(add)
    with torch.no_grad():
        patched = plain(input_ids=batch.tokens, **tokens_of(batch)).logits
    real = batch.attention_mask
    torch.testing.assert_close(on(reft, model, batch)[real], patched[real], atol=1e-13, rtol=0)


def test_B11_positions_are_not_remembered_from_one_batch_to_the_next(any_model):
    import reftlens as rl

    reft, fresh = several_sites(), several_sites()
    long, short = encoded(any_model), rl.encode_prompts(any_model, PROMPTS)
    first = on(reft, any_model, long)
    on(reft, any_model, short)
    assert torch.equal(on(reft, any_model, long), first)
    assert torch.equal(on(reft, any_model, short), on(fresh, any_model, short))


def test_the_cache_may_be_filled_in_pieces_of_any_size(any_model):
    from reftlens.editing.engine import forward_cached

    batch = left_padded(encoded(any_model))
    whole = run(any_model, batch)
    mask, start, cache, parts = batch.attention_mask, 0, None, []
    for size in (4, 1, 3, batch.tokens.shape[1] - 8):
        stop = start + size
        with torch.no_grad():
            logits, cache = forward_cached(any_model, batch.tokens[:, start:stop], mask[:, :stop], cache)
        parts.append(logits)
        start = stop
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], atol=1e-5, rtol=0)


# -- composition ---------------------------------------------------------------------------------------------------


def test_two_refts_may_be_on_at_once(any_model):
    import reftlens as rl

    batch = encoded(any_model)
    torch.manual_seed(1)
    first, second = rl.LoReFT(D, rank=2), rl.LoReFT(D, rank=2)
    a, b = rl.ReFT({rl.resid_post(0, "last"): first}), rl.ReFT({rl.resid_post(1, "f1"): second})
    both = rl.ReFT({rl.resid_post(0, "last"): first, rl.resid_post(1, "f1"): second})
    with a.on(any_model, batch), b.on(any_model, batch):
        together = run(any_model, batch)
    assert torch.equal(together, on(both, any_model, batch))
    assert torch.equal(run(any_model, batch), run(bridge_like(any_model), batch))


def bridge_like(model):
    return bridge(next(a for a in ARCHITECTURES if bridge(a) is model))


def test_a_lower_precision_model_stays_in_its_dtype_and_is_edited():
    import reftlens as rl

    model = fresh_bridge("llama", dtype=torch.bfloat16)
    batch, reft = encoded(model), several_sites()
    seen = []
    with reft.on(model, batch):
        model.run_with_hooks(
            batch.tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda h, hook: seen.append(h.dtype))]
        )
    assert seen == [torch.bfloat16]
    base, off = run(model, batch), on(reft, model, batch, strength=0.0)
    assert torch.equal(base, off) and not torch.equal(base, on(reft, model, batch))
    prompt, steps = rl.encode_prompts(model, PROMPTS[:1]), rl.Decoding(max_new_tokens=2)
    # bfloat16: 1/64 lies between neighbours at 2 to 4, and the roundings of three blocks add up
    for strength in (0.0, 1.0):
        variant = rl.Variant(strength)
        text = rl.generate(reft, model, PROMPTS[:1], steps, variant=variant, keep_logits=True)
        torch.testing.assert_close(
            text.logits[0][0].float(), on(reft, model, prompt, strength=strength)[0, -1].float(), atol=0.1, rtol=0
        )
    assert (on(reft, model, prompt) - run(model, prompt))[0, -1].abs().max() > 0.5, "the edit is larger than rounding"


# -- B16: hooks of others -------------------------------------------------------------------------------------------


def hook_counts(model):
    """How many hooks of each sort every module of the bridge and of the model inside it has."""
    found = {}
    for root in (model, model.original_model):
        for name, module in root.named_modules():
            found[type(root).__name__, name] = tuple(
                len(h) for h in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            )
    points = {n: ([id(h) for h in p.fwd_hooks], [id(h) for h in p.bwd_hooks]) for n, p in model.hook_dict.items()}
    return found, points


def op_on(rl, reft, model, data):
    with reft.on(model, data):
        model(data.tokens, **tokens_of(data))[data.predicting].sum().backward()


OPERATIONS = {
    "on": op_on,
    "fit": lambda rl, reft, model, data: rl.fit(reft, model, data, steps=1, progress=False),
    "evaluate": lambda rl, reft, model, data: rl.evaluate(reft, model, data, progress=False).loss.tolist(),
    "generate": lambda rl, reft, model, data: rl.generate(reft, model, PROMPTS, rl.Decoding(max_new_tokens=2)),
    "sample": lambda rl, reft, model, data: rl.generate(
        reft, model, PROMPTS, rl.Decoding(max_new_tokens=2, temperature=1.0)
    ),
    "beams": lambda rl, reft, model, data: rl.generate(reft, model, PROMPTS, rl.Decoding(max_new_tokens=2, beams=2)),
    "stream": lambda rl, reft, model, data: list(
        rl.generation.stream(reft, model, PROMPTS[0], rl.Decoding(max_new_tokens=2))
    ),
    "preflight": lambda rl, reft, model, data: rl.training.preflight(reft, model),
    "sites": lambda rl, reft, model, data: rl.hooks(model, unusable=True),
    "activations": lambda rl, reft, model, data: rl.activations(model, data, rl.resid_post(1, "all"), progress=False),
}


@cache
def watched(architecture):
    """A bridge on which a user has hooks of every sort, counted as they fire."""
    model, fired = fresh_bridge(architecture), {}

    def count(name):
        fired[name] = 0

        def hook(*args, **kwargs):
            fired[name] += 1

        return hook

    model.add_hook("blocks.1.hook_resid_post", count("same hook point"))
    model.add_perma_hook("blocks.1.hook_resid_post", count("permanent"))
    model.add_hook("blocks.0.hook_mlp_out", count("another hook point"))
    inside = model.original_model
    inside.register_forward_pre_hook(count("torch pre-hook"))
    inside.get_input_embeddings().register_forward_hook(count("torch hook"))
    inside.get_output_embeddings().register_forward_hook(count("torch hook at the end"))
    return model, fired


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("architecture", ["llama"])
def test_B16_hooks_of_the_user_fire_and_survive(architecture, operation):
    import reftlens as rl

    model, fired = watched(architecture)
    reft, data = several_sites(), encoded(model)
    run(model, data)  # the bridge adds hooks of its own in its first forward pass
    before = hook_counts(model)
    fired.update(dict.fromkeys(fired, 0))
    OPERATIONS[operation](rl, reft, model, data)
    assert hook_counts(model) == before
    assert len(set(fired.values())) == 1 and fired["permanent"] >= 1, fired
    again = fired["permanent"]
    run(model, data)
    assert all(n == again + 1 for n in fired.values())


class Stop(BaseException):
    """Not an Exception: like the KeyboardInterrupt of a user who stops a cell."""


@pytest.mark.parametrize("where", ["body", "forward", "edit"])
def test_B16_an_exception_inside_leaves_the_users_hooks_and_takes_ours_away(where):
    import reftlens as rl

    model, _ = watched("gpt2")
    reft, data = several_sites(), encoded(model)
    plain = run(model, data)
    before = hook_counts(model)

    def stop(*args, **kwargs):
        raise Stop

    if where == "edit":
        reft.interventions[1].code = stop
    handle = model.original_model.lm_head.register_forward_hook(stop) if where == "forward" else None
    with pytest.raises(Stop), reft.on(model, data):
        if where == "body":
            raise Stop
        run(model, data)
    if where != "body":
        with pytest.raises(Stop):
            rl.generate(reft, model, PROMPTS, rl.Decoding(max_new_tokens=2))
    if handle is not None:
        handle.remove()
    assert hook_counts(model) == before
    assert torch.equal(run(model, data), plain)


def test_B16_hooks_at_the_edited_hook_see_what_came_before_them():
    import reftlens as rl

    model = fresh_bridge("llama")
    batch, vector, seen = encoded(model), torch.full((D,), 7.0), {}
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.SteeringVector(D, vector)})

    def see(name):
        return lambda h, hook: seen.update({name: h.clone()})

    model.add_hook("blocks.1.hook_resid_post", see("added before"))
    with reft.on(model, batch):
        model.add_hook("blocks.1.hook_resid_post", see("added inside"))
        _, cached = model.run_with_cache(batch.tokens, names_filter="blocks.1.hook_resid_post")
    real = batch.attention_mask
    torch.testing.assert_close(seen["added inside"][real], seen["added before"][real] + 7.0)
    assert torch.equal(cached["blocks.1.hook_resid_post"], seen["added inside"])
    seen.clear()
    run(model, batch)
    assert set(seen) == {"added before", "added inside"}  # what the user added inside the block is the user's
    assert torch.equal(seen["added before"], seen["added inside"])


def test_B16_an_edit_by_a_user_hook_and_ours_add_up():
    import reftlens as rl

    model = fresh_bridge("gpt2")
    batch, vector = encoded(model), torch.linspace(-1, 1, D)
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.SteeringVector(D, vector)})
    double = on(reft, model, batch, strength=2.0)
    model.add_hook("blocks.1.hook_resid_post", lambda h, hook: h + vector)
    # padding is edited by the user's hook only, and no real token attends to it
    torch.testing.assert_close(
        on(reft, model, batch)[batch.attention_mask], double[batch.attention_mask], atol=1e-5, rtol=0
    )


def test_B16_resetting_all_hooks_inside_the_block_is_the_users_right():
    import reftlens as rl

    model = fresh_bridge("gpt2")
    batch, reft = encoded(model), several_sites()
    plain = run(model, batch)
    with pytest.raises(rl.errors.SiteNeverFired), reft.on(model, batch):
        model.reset_hooks()
        assert torch.equal(run(model, batch), plain)
    assert torch.equal(run(model, batch), plain)


# -- nothing of the model is changed -----------------------------------------------------------------------------------


def state(model):
    inside = model.original_model
    flags = {n: p.requires_grad for n, p in inside.named_parameters()}
    modes = {n: m.training for n, m in inside.named_modules()} | {
        f"bridge.{n}": m.training for n, m in model.named_modules()
    }
    weights = {n: (p.data_ptr(), p._version, p.detach().clone()) for n, p in inside.named_parameters()}
    return flags, modes, weights, str(inside.config), str(vars(model.cfg)), torch.get_rng_state(), hook_counts(model)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("architecture", ["gemma3"])
def test_nothing_of_the_model_is_changed(architecture, operation):
    import reftlens as rl

    model = odd_model(architecture)
    reft, data = several_sites(), encoded(model)
    before = state(model)
    OPERATIONS[operation](rl, reft, model, data)
    after = state(model)
    for was, now in zip(before[:2], after[:2], strict=True):
        assert was == now
    for name, (pointer, version, values) in before[2].items():
        assert after[2][name][:2] == (pointer, version), name
        assert torch.equal(after[2][name][2], values), name
    assert before[3:5] == after[3:5]
    assert torch.equal(before[5], after[5])  # the global random state
    assert before[6] == after[6]
    for name, parameter in model.original_model.named_parameters():
        if operation != "on" or not parameter.requires_grad:  # inside `on` gradients are the user's affair
            assert parameter.grad is None, name
        parameter.grad = None


@cache
def odd_model(architecture):
    """A bridge with flags and modes as no library would set them."""
    model = fresh_bridge(architecture)
    for i, parameter in enumerate(model.original_model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    for i, module in enumerate(model.original_model.modules()):
        if not isinstance(module, nn.Dropout):
            module.training = i % 2 == 0
    for key in [k for k in vars(model.original_model.config) if "drop" in k]:
        setattr(model.original_model.config, key, 0.0)
    run(model, encoded(model))  # the bridge adds hooks of its own in its first forward pass
    return model


def test_making_and_binding_a_reft_touches_nothing():
    model = odd_model("gpt2")
    before = state(model)
    several_sites().bind(model)
    after = state(model)
    assert before[:2] == after[:2] and before[6] == after[6]


# -- B15: gradient checkpointing ---------------------------------------------------------------------------------------


def without_dropout(model):
    """Train mode with every dropout of the configuration at 0, those of heads that are not there included."""
    for key in [k for k in vars(model.original_model.config) if "drop" in k]:
        setattr(model.original_model.config, key, 0.0)
    return model.train()


def checkpointed(architecture):
    model = fresh_bridge(architecture)
    model.original_model.gradient_checkpointing_enable()
    return without_dropout(model)


def gradients(reft, model, data):
    with reft.on(model, data):
        logits = model(data.tokens, **tokens_of(data))
        loss = torch.nn.functional.cross_entropy(logits[data.predicting], data.target_ids)
        return torch.autograd.grad(loss, list(reft.parameters()))


def sites_in_and_between_blocks(architecture):
    import reftlens as rl

    torch.manual_seed(2)
    places = [
        rl.embeddings("f1"),
        rl.resid_pre(0, "l2"),
        rl.attn_v(0, "all", 1),
        rl.mlp_out(1, "all"),
        rl.resid_post(1, "last"),
        rl.attn_z(2, "prompt", [0, 2]),
        rl.final_norm("all"),
    ]
    if architecture != "neox":
        places.append(rl.resid_mid(1, "all"))
    widths = {"v": D_HEAD, "z": 2 * D_HEAD}
    return rl.ReFT({p: rl.LoReFT(widths.get(p.hook[-1] if p.heads else "", D), rank=2) for p in places})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_B15_gradients_with_checkpointing_equal_those_without(architecture):
    import reftlens as rl

    reft, model = sites_in_and_between_blocks(architecture), checkpointed(architecture)
    data = encoded(model)
    passes = []
    handle = model.blocks[1].attn.register_forward_hook(lambda *args: passes.append(1))
    recomputed = gradients(reft, model, data)
    handle.remove()
    assert len(passes) == 2  # forward and recompute: the model does use checkpoints
    for a, b in zip(recomputed, gradients(reft, bridge(architecture), data), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0
    rl.training.preflight(reft, model)  # the recompute is no second firing


def test_B15_a_fit_with_checkpointing_equals_the_fit_without(llama):
    import reftlens as rl

    plain, saving = sites_in_and_between_blocks("llama"), sites_in_and_between_blocks("llama")
    data = encoded(llama)
    without = rl.fit(plain, llama, data, steps=3, reuse=False, progress=False)
    model = checkpointed("llama")
    run = rl.fit(saving, model, data, steps=3, progress=False)
    assert "gradient checkpointing" in run.computation
    assert run.losses == without.losses
    for a, b in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert model.training and model.original_model.training


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "llama"])
def test_B15_generation_in_train_mode_with_checkpointing_is_that_of_eval_mode(architecture):
    import reftlens as rl

    reft, model = several_sites(), checkpointed(architecture)
    decoding = rl.Decoding(max_new_tokens=3)
    one = rl.generate(reft, model, PROMPTS, decoding, keep_logits=True)
    other = rl.generate(reft, bridge(architecture), PROMPTS, decoding, keep_logits=True)
    assert one == other
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # without a cache: transformers drops it, sums reorder
    beams = [
        rl.generate(reft, m, PROMPTS, rl.Decoding(max_new_tokens=3, beams=2)) for m in (model, bridge(architecture))
    ]
    assert beams[0] == beams[1]


@pytest.mark.parametrize("operation", ["fit", "evaluate", "generate", "beams", "stream", "activations"])
@pytest.mark.parametrize("dropout", ["module", "config"])
def test_B15_active_dropout_of_the_model_is_refused(operation, dropout):
    import reftlens as rl

    model = fresh_bridge("gpt2" if dropout == "module" else "llama")
    if dropout == "module":
        next(m for m in model.original_model.modules() if isinstance(m, nn.Dropout)).p = 0.1
    else:
        model.original_model.config.attention_dropout = 0.1
    reft, data = several_sites(), encoded(model)
    OPERATIONS[operation](rl, reft, model, data)  # dropout does nothing in eval mode
    model.train()
    with pytest.raises(ValueError, match=r"train mode with active dropout.*call model\.eval"):
        OPERATIONS[operation](rl, reft, model, data)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_B15_train_mode_is_accepted_where_the_language_model_has_no_dropout(architecture):
    import reftlens as rl

    model = fresh_bridge(architecture).train()
    run = rl.fit(several_sites(), model, encoded(model), steps=1, progress=False)
    same = rl.evaluate(several_sites(), bridge(architecture), encoded(model), [1], progress=False)
    counts = encoded(model).target_mask.sum(dim=1)
    assert run.loss == pytest.approx((same.loss[0] @ counts.double() / counts.sum()).item(), abs=1e-5)
    assert model.training


# -- B17: dropout of the interventions ---------------------------------------------------------------------------------


def with_dropout():
    import reftlens as rl

    torch.manual_seed(3)
    return rl.ReFT(
        {
            rl.resid_post(0, "all"): rl.LoReFT(D, rank=4, dropout=0.5),
            rl.resid_post(1, "all"): rl.DiReFT(D, rank=4, dropout=0.5),
        }
    )


@pytest.mark.parametrize("operation", ["evaluate", "generate", "beams", "stream"])
def test_B17_evaluation_and_generation_are_without_dropout_and_put_the_mode_back(operation, llama):
    import reftlens as rl

    reft, data = with_dropout(), encoded(llama)
    before = [p.clone() for p in reft.parameters()]
    results = []
    for training in (True, True, False, "mixed"):
        reft.train(bool(training))
        if training == "mixed":
            reft.interventions[1].eval()
        modes = [m.training for m in reft.modules()]
        results.append(OPERATIONS[operation](rl, reft, llama, data))
        assert [m.training for m in reft.modules()] == modes
    assert all(r == results[0] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(before, reft.parameters(), strict=True))


def test_B17_dropout_acts_in_train_mode_and_only_there(llama):
    reft, data = with_dropout(), encoded(llama)
    assert not torch.equal(on(reft.train(), llama, data), on(reft, llama, data))
    assert torch.equal(on(reft.eval(), llama, data), on(reft, llama, data))
    assert torch.equal(on(reft.train(), llama, data, strength=0.0), run(llama, data))


@pytest.mark.parametrize("training", [True, False])
def test_B17_fit_trains_with_dropout_whatever_the_mode_was_and_puts_it_back(training, llama):
    import reftlens as rl

    runs = []
    for mode in (training, True):
        reft = with_dropout().train(mode)
        runs.append(rl.fit(reft, llama, encoded(llama), steps=2, validation=encoded(llama), progress=False))
        assert all(m.training == mode for m in reft.modules())
    assert runs[0].losses == runs[1].losses
    dry = rl.ReFT({s: type(m)(D, rank=4) for s, m in with_dropout().items()})
    dry.load_state_dict(with_dropout().state_dict())
    without = rl.fit(dry, llama, encoded(llama), steps=2, progress=False)
    assert without.losses[0] != runs[0].losses[0]


# -- B19: the module behaves like a module -----------------------------------------------------------------------------


def test_B19_a_reft_is_an_ordinary_module():
    reft = several_sites()
    assert reft.train() is reft and reft.eval() is reft
    assert "LoReFT" in str(reft)
    assert {n.split(".")[0] for n, _ in reft.named_parameters(prefix="mine")} == {"mine"}
    outer = nn.ModuleDict({"inner": reft})
    assert set(outer.state_dict()) == {f"inner.{n}" for n in reft.state_dict()} != set()
    assert len(list(reft.parameters())) == 12  # frame, W and b of four LoReFTs


def test_B19_sequences_given_by_the_caller_are_not_changed(llama):
    import reftlens as rl

    heads, sites, strength, prompts, places = [0, 3], [0], [1.0, 0.5], list(PROMPTS), [0, 2]
    reft = rl.ReFT({rl.attn_z(1, places, heads): rl.LoReFT(2 * D_HEAD, rank=2)})
    rl.generate(reft, llama, prompts, rl.Decoding(max_new_tokens=2), variant=rl.Variant(strength=strength, sites=sites))
    assert (heads, sites, strength, prompts, places) == ([0, 3], [0], [1.0, 0.5], PROMPTS, [0, 2])


def test_the_engine_adds_nothing_when_there_is_nothing_to_edit(llama):
    from reftlens.editing.engine import attached

    batch = encoded(llama)
    alone = run(llama, batch)
    with attached(llama, []):
        assert torch.equal(run(llama, batch), alone)
        assert hook_counts(llama)[1] == {n: ([], []) for n in llama.hook_dict}


def test_a_hook_from_before_the_block_sees_the_unedited_value_and_one_from_inside_the_edited():
    import reftlens as rl

    model, site = fresh_bridge("llama"), rl.resid_post(1, "last")
    data, point = rl.encode(model, [rl.Example("the cat", " sat")]), model.hook_dict[site.hook]
    reft, seen = rl.ReFT({site: rl.LoReFT(D, rank=2)}), {}
    model(data.tokens)
    point.add_hook(lambda h, hook: seen.update(before=h.detach().clone()))
    model(data.tokens)
    unedited = seen["before"]
    with reft.on(model, data):
        point.add_hook(lambda h, hook: seen.update(inside=h.detach().clone()))
        model(data.tokens)
    assert torch.equal(seen["before"], unedited)
    chosen = site.positions.mask(data.view)
    assert not torch.equal(seen["inside"][chosen], unedited[chosen])
    assert torch.equal(seen["inside"][~chosen], unedited[~chosen])
