"""The planted answers are what the planted directions promote; a direction that is not read is at chance."""

import pytest
import torch
from planted import ANSWERS, CORNERS, pairs, planted

from architectures import D, bridge, fresh_bridge


def _steer(vector, site=None):
    import reftlens as rl

    return rl.ReFT({site or rl.resid_post(1, "last"): rl.SteeringVector(D, vector)})


def _tokens(reft, model, **kwargs):
    from reftlens.analysis.subspaces.tokens import direction_tokens

    return direction_tokens(reft, model, progress=False, **kwargs)


@pytest.mark.parametrize("corner", range(4))
def test_the_answer_of_a_planted_corner_is_promoted_most(corner):
    world = planted()
    tokens = _tokens(_steer(world.subspace @ CORNERS[corner]), world.model, top=3)
    first = {r.effect: r.id for r in tokens.rows if r.place == 1}
    opposite = next(i for i in range(4) if torch.equal(CORNERS[i], -CORNERS[corner]))
    assert first == {"promotes": ANSWERS[corner], "suppresses": ANSWERS[opposite]}
    assert tokens.p(0) < 0.02 and tokens.rows[0].logit > tokens.chance


def test_a_direction_that_is_not_read_is_at_chance():
    world = planted()
    g = torch.Generator().manual_seed(0)
    vector = torch.randn(D, generator=g)
    vector = vector - world.subspace @ (world.subspace.T @ vector)
    assert _tokens(_steer(vector), world.model).p(0) > 0.5
    p = [_tokens(_steer(torch.randn(D, generator=g)), world.model, draws=100).p(0) for _ in range(40)]
    assert 0.3 < sum(p) / 40 < 0.7 and sum(x < 0.05 for x in p) <= 6, "2 expected; more than 6 in 0.3 % of cases"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_what_is_read_is_the_final_norm_and_the_unembedding(name):
    """Oracle: the norm written out. The length of the direction does not matter, biases do not either."""
    model = bridge(name)
    vector = torch.randn(D, generator=torch.Generator().manual_seed(0))
    tokens = _tokens(_steer(vector), model, top=5)
    norm = model.ln_final
    centred = vector if norm.uses_rms_norm else vector - vector.mean()
    unit = centred / centred.square().mean().sqrt() * (norm.weight.detach() + float(norm.uses_weight_offset))
    logits = unit @ model.W_U.detach()
    if name == "gemma2":
        logits = 30 * torch.tanh(logits / 30)
    expected = logits.sort(descending=True)
    assert [r.id for r in tokens.rows[:5]] == expected.indices[:5].tolist()
    assert [r.logit for r in tokens.rows[:5]] == pytest.approx(expected.values[:5].tolist(), abs=1e-3)
    assert [r.id for r in tokens.rows[5:]] == expected.indices.flip(0)[:5].tolist()
    longer = _tokens(_steer(100 * vector), model, top=5)
    assert [r.id for r in longer.rows] == [r.id for r in tokens.rows]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_neurons_and_heads_are_read_as_what_they_write(name):
    """Oracle: a vector at the stream that is the row of W_out, the rows of W_O, times the gain of a norm behind."""
    import reftlens as rl

    model = bridge(name)
    block, g = model.blocks[1], torch.Generator().manual_seed(0)
    gains = [getattr(block, n, None) for n in ("ln2_post", "ln1_post")]
    mlp, attention = (1.0 if n is None else n.weight.detach() + float(n.uses_weight_offset) for n in gains)
    neuron, heads = torch.eye(48)[5], torch.randn(16, generator=g)
    for site, vector, written in (
        (rl.mlp_post(1, "last"), neuron, block.mlp.W_out.detach()[5] * mlp),
        (rl.attn_z(1, "last", [2, 0]), heads, heads @ block.attn.W_O.detach()[[2, 0]].flatten(0, 1) * attention),
        (rl.attn_z(1, "last"), torch.ones(D), block.attn.W_O.detach().sum(dim=(0, 1)) * attention),
    ):
        tokens = _tokens(rl.ReFT({site: rl.SteeringVector(len(vector), vector)}), model, top=4)
        stream = _tokens(_steer(written, rl.resid_post(1, "last")), model, top=4)
        assert [r.id for r in tokens.rows] == [r.id for r in stream.rows] and tokens.basis.shape == (len(vector), 1)
        assert [r.logit for r in tokens.rows] == pytest.approx([r.logit for r in stream.rows], abs=1e-4)
        assert 0 < tokens.chance != stream.chance, "random directions pass through the projection, too"


