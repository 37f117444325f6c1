"""Activations are what the hook holds at the chosen tokens: by TransformerLens' cache, and by transformers' own."""

from functools import cache

import pytest
import torch

from architectures import ARCHITECTURES, D_HEAD, LAYERS, D, bridge, fresh_bridge, hf_model

SITES = {
    "resid_pre": ("resid_pre", "all", None),
    "resid_mid": ("resid_mid", "f1+l2", None),
    "resid_post": ("resid_post", "last", None),
    "attn_out": ("attn_out", "response", None),
    "mlp_out": ("mlp_out", "prompt", None),
    "neurons": ("mlp_post", [0, 4], None),
    "q": ("attn_q", "all", None),
    "k head 1": ("attn_k", "last", 1),
    "z heads 2 0": ("attn_z", "l2", (2, 0)),
}


@cache
def texts(architecture):
    import reftlens as rl

    pairs = [
        ("the cat sat", " on the mat"),
        ("a dog ran by the green hill and looked", " at the moon"),
        ("the", " cat"),
    ]
    return rl.encode(bridge(architecture), [rl.Example(p, c) for p, c in pairs])


def site(name):
    import reftlens as rl

    make, positions, heads = SITES[name]
    return getattr(rl, make)(1, positions) if heads is None else getattr(rl, make)(1, positions, heads)


CELLS = [(a, s) for a in ("gpt2", "neox", "gemma3") for s in SITES if (a, s) != ("neox", "resid_mid")]


@pytest.mark.parametrize("architecture, name", CELLS)
def test_activations_are_what_run_with_cache_holds_at_the_chosen_tokens(architecture, name):
    import reftlens as rl

    model, data, place = bridge(architecture), texts(architecture), site(name)
    found = rl.activations(model, data, place, progress=False)
    expected = []
    for i in range(len(data)):  # one row at a time, without padding, token by token
        row = data[i]
        _, held = model.run_with_cache(row.tokens, names_filter=place.hook)
        h = held[place.hook][0]
        for p in place.positions.mask(row.view)[0].nonzero().flatten().tolist():
            token = h[p] if place.heads is None else torch.stack([h[p, k] for k in place.heads])
            expected.append(token.flatten())
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)  # float32, padded and not
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_residual_stream_is_the_hidden_states_of_transformers(architecture):
    import reftlens as rl

    data, plain = texts(architecture), hf_model(architecture)
    with torch.no_grad():
        states = plain(
            input_ids=data.tokens, attention_mask=data.attention_mask.long(), output_hidden_states=True
        ).hidden_states
    for layer in range(LAYERS):
        found = rl.activations(bridge(architecture), data, rl.resid_pre(layer, "all"), progress=False)
        torch.testing.assert_close(found, states[layer][data.attention_mask], atol=1e-5, rtol=0)
    found = rl.activations(bridge(architecture), data, rl.final_norm("all"), progress=False)
    torch.testing.assert_close(
        found, states[LAYERS][data.attention_mask], atol=2e-5, rtol=0
    )  # a gain of 2 in tied ones


def test_the_size_of_the_batches_does_not_matter(any_model):
    import reftlens as rl

    data = texts(next(a for a in ARCHITECTURES if bridge(a) is any_model))
    place = rl.resid_post(2, "f2+l2")
    whole = rl.activations(any_model, data, place, progress=False)
    for size in (1, 2):
        torch.testing.assert_close(
            rl.activations(any_model, data, place, batch_size=size, progress=False), whole, atol=1e-5, rtol=0
        )
    assert len(whole) == 4 + 4 + int(data.prompt_mask[2].sum())


def test_equal_rows_are_read_once_and_a_users_hook_sees_every_row(llama):
    import reftlens as rl

    rows, place, seen = [2, 0, 1, 0, 2], rl.resid_post(0, "all"), []
    data = texts("llama")[rows]
    expected = [rl.activations(llama, data[i], place, progress=False) for i in range(len(rows))]
    llama.blocks[0].hook_in.add_hook(lambda h, hook: seen.append(h.shape[0]) and None)
    try:
        hooked = rl.activations(llama, data, place, progress=False)
    finally:
        llama.reset_hooks()
    for found in (hooked, rl.activations(llama, data, place, progress=False)):
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)  # float32, padded and not
    assert seen == [5]


SHOTS = "the cat sat on the mat while a dog ran by the green hill and looked at the moon "
ENDS = (" the cat", " a dog", " looked at", " the moon", " by a", " green hill")  # two tokens each


