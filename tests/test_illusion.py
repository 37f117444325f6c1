"""Planted truth and its twin: a real direction keeps its effect in what is read of it, an illusory one does not."""

import math
import re
from functools import cache

import pytest
import torch
from planted import pairs, planted, planted_neurons
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from architectures import ARCHITECTURES, D_HEAD, D_MLP, HEADS, KV_HEADS, LAYERS, NAMES, D, bridge, hf_model, tokenizer

NETWORKS, DRAWS = ((0, 1), (2, 3, 4, 5)), range(4)
READS = re.compile(
    r"(c_attn|c_fc|query_key_value|dense_h_to_4h|[qkv]_proj|gate_proj|up_proj|lm_head|wte|embed\w*)\.weight"
)


def _meter(truth, direction, data, **kwargs):
    import reftlens as rl
    from reftlens.analysis.causal.illusion import subspace_illusion

    das = rl.DAS(D_MLP, basis=normalize(direction, dim=0))
    reft = rl.ReFT({rl.mlp_post(1, "last"): das})
    return subspace_illusion(reft, truth.model, data, progress=False, **kwargs)


@cache
def _planted():
    truth = planted_neurons()
    return truth, pairs(truth.value, 64, 1)[0]


def _drawn(truth, seed):
    """A real and an illusory direction, each at an angle of 30° to 60° to what is not read, with a tenth of noise."""
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi / 6 * (1 + torch.rand(2, generator=generator))
    noise = 0.1 * normalize(torch.randn(2, D_MLP, 1, generator=generator), dim=1)
    weights = torch.randn(truth.unread.shape[1], 1, generator=generator)
    unread = normalize(truth.unread @ weights + truth.disconnected, dim=0)
    real = angle[0].cos() * truth.real + angle[0].sin() * unread + noise[0]
    return real, angle[1].cos() * truth.dormant + angle[1].sin() * truth.disconnected + noise[1]


@pytest.mark.parametrize("networks", [NETWORKS[0], pytest.param(NETWORKS[1], marks=pytest.mark.slow)])
def test_real_and_illusory_directions_are_told_apart(networks):
    """AUROC of the retained share over 24 of each: four in each of six networks, two of them among the fast tests."""
    meters = []
    for seed in networks:
        truth = planted_neurons(seed)
        data = pairs(truth.value, 48, seed)[0]
        meters += [
            [_meter(truth, v, data, batch_size=48, reuse=False) for v in _drawn(truth, 10 * seed + i)] for i in DRAWS
        ]
    real, illusory = torch.tensor([[m.retained("seen part").value for m in pair] for pair in meters]).T
    assert all(m.has_effect for pair in meters for m in pair), "both kinds do something, so there is something to tell"
    auroc = (real[:, None] > illusory[None]).double().mean().item()
    assert auroc > 0.95
    assert real.min() > 0.5 > illusory.max(), "and the threshold of the warning lies between them"
    told = [[any("illusion" in w for w in m.warnings) for m in pair] for pair in meters]
    assert told == [[False, True]] * len(meters)


def test_the_second_sign_is_seen_too():
    truth, data = _planted()
    illusory = _meter(truth, truth.dormant + truth.disconnected, data)
    assert illusory.beyond_whole.low > 0 and any("more than the whole vector" in w for w in illusory.warnings)
    real = _meter(truth, truth.real, data)
    assert not real.warnings and real.beyond_whole.low <= 0
    assert real.retained("seen part").value == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["dormant", "disconnected"])
def test_either_half_of_an_illusion_alone_does_nothing(name):
    truth, data = _planted()
    meter = _meter(truth, getattr(truth, name), data)
    assert abs(meter.effect("subspace").value) < 0.1
    assert [w for w in meter.warnings if "does not raise the answer" in w] == list(meter.warnings)


def test_the_unseen_part_of_neurons_does_exactly_nothing():
    truth, data = _planted()
    for direction in _drawn(truth, 3):
        meter = _meter(truth, direction, data)
        unseen = meter.gained[3]
        assert torch.allclose(unseen, torch.zeros(()), atol=1e-5), "but for float32 rounding in W_out"
        assert torch.equal(meter.hits[3], meter.hits[0])
        assert meter.effect("subspace").value > 1


