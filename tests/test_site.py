"""Laws of sites: what the constructors mean, that they are values, and that they survive JSON."""

import dataclasses
import json

import pytest
import torch

import architectures

LAYER = 1
# Constructor, hook, whether it takes heads.
TABLE = {
    "resid_pre": (f"blocks.{LAYER}.hook_resid_pre", False),
    "resid_mid": (f"blocks.{LAYER}.hook_resid_mid", False),
    "resid_post": (f"blocks.{LAYER}.hook_resid_post", False),
    "attn_out": (f"blocks.{LAYER}.hook_attn_out", False),
    "mlp_out": (f"blocks.{LAYER}.hook_mlp_out", False),
    "mlp_post": (f"blocks.{LAYER}.mlp.hook_post", False),
    "attn_q": (f"blocks.{LAYER}.attn.hook_q", True),
    "attn_k": (f"blocks.{LAYER}.attn.hook_k", True),
    "attn_v": (f"blocks.{LAYER}.attn.hook_v", True),
    "attn_z": (f"blocks.{LAYER}.attn.hook_z", True),
    "embeddings": ("embed.hook_out", False),
    "final_norm": ("ln_final.hook_out", False),
}


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def site(rl, name, positions="last", **kwargs):
    layer = [] if name in ("embeddings", "final_norm") else [LAYER]
    return getattr(rl, name)(*layer, positions, **kwargs)


@pytest.mark.parametrize("name", TABLE)
def test_each_constructor_names_its_hook_and_takes_heads_only_where_there_are_heads(rl, name):
    hook, heads = TABLE[name]
    assert site(rl, name) == rl.Site(hook, rl.positions.Last())
    if heads:
        assert site(rl, name, heads=[0, 2]) == rl.Site(hook, "last", (0, 2))
        assert site(rl, name, heads=3).heads == (3,)
    else:
        with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
            site(rl, name, heads=0)


@pytest.mark.parametrize("call", ["resid_post(8, position='last')", "Site('embed.hook_out', 'last', head=1)"])
def test_misspelt_arguments_are_refused(rl, call):
    with pytest.raises(TypeError, match="argument"):
        eval(call, dict(vars(rl)))


@pytest.mark.parametrize("heads", [[], [-1], -1, [0, 0], [0, 1, 0]])
def test_heads_that_are_none_negative_or_repeated_are_refused(rl, heads):
    with pytest.raises(ValueError, match="need distinct head indices from 0"):
        rl.attn_z(0, "last", heads=heads)


def test_sites_are_values(rl):
    one, same = (
        rl.attn_z(2, "f1+l1", heads=[0, 1]),
        rl.attn_z(2, rl.positions.First() | rl.positions.Last(), heads=(0, 1)),
    )
    assert one == same and hash(one) == hash(same) and one is not same
    others = [
        rl.attn_z(1, "f1+l1", heads=[0, 1]),
        rl.attn_z(2, "last", heads=[0, 1]),
        rl.attn_z(2, "f1+l1"),
        rl.attn_z(2, "f1+l1", heads=[1, 0]),
        rl.attn_q(2, "f1+l1", heads=[0, 1]),
    ]
    assert len({one, same, *others}) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.hook = "embed.hook_out"


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(
    "positions",
    [
        "first",
        "f3+l3",
        "all",
        "response",
        [0, 4],
        "Nth(-2, missing='skip')",
        "Tokens('c.t', regex=True)",
        "Prompt() >> (All() - Last(2))",
    ],
)
def test_sites_survive_a_round_trip_through_json(rl, name, positions):
    if isinstance(positions, str) and "(" in positions:
        positions = eval(positions, dict(vars(rl.positions)))
    for kwargs in [{}, {"heads": [1, 3]}] if TABLE[name][1] else [{}]:
        made = site(rl, name, positions, **kwargs)
        again = rl.Site.from_dict(json.loads(json.dumps(made.to_dict())))
        assert again == made and hash(again) == hash(made)


