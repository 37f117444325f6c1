"""What `sites` says of a hook is what a brute-force edit of it does, and hooks that lie are refused."""

import warnings
from functools import cache

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, D_HEAD, D_MLP, HEADS, KV_HEADS, LAYERS, D, bridge, fresh_bridge, tokenizer

ROW, TOKEN = 0, 5


@cache
def everything(architecture):
    import reftlens as rl

    return rl.hooks(bridge(architecture), unusable=True)


@cache
def tokens():
    return torch.randint(5, len(tokenizer()), (2, 11), generator=torch.Generator().manual_seed(3))


def run(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bridge warns of edits at norms
        return model(tokens(), use_cache=False)


def shifted_at_one_token(model, hook):
    """How often `hook` fires, and the logits when what passes there is moved at one token of one row."""
    point, fired = model.hook_dict[hook], []

    def shift(h, hook):
        fired.append(tuple(h.shape))
        if not h.is_floating_point():
            return None
        out = h.clone()
        noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
        if h.shape[:2] == (2, 11):
            out[ROW, TOKEN] += noise[ROW, TOKEN]
            return out
        return h + noise

    handle = point.add_hook(shift)
    try:
        return fired, run(model)
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_usable_site_fires_once_and_an_edit_of_a_token_reaches_that_token_and_later_ones_of_its_row_only(
    architecture,
):
    model = bridge(architecture)
    base, usable = run(model), [r for r in everything(architecture).rows if not r.problem]
    assert len(usable) > 80
    for row in [r for r in usable if not r.hook.startswith(("blocks.0.", "blocks.2."))]:
        fired, logits = shifted_at_one_token(model, row.hook)
        axes = row.shape.split()
        assert axes[:2] == ["batch", "seq"], row
        assert fired == [(2, 11, *map(int, axes[2:]))], row
        assert not torch.equal(logits[ROW, TOKEN:], base[ROW, TOKEN:]), row
        # With a hook inside a norm the bridge computes the norm itself, which rounds in another way than transformers.
        tolerance = 1e-5 if row.hook.endswith(("hook_normalized", "hook_scale")) else 0.0
        for untouched in ((ROW, slice(TOKEN)), (1 - ROW,)):
            torch.testing.assert_close(logits[untouched], base[untouched], atol=tolerance, rtol=0, msg=str(row))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_unusable_hook_does_what_its_reason_says(architecture):
    model = bridge(architecture)
    base, unusable = run(model), [r for r in everything(architecture).rows if r.problem]
    seen = set()
    for row in [r for r in unusable if not r.hook.startswith(("blocks.0.", "blocks.2."))]:
        if row.problem.startswith("nothing passes through"):
            assert "Call set_use_" in row.problem
            continue
        fired, logits = shifted_at_one_token(model, row.hook)
        reason = row.problem.split(" times")[0]
        seen.add(reason)
        if reason == "never fires":
            assert fired == [], row
        elif reason.startswith("fires "):
            assert len(fired) == int(reason.removeprefix("fires ")) > 1, row
        elif reason == "an edit there changes nothing":
            assert len(fired) == 1 and torch.equal(logits, base), row
        elif reason == "has no token axis":
            assert fired[0][:2] != (2, 11) or len(fired[0]) not in (3, 4), row
        else:
            assert reason == "does not hold real numbers", row
    assert "does not hold real numbers" in seen  # embed.hook_in: token ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_has_the_widths_and_heads_of_the_architecture(architecture):
    import reftlens as rl

    table, heads_shared = rl.hooks(bridge(architecture)), architecture not in ("gpt2", "neox")
    kv = KV_HEADS if heads_shared else HEADS
    for layer in range(LAYERS):
        for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
            row = table[f"blocks.{layer}.{name}"]
            assert (row.width, row.heads, row.shape) == (D, None, f"batch seq {D}")
        for letter, count in (("q", HEADS), ("k", kv), ("v", kv), ("z", HEADS)):
            row = table[f"blocks.{layer}.attn.hook_{letter}"]
            assert (row.width, row.heads, row.shape) == (count * D_HEAD, count, f"batch seq {count} {D_HEAD}")
        assert table[f"blocks.{layer}.mlp.hook_post"].width == D_MLP
    assert table["embed.hook_out"].width == table["ln_final.hook_out"].width == D
    if architecture == "neox":
        assert not any("resid_mid" in name for row in table.rows for name in (row.hook, *row.aliases))
    else:
        assert table["blocks.1.hook_resid_mid"].width == D
    frame = table.to_frame()
    assert list(frame.columns) == ["hook", "aliases", "shape", "width", "heads", "problem"]
    assert len(frame) == len(table) and (frame.problem == "").all()
    assert "blocks.1.attn.hook_z" in str(table) and "blocks.1.attn.hook_z" in table._repr_html_()


def test_an_unusable_hook_is_listed_only_on_request():
    import reftlens as rl

    model = bridge("neox")
    lie = "rotary_emb.hook_in"  # the hidden state goes in only to give its dtype and device
    assert rl.hooks(model, unusable=True)[lie].problem == "an edit there changes nothing"
    with pytest.raises(rl.errors.HookNotFound, match=f"^no row for {lie!r}; .*unusable=True"):
        rl.hooks(model)[lie]
    with pytest.raises(ValueError, match=rf"{lie} cannot be a site on .*: an edit there changes nothing"):
        rl.training.preflight(rl.ReFT({rl.Site(lie, "all"): rl.LoReFT(D)}), model)


# -- replicas of hooks that lied in TransformerLens ----------------------------------------------------------------


class Replica(nn.Module):
    """Stands where a bridge calls a hook point, and treats it in its own way."""

    def __init__(self, point, lie):
        super().__init__()
        self.point, self.lie = point, lie

    def forward(self, h):
        if self.lie == "never fires":
            return h
        if self.lie == "fires 2 times in one forward pass":
            return self.point(self.point(h))
        if self.lie == "an edit there changes nothing":  # TransformerLens 1526, 1639, 1648: hooked, then thrown away
            self.point(h.clone())
            return h
        if self.lie == "has no token axis":
            return self.point(h.flatten(0, 1)).view_as(h)
        if self.lie == "does not hold real numbers":
            self.point(h.argmax(dim=-1))
            return h
        return self.point(h)


@pytest.fixture
def replica(request):
    """A fresh llama whose hook after the MLP of block 1 is a replica."""
    model = fresh_bridge("llama")
    modules = model.blocks[1].mlp._modules
    modules["hook_out"] = Replica(modules["hook_out"], request.param)
    return request.param, model


@pytest.mark.parametrize(
    "replica",
    [
        "never fires",
        "fires 2 times in one forward pass",
        "an edit there changes nothing",
        "has no token axis",
        "does not hold real numbers",
    ],
    indirect=True,
)
def test_a_lying_hook_is_refused_with_its_lie(replica):
    import reftlens as rl

    lie, model = replica
    reft = rl.ReFT({rl.mlp_out(0, "all"): rl.LoReFT(D), rl.mlp_out(1, "all"): rl.LoReFT(D)})
    with pytest.raises(ValueError, match=rf"blocks\.1\.hook_mlp_out cannot be a site on .*: {lie}"):
        rl.training.preflight(reft, model)
    data = rl.encode(model, [rl.Example("the cat", " sat")])
    before = [p.clone() for p in reft.parameters()]
    with pytest.raises(ValueError, match=lie):
        rl.fit(reft, model, data, steps=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, reft.parameters(), strict=True))
    assert rl.hooks(model, unusable=True)["blocks.1.hook_mlp_out"].problem == lie
    assert rl.hooks(model)["blocks.0.hook_mlp_out"].problem == ""