def test_the_null_space_of_w_out_is_found():
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import seen_split

    truth, _ = _planted()
    site = rl.mlp_post(1, "last")
    split = seen_split(truth.model, site)
    weight = truth.model.blocks[1].mlp.out.weight.detach().double()  # [D, D_MLP]: the layout of transformers
    rank = int(torch.linalg.matrix_rank(weight.float()))
    assert split.seen.shape == (D_MLP, rank) and split.share == pytest.approx(1.0)
    oracle = torch.linalg.pinv(weight, rtol=1e-6) @ weight
    assert torch.allclose(split.seen @ split.seen.T, oracle, atol=1e-7)
    assert torch.equal(split.seen.T @ split.seen > 0.5, torch.eye(rank, dtype=torch.bool))


def test_the_parts_make_up_the_subspace():
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import seen_split

    truth, _ = _planted()
    split = seen_split(truth.model, rl.mlp_post(1, "last"))
    basis = rl.directions.random_subspace(D_MLP, 3, seed=4).basis
    seen, unseen = split.parts(basis)
    assert seen.shape == unseen.shape == (D_MLP, 3)
    assert torch.allclose(seen @ (seen.T @ basis) + unseen @ (unseen.T @ basis), basis, atol=1e-10)
    assert torch.allclose(seen.T @ unseen, torch.zeros(3, 3, dtype=torch.float64), atol=1e-10)
    assert split.norm_share(basis) == pytest.approx((seen.T @ basis).square().sum().item() / 3)
    inside, outside = split.parts(split.seen[:, :2])
    assert inside.shape[1] == 2 and outside.shape[1] == 0, "what vanishes is dropped"


# -- readers on every architecture, against what the model computes ---------------------------------------------


def _outputs(model, hooks, site_hook, change=None):
    """What `hooks` hold at the last token when `change` is applied to the hidden state there at `site_hook`."""
    values = {}

    def read(h, hook, name):
        values[name] = h[0, -1].flatten().double()

    def edit(h, hook):
        values["h"] = h[0, -1].double()
        if change is None:
            return None
        out = h.clone()
        out[0, -1] = change(h[0, -1])
        return out

    readers = [(name, lambda h, hook, name=name: read(h, hook, name)) for name in hooks]
    with torch.no_grad():
        model.run_with_hooks(torch.arange(40, 49)[None], fwd_hooks=[(site_hook, edit), *readers])
    return values


def _mirrored(direction):
    """Turns `h` over along a direction: its length stays, so that the norm's scale does too."""
    return lambda h: h - 2 * (h @ direction) * direction