def begun(model, *, other=None):
    """Rows that begin alike, the last of them up to token `other` only."""
    import reftlens as rl

    batch = rl.encode_prompts(model, [SHOTS + end for end in ENDS])
    if other is not None:
        batch.tokens[-1, other] += 1
    return batch


@pytest.fixture
def cheap(monkeypatch):
    """One more pass costs nothing: whatever can be shared is."""
    from reftlens.text import beginnings

    monkeypatch.setitem(beginnings.PASS, "cpu", 0.0)


def read_of(model, batch, positions, monkeypatch, layer=1, size=16):
    """What is read, and rows and tokens of each pass through block 0."""
    import reftlens as rl

    kind, ran = type(model.blocks[0]), []
    forward = kind.forward

    def counted(self, h, *args, **settings):
        ran.append(tuple(h.shape[:2])) if self is model.blocks[0] else None
        return forward(self, h, *args, **settings)

    rl.activations(model, batch[:1], rl.resid_post(0, "last"), progress=False)  # the first time, the model is tried
    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", counted)
        read = rl.activations(model, batch, rl.resid_post(layer, positions), batch_size=size, progress=False)
    return read, ran


@pytest.mark.parametrize("other", [None, 9])
@pytest.mark.parametrize("architecture", ["gpt2", "neox", "gemma3", "llama"])
def test_what_rows_begin_with_alike_is_read_once(architecture, other, cheap, doubles, monkeypatch):
    """Beyond a window of attention, to the token before the first chosen one, and no further than tokens are equal."""
    model = bridge(architecture, torch.float64)
    batch = begun(model, other=other)
    longest = batch.tokens.shape[1]
    for tokens in (1, 3):  # chosen ones; the second time the first of them is the last that is shared
        alone = [read_of(model, batch[i], f"l{tokens}", monkeypatch)[0] for i in range(len(ENDS))]
        read, ran = read_of(model, batch, f"l{tokens}", monkeypatch, size=4)
        torch.testing.assert_close(read, torch.cat(alone), atol=1e-10, rtol=0)
        rows, left = len(ENDS) - (other is not None), max(tokens, 2)
        passes = [(1, longest - left), (1, longest), (4, left), (rows - 4, left)]
        assert longest > 18 and ran == passes + [(1, longest)] * (other is not None)


@pytest.mark.parametrize("name", ["q", "z heads 2 0", "neurons", "resid_mid"])
def test_rows_of_all_lengths_and_without_chosen_tokens_are_what_they_are_alone(name, gpt2_double, cheap, monkeypatch):
    import reftlens as rl
    from reftlens.editing import reading

    texts = [("the moon", " sat"), (SHOTS + "a cat", " ran by the hill"), ("a", " dog"), (SHOTS, " on the mat")]
    texts += [(SHOTS + "the", " dog"), (SHOTS + "while", " the"), (SHOTS + "a cat by", " the moon and the hill")]
    data = rl.encode(gpt2_double, [rl.Example(*text) for text in texts])
    data.role[[2, 4]] = data.role[[2, 4]].clamp(max=1)  # two rows without a response
    order = data.attention_mask.long().argsort(dim=1, stable=True)  # padded on the left
    padded = data.rearranged(lambda x: x.gather(1, order))
    place = rl.Site(site(name).hook, "response", site(name).heads)
    alone = [rl.activations(gpt2_double, data[i], place, progress=False) for i in (0, 1, 3, 5, 6)]
    begun, shared = reading.read_begun, []
    monkeypatch.setattr(reading, "read_begun", lambda *a: shared.append(begun(*a)) or shared[0])
    read = rl.activations(gpt2_double, padded, place, batch_size=3, progress=False)
    torch.testing.assert_close(read, torch.cat(alone), atol=1e-10, rtol=0)
    assert len(shared[0]) == 4


@pytest.mark.parametrize("wrong", ["noise", "error"])
def test_where_stored_keys_give_something_else_all_is_read_in_full(wrong, llama, cheap, monkeypatch):
    from reftlens.editing import begun as sharing
    from reftlens.editing import reading

    update = sharing._Begun.update

    def broken(layer, *args):
        if wrong == "error":
            raise RuntimeError("no keys of this kind")
        keys, values = update(layer, *args)
        return keys, values * 1.01

    batch = begun(llama)
    monkeypatch.setattr(sharing._Begun, "update", broken)
    read, ran = read_of(llama, batch, "last", monkeypatch)
    monkeypatch.setattr(reading, "read_begun", lambda *a: {})
    full, passes = read_of(llama, batch, "last", monkeypatch)
    assert torch.equal(read, full) and ran[-len(passes) :] == passes and len(ran) > len(passes)