def test_a_site_says_where_it_is(rl):
    assert str(rl.resid_post(8, "last")) == "blocks.8.hook_resid_post at Last(n=1)"
    assert str(rl.attn_z(2, "first", heads=[0, 2])) == "blocks.2.attn.hook_z heads [0, 2] at First(n=1)"


def test_f1_l1_at_three_layers_is_three_interventions_at_two_tokens_each(rl, gpt2):
    """pyreft loses the third: it halves the list of positions."""
    reft = rl.ReFT({rl.resid_post(i, "f1+l1"): rl.LoReFT(gpt2.cfg.d_model) for i in range(3)})
    batch = rl.encode_prompts(gpt2, ["the cat sat on the mat"])
    edits = reft.bound_to(gpt2, batch).edits(batch.view)
    assert len(edits) == 3
    for edit in edits:
        assert edit.tokens.columns.tolist() == [0, batch.tokens.shape[1] - 1]


# -- what the hooks hold, by the transformers model's own account --------------------------------------------


@pytest.fixture(params=["gpt2", "llama"])
def seen(request, rl):
    """Hidden states by site, and those that the plain transformers model reports for the same tokens."""
    model = architectures.bridge(request.param)
    batch = rl.encode_prompts(model, ["the cat sat on the mat"])

    def read(made):
        return rl.activations(model, batch, made, progress=False)

    with torch.no_grad():
        out = architectures.hf_model(request.param)(batch.tokens, output_hidden_states=True)
    return read, [h[0] for h in out.hidden_states], out.logits[0], request.param


def test_the_residual_sites_hold_the_hidden_states_of_transformers(rl, seen):
    read, hidden, _, _ = seen
    for layer in range(architectures.LAYERS):
        # float32, the same operations in another module: rounding of the last digit at most.
        assert torch.allclose(read(rl.resid_pre(layer, "all")), hidden[layer], atol=1e-5)
    for layer in range(architectures.LAYERS - 1):
        assert torch.allclose(read(rl.resid_post(layer, "all")), hidden[layer + 1], atol=1e-5)
    assert torch.allclose(read(rl.final_norm("all")), hidden[-1], atol=1e-5)
    assert not torch.allclose(read(rl.resid_post(1, "all")), hidden[1], atol=0.1)


def test_attention_and_mlp_add_up_along_the_residual_stream(rl, seen):
    read, _, _, _ = seen
    pre, mid, post = (read(getattr(rl, f"resid_{at}")(LAYER, "all")) for at in ("pre", "mid", "post"))
    attention, mlp = read(rl.attn_out(LAYER, "all")), read(rl.mlp_out(LAYER, "all"))
    assert torch.allclose(pre + attention, mid, atol=1e-5)
    assert torch.allclose(mid + mlp, post, atol=1e-5)
    assert min(attention.abs().max(), mlp.abs().max()) > 0.1


def test_the_final_norm_is_what_the_unembedding_reads_and_the_embedding_what_the_ids_say(rl, seen):
    read, _, logits, name = seen
    model = architectures.hf_model(name)
    assert torch.allclose(read(rl.final_norm("all")) @ model.get_output_embeddings().weight.T, logits, atol=1e-4)
    batch = rl.encode_prompts(architectures.bridge(name), ["the cat sat on the mat"])
    assert torch.equal(read(rl.embeddings("all")), model.get_input_embeddings().weight[batch.tokens[0]])


def test_heads_of_a_site_are_columns_of_all_heads(rl, seen):
    read, _, _, name = seen
    for make, count in ((rl.attn_q, 4), (rl.attn_z, 4), (rl.attn_k, 4 if name == "gpt2" else 2)):
        whole = read(make(LAYER, "all"))
        assert whole.shape[1] == count * architectures.D_HEAD
        parts = whole.view(-1, count, architectures.D_HEAD)
        for heads in ([0], [count - 1], [1, 0]):
            assert torch.equal(read(make(LAYER, "all", heads=heads)), parts[:, heads].flatten(1))