def _cases(name, model):
    """`(site's hook, {reader: hook with what it computes})` of the weights that read next."""
    attention = {f"blocks.1.attn.{p}": f"blocks.1.attn.{p}.hook_out" for p in "qkv"}
    mlp = {"blocks.1.mlp.in": "blocks.1.mlp.in.hook_out"}
    if getattr(model.blocks[1].mlp, "W_gate", None) is not None:
        mlp["blocks.1.mlp.gate"] = "blocks.1.mlp.gate.hook_out"
    if name == "neox":
        yield "blocks.1.hook_resid_pre", attention | mlp
    else:
        yield "blocks.1.hook_resid_pre", attention
        yield "blocks.1.hook_resid_mid", mlp
    yield f"blocks.{LAYERS - 1}.hook_resid_post", {"unembed": "unembed.hook_out"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_readers_are_what_the_model_reads_with(name):
    """`Δ(W · norm(h)) ∝ Δh W` for a change that keeps the length, in float64: gain, offset, centring, heads."""
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import stream_readers

    model = bridge(name, torch.float64)
    layer_norm = name in ("gpt2", "neox")
    direction = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    direction = normalize(direction - direction.mean() if layer_norm else direction, dim=0)
    for hook, computed in _cases(name, model):
        pieces = list(stream_readers(model, rl.Site(hook, "last")))
        before = _outputs(model, computed.values(), hook)
        after = _outputs(model, computed.values(), hook, _mirrored(direction))
        change = -2 * (before["h"] @ direction) * direction
        for reader, out in computed.items():
            heads = [weight for n, weight in pieces if n == reader or re.fullmatch(rf"{re.escape(reader)}\.\d+", n)]
            weight = torch.cat(heads, dim=1)
            difference = after[out] - before[out]
            assert weight.norm() == pytest.approx(1.0) and difference.norm() > 1e-3
            # transformers computes some norms in float32 whatever the model's dtype
            assert torch.allclose(normalize(difference, dim=0), normalize(change @ weight, dim=0), atol=1e-5), reader


@cache
def _with_a_blind_spot(name):
    """Every weight that reads the residual stream has no entry for three of its coordinates."""
    model = hf_model(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if READS.search(parameter_name):
                reads = parameter if name == "gpt2" and "c_" in parameter_name else parameter.T  # [in, out]
                reads[[3, 11, 20]] = 0.0
    return TransformerBridge.boot_transformers(NAMES[name], hf_model=model, tokenizer=tokenizer(), device="cpu").eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_no_reader_sees_changes_nothing_that_reads_next(name):
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import seen_split

    model = _with_a_blind_spot(name)
    for hook, computed in _cases(name, model):
        split = seen_split(model, rl.Site(hook, "last"), share=1)
        assert split.seen.shape == (D, D - 3)
        unseen = torch.linalg.qr(split.seen, mode="complete").Q[:, D - 3 :]
        if name in ("gpt2", "neox"):  # the norms centre one of the unseen directions away; mirror along the others
            ones = normalize(torch.ones(D, dtype=torch.float64), dim=0)
            assert torch.allclose(unseen @ (unseen.T @ ones), ones, atol=1e-6)
            unseen = torch.linalg.svd(unseen - ones[:, None] * (ones @ unseen)).U[:, :2]
        before = _outputs(model, computed.values(), hook)
        blind = _outputs(model, computed.values(), hook, _mirrored(unseen[:, 0].float()))
        seeing = _outputs(model, computed.values(), hook, _mirrored(split.seen[:, 0].float()))
        for out in computed.values():
            assert torch.allclose(blind[out], before[out], atol=1e-4)
            assert not torch.allclose(seeing[out], before[out], atol=1e-2), "the twin: what is read most moves it"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_site_has_its_readers(name):
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import seen_split

    model = bridge(name)
    rest = len(seen_split(model, rl.resid_post(1, "last")).readers)
    attention = HEADS + 2 * (HEADS if name in ("gpt2", "neox") else KV_HEADS)
    each = attention + (1 if name in ("gpt2", "neox") else 2)
    assert rest == each + 1
    assert len(seen_split(model, rl.mlp_out(1, "last")).readers) == rest
    assert len(seen_split(model, rl.resid_pre(1, "last")).readers) == rest + each
    assert len(seen_split(model, rl.attn_out(1, "last")).readers) == rest + (0 if name == "neox" else each - attention)
    assert seen_split(model, rl.final_norm("last")).readers == ("unembed",)
    heads = seen_split(model, rl.attn_z(1, "last", heads=[0, 2]))
    assert heads.readers == ("blocks.1.attn.o",) and heads.seen.shape[0] == 2 * D_HEAD
    assert seen_split(model, rl.attn_z(1, "last")).seen.shape[0] == HEADS * D_HEAD
    one = seen_split(model, rl.resid_pre(1, "last"), readers="blocks.2.attn.q.3")
    assert one.readers == ("blocks.2.attn.q.3",) and one.seen.shape == (D, D_HEAD)


def test_share_is_the_part_of_the_trace_that_is_kept():
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import seen_split, stream_readers

    model, site = bridge("llama"), rl.resid_pre(2, "last")
    gram = sum(w @ w.T for _, w in stream_readers(model, site))
    values = torch.linalg.eigvalsh(gram).flip(0) / gram.trace()
    for share in (0.3, 0.5, 0.9):
        split = seen_split(model, site, share=share)
        count = split.seen.shape[1]
        assert values[:count].sum() >= share > values[: count - 1].sum()
        assert split.share == pytest.approx((split.seen.T @ gram @ split.seen).trace().item() / gram.trace().item())
    assert torch.equal(seen_split(model, site).seen, split.seen), "0.9 is the default at the residual stream"


def test_the_default_share_is_the_row_space_where_that_is_narrow():
    import reftlens as rl
    from reftlens.analysis.subspaces.readers import seen_split

    truth, _ = _planted()
    assert seen_split(truth.model, rl.resid_post(LAYERS - 1, "last")).seen.shape[1] == 1, "answers are read along one"
    assert seen_split(truth.model, rl.mlp_post(1, "last")).share == pytest.approx(1.0)
    wide = seen_split(truth.model, rl.resid_post(0, "last"))
    assert 0.9 <= wide.share < 0.95 and wide.seen.shape[1] < D - 1
    named = seen_split(truth.model, rl.resid_post(0, "last"), readers="unembed")
    assert named.seen.shape[1] == 1 and named.share == pytest.approx(1.0)


def test_a_plane_planted_in_the_residual_stream_is_no_illusion():
    import reftlens as rl
    from reftlens.analysis.causal.illusion import subspace_illusion

    truth = planted()
    data = pairs(truth.value, 64, 3)[0]
    das = rl.DAS(D, basis=torch.linalg.qr(truth.subspace).Q)
    site = rl.resid_post(LAYERS - 1, "last")
    meter = subspace_illusion(rl.ReFT({site: das}), truth.model, data, progress=False)
    assert meter.splits[0].seen.shape[1] == 2 and meter.norm_shares[0] > 0.9
    assert meter.retained("seen part").low > 0.9 and abs(meter.retained("unseen part").value) < 0.1
    assert meter.accuracy("seen part").low > 0.9 and not meter.warnings


def test_one_of_several_variables_is_looked_at_alone():
    import reftlens as rl
    from reftlens.analysis.causal.illusion import subspace_illusion

    truth, data = _planted()
    das = rl.DAS(D_MLP, variables={"value": 1, "nothing": 1}, basis=torch.cat([truth.real, truth.dormant], dim=1))
    both = data.with_sources({"value": data.sources["source"], "nothing": data.sources["source"]})
    reft = rl.ReFT({rl.mlp_post(1, "last"): das})
    meters = {v: subspace_illusion(reft, truth.model, both, variable=v, progress=False) for v in ("value", "nothing")}
    assert meters["value"].has_effect and not meters["nothing"].has_effect
    assert torch.equal(meters["value"].hits, _meter(truth, truth.real, data).hits)


def test_the_meter_can_be_read_and_seen():
    from reftlens.analysis.causal.illusion import WAYS

    truth, data = _planted()
    meter = _meter(truth, truth.dormant + truth.disconnected, data[:20])
    assert list(meter.to_frame().index) == list(WAYS)
    assert "retained share" in str(meter) and "subspace illusion" in str(meter)
    assert "nats" in meter.plot().get_xlabel()
    assert "no sign" in str(_meter(truth, truth.real, data))
    empty = _meter(truth, truth.real, data[:20], readers="blocks.1.mlp.out", share=0.01)
    assert empty.splits[0].seen.shape[1] == 1


def test_what_cannot_be_split_is_said():
    import reftlens as rl
    from reftlens.analysis.causal.illusion import subspace_illusion
    from reftlens.analysis.subspaces.readers import seen_split

    truth, data = _planted()
    site, model = rl.mlp_post(1, "last"), truth.model
    with pytest.raises(ValueError, match="exchanges nothing"):
        subspace_illusion(rl.ReFT({site: rl.LoReFT(D_MLP, rank=1)}), model, data)
    with pytest.raises(ValueError, match="no plain subspace"):
        subspace_illusion(rl.ReFT({site: rl.interventions.BoundlessDAS(D_MLP, rank=2)}), model, data)
    with pytest.raises(ValueError, match="no source"):
        _meter(truth, truth.real, pairs(truth.value, 8, 1)[1])
    with pytest.raises(ValueError, match=r"blocks.1.attn.hook_q is not part of the residual stream, and no weight"):
        seen_split(model, rl.attn_q(1, "last"))
    with pytest.raises(ValueError, match=r"matches none of the weights.*blocks.1.mlp.out"):
        seen_split(model, site, readers="unembed")
    with pytest.raises(ValueError, match=r"matches none of the weights.*blocks.2.attn.q.0"):
        seen_split(model, rl.resid_post(1, "last"), readers="blocks.0.*")
    with pytest.raises(ValueError, match="share=0"):
        seen_split(model, site, share=0.0)
    with pytest.raises(ValueError, match="there are: 'no edit'"):
        _meter(truth, truth.real, data).effect("seen")
    with pytest.raises(ValueError, match="no single W_in"):
        blind = bridge("llama")
        list(seen_split(_without_mlp(blind), rl.resid_pre(0, "last")).readers)


def _without_mlp(model):
    """The model as one sees it whose MLP is a mixture of experts."""
    from types import SimpleNamespace

    block = model.blocks[0]
    blocks = [SimpleNamespace(attn=block.attn, ln1=block.ln1, ln2=block.ln2, mlp=SimpleNamespace())]
    names = ("cfg", "training", "tokenizer", "hook_dict", "original_model", "check_hooks_to_add", "__call__")
    return type("Experts", (), {**{n: getattr(model, n, None) for n in names}, "blocks": blocks})()