def test_rows_that_share_too_little_are_read_as_if_nothing_were_shared(llama, monkeypatch):
    from reftlens.editing import reading

    batch = begun(llama)[:3]  # more passes would cost more than one beginning
    read, ran = read_of(llama, batch, "last", monkeypatch)
    monkeypatch.setattr(reading, "read_begun", lambda *a: {})
    full, passes = read_of(llama, batch, "last", monkeypatch)
    assert torch.equal(read, full) and ran == passes == [tuple(batch.tokens.shape)]


def test_the_mean_of_activations_is_a_mean_ablation(llama):
    import reftlens as rl

    data = texts("llama")
    reference = rl.activations(llama, data, rl.resid_post(1, "last"), progress=False).mean(dim=0)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.Ablation(D, reference)})
    hook = "blocks.1.hook_resid_post"
    with torch.no_grad(), reft.on(llama, data):
        _, held = llama.run_with_cache(data.tokens, names_filter=hook)
    last = rl.resid_post(1, "last").positions.mask(data.view)
    torch.testing.assert_close(held[hook][last], reference.expand(3, D), atol=1e-6, rtol=0)


def test_precision_is_float32_or_wider():
    import reftlens as rl

    half, double = fresh_bridge("llama", dtype=torch.bfloat16), bridge("gpt2", torch.float64)
    found = rl.activations(half, texts("llama"), rl.resid_post(1, "last"), progress=False)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    assert rl.activations(double, texts("gpt2"), rl.resid_post(1, "last"), progress=False).dtype == torch.float64


def test_what_cannot_be_collected_is_refused(llama):
    import reftlens as rl

    data = texts("llama")
    for place, why in (
        (rl.Site("blocks.1.hook_resid_post", "last", 0), r"has no heads .* drop heads=\[0\]"),
        (rl.attn_k(1, "last", 2), r"has heads 0 to 1, got heads=\[2\]"),
        (rl.resid_post(1, [150]), r"chooses no token in any of 3 row"),
        (rl.Site("blocks.1.hook_resid_pos", "last"), "did you mean blocks.1.hook_resid_post"),
        (rl.Site("blocks.1.attn.hook_result", "last"), r"set_use_attn_result\(True\)"),
        (rl.Site("blocks.1.attn.hook_hidden_states", "last"), "fired 0 times"),
    ):
        with pytest.raises((ValueError, KeyError), match=why):
            rl.activations(llama, data, place, progress=False)


def test_heads_are_joined_in_the_order_given(llama):
    import reftlens as rl

    data = texts("llama")
    whole = rl.activations(llama, data, rl.attn_z(1, "all"), progress=False)
    chosen = rl.activations(llama, data, rl.attn_z(1, "all", (3, 0)), progress=False)
    assert torch.equal(chosen, torch.cat([whole[:, 3 * D_HEAD : 4 * D_HEAD], whole[:, :D_HEAD]], dim=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_ends_the_pass_at_the_site_and_leaves_the_model_as_it_was(architecture, monkeypatch):
    """Blocks above the deepest site and tokens after the last one do not run, and nothing of a pass cut short stays."""
    import reftlens as rl

    model = fresh_bridge(architecture)
    batch = rl.encode_prompts(model, ["one", "two or three"])
    before = model(batch.tokens, attention_mask=batch.attention_mask.long())
    rl.activations(model, batch, rl.resid_post(0, "all"), progress=False)  # the first time, the model itself is tried
    kind, ran = type(model.blocks[0]), []
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: (ran.append(self), forward(self, *a, **k))[1])
    read = rl.activations(model, batch, rl.resid_post(0, "all"), progress=False)
    assert ran == [model.blocks[0]] and len(read) == batch.attention_mask.sum()
    wide = []
    monkeypatch.setattr(
        kind, "forward", lambda self, h, *a, **k: (wide.append(h.shape[1]), forward(self, h, *a, **k))[1]
    )
    first = rl.activations(model, batch, rl.resid_post(0, "f2"), progress=False)  # and tokens after the last chosen one
    assert wide == [2] and torch.allclose(first[:2], read[:2], atol=1e-6)
    assert torch.equal(model(batch.tokens, attention_mask=batch.attention_mask.long()), before)