@pytest.mark.parametrize("replica", ["an honest hook"], indirect=True)
def test_the_replica_without_a_lie_is_accepted(replica):
    import reftlens as rl

    _, model = replica
    rl.training.preflight(rl.ReFT({rl.mlp_out(1, "all"): rl.LoReFT(D)}), model)
    assert torch.equal(run(model), run(bridge("llama")))


def test_a_mid_residual_whose_block_does_not_add_it_is_refused():
    import reftlens as rl

    model = fresh_bridge("llama")
    reft = rl.ReFT({rl.resid_mid(1, "all"): rl.LoReFT(D)})
    rl.training.preflight(reft, model)
    block, stream = model.blocks[1], {}
    block.ln2.register_forward_pre_hook(lambda _, args: stream.update(mid=args[0]))
    block.mlp.register_forward_hook(lambda _, args, out: out - 0.5 * stream["mid"])  # half of the stream is taken away
    with pytest.raises(ValueError, match=r"hook_resid_mid cannot be a site .*: blocks\.1\.hook_out is not what passed"):
        rl.training.preflight(reft, model)


# -- what it leaves behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_good_site_passes_silently_and_leaves_no_gradient(architecture):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D), rl.attn_k(0, "all", 1): rl.LoReFT(D_HEAD, rank=2)})
    model = bridge(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.training.preflight(reft, model) is None
    assert all(p.grad is None for p in [*reft.parameters(), *model.original_model.parameters()])


def test_sites_and_preflight_neither_read_nor_change_the_global_random_state(llama):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_mid(1, "last"): rl.LoReFT(D)})
    state = torch.get_rng_state()
    first = rl.hooks(llama, unusable=True)
    rl.training.preflight(reft, llama)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert rl.hooks(llama, unusable=True) == first


def test_preflight_works_inside_no_grad(llama):
    import reftlens as rl

    with torch.no_grad():
        rl.training.preflight(rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)}), llama)
        assert not torch.is_grad_enabled()


def test_reentrant_gradient_checkpointing_is_refused_naming_the_way_out():
    import reftlens as rl

    model = fresh_bridge("llama")
    model.original_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D)})
    with pytest.raises(ValueError, match='use_reentrant": False'):
        rl.training.preflight(reft, model)