def test_neurons_that_write_nothing_promote_nothing():
    import reftlens as rl

    model = fresh_bridge("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.W_out[:24] = 0
    silent, loud = (rl.SteeringVector(48, torch.cat([torch.eye(2)[i]] * 24)) for i in (0, 1))
    with torch.no_grad():
        silent.vector.copy_(torch.arange(48) < 24)
    site = rl.mlp_post(1, "last")
    assert all(r.logit == 0 for r in _tokens(rl.ReFT({site: silent}), model).rows)
    assert _tokens(rl.ReFT({site: loud}), model).rows[0].logit > 0


def test_principal_axes_of_neurons_are_read_with_data():
    import reftlens as rl

    model = bridge("llama")
    data = rl.encode(model, [rl.Example(f"the cat sat on the mat {i}", " over the green hill") for i in range(6)])
    reft = rl.ReFT({rl.mlp_post(1, "last"): rl.LoReFT(48, rank=2)})
    reft.reset(0)
    tokens = _tokens(reft, model, data=data)
    assert tokens.principal and tokens.basis.shape == (48, 2)
    axis = _tokens(rl.ReFT({rl.mlp_post(1, "last"): rl.SteeringVector(48, tokens.basis[:, 0].float())}), model)
    assert tokens.top(0) == axis.top(0)


def test_with_data_the_directions_are_the_canonical_ones():
    """A frame whose columns mean nothing, an edit that is always towards one corner."""
    import reftlens as rl

    world = planted()
    module = rl.interventions.LobiReFT(D, 2)
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(2, 2)).Q
        module.frame.set(world.subspace @ turn)
        module.b.copy_(turn.T @ CORNERS[2])
    reft, data = rl.ReFT({rl.resid_post(1, "last"): module}), pairs(world.value, 20, 0)[1]
    tokens = _tokens(reft, world.model, data=data)
    assert tokens.rows[0].id == ANSWERS[2] and tokens.principal and tokens.basis.shape == (D, 2)
    assert tokens.top(0)[0] == world.model.tokenizer.decode([ANSWERS[2]])
    only = _tokens(reft, world.model, data=data, directions=[1], top=2)
    assert {r.direction for r in only.rows} == {1} and only.basis.shape == (D, 1) and "direction 1" in str(only)
    assert not _tokens(reft, world.model).principal


def test_after_the_final_norm_there_is_no_norm():
    import reftlens as rl

    model = bridge("gpt2")
    vector = torch.randn(D, generator=torch.Generator().manual_seed(0))
    tokens = _tokens(_steer(vector, rl.final_norm("last")), model, top=4)
    logits = torch.nn.functional.normalize(vector, dim=0) @ model.W_U.detach()
    assert [r.logit for r in tokens.rows[:4]] == pytest.approx(logits.topk(4).values.tolist(), abs=1e-5)


def test_the_jacobian_lens_reads_through_the_blocks():
    from transformer_lens.tools.analysis import JacobianLens

    import reftlens as rl

    model = bridge("gpt2")
    matrix = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q
    lens = JacobianLens({1: matrix}, n_prompts=1, d_model=D)
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1))
    tokens = _tokens(_steer(vector), model, lens=lens)
    plain = _tokens(_steer(matrix @ vector), model)
    assert [r.id for r in tokens.rows] == [r.id for r in plain.rows] and tokens.lens == "Jacobian lens"
    assert [r.id for r in _tokens(_steer(vector), model).rows] != [r.id for r in tokens.rows]
    before = _tokens(_steer(vector, rl.resid_pre(2, "last")), model, lens=lens)
    assert [r.id for r in before.rows] == [r.id for r in tokens.rows]
    last = _tokens(_steer(vector, rl.resid_post(2, "last")), model, lens=lens)
    assert [r.id for r in last.rows] == [r.id for r in _tokens(_steer(vector), model).rows], "nothing is behind it"
    with pytest.raises(ValueError, match="not fitted for layer 0"):
        _tokens(_steer(vector, rl.resid_post(0, "last")), model, lens=lens)
    with pytest.raises(ValueError, match="reads the output of a block"):
        _tokens(_steer(vector, rl.mlp_out(1, "last")), model, lens=lens)
    with pytest.raises(ValueError, match="behind the last block"):
        _tokens(_steer(vector, rl.final_norm("last")), model, lens=lens)


def test_a_fitted_jacobian_lens_is_taken():
    """In the planted model the blocks add nothing: J is the identity, and both lenses agree."""
    from transformer_lens.tools.analysis import JacobianLens

    world = planted()
    lens = JacobianLens.fit(
        world.model,
        ["the cat sat on the mat and looked at the moon over the green hill"],
        corpus="test",
        source_layers=[1],
        skip_first_positions=2,
        show_progress=False,
    )
    vector = world.subspace @ CORNERS[1]
    tokens = _tokens(_steer(vector), world.model, lens=lens, top=1)
    assert [r.id for r in tokens.rows] == [r.id for r in _tokens(_steer(vector), world.model, top=1).rows]


def test_what_the_unembedding_cannot_read_is_refused():
    import reftlens as rl

    model = bridge("gpt2")
    for site in (rl.attn_q(1, "last"), rl.attn_v(1, "last")):
        with pytest.raises(ValueError, match=r"not part of the residual stream.*use resid_pre"):
            _tokens(rl.ReFT({site: rl.LoReFT(D, 2)}), model)
    with pytest.raises(ValueError, match=r"width 16, and what reads them 8"):
        _tokens(rl.ReFT({rl.attn_z(1, "last", heads=1): rl.LoReFT(16, 2)}), model)
    with pytest.raises(ValueError, match="is zero"):
        _tokens(_steer(torch.zeros(D)), model)
    with pytest.raises(ValueError, match="directions="):
        _tokens(_steer(torch.ones(D)), model, directions=[1])
    with pytest.raises(ValueError, match="pass site="):
        two = rl.ReFT({rl.resid_post(i, "last"): rl.LoReFT(D, 2) for i in (0, 1)})
        _tokens(two, model)


def test_tokens_have_a_figure_and_a_table():
    tokens = _tokens(_steer(torch.arange(D).float()), bridge("gpt2"), top=4)
    assert len(tokens.to_frame()) == 8 and tokens.to_frame().logit.is_monotonic_decreasing is False
    axes = tokens.plot()
    assert len(axes.patches) == 8 and "random directions" in axes.get_xlabel()
    with pytest.raises(ValueError, match="no direction 3"):
        tokens.plot(direction=3)


def test_bytes_of_a_character_are_shown_as_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from reftlens.text.view import token_text

    words = ["Ġcat", "ðŁ", "ĠðŁĮ", "s"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [token_text(tokenizer, i) for i in range(4)] == [" cat", "<F0 9F>", " <F0 9F 8C>", "s"]
