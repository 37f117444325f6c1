"""What `save_pyreft` writes: pyreft's names and shapes, and the same interventions bit for bit when read again."""

import json
from pathlib import Path

import pytest
import torch
from outside.pyreft_folders import KINDS

import architectures

D = architectures.D
HERE = Path(__file__).parent / "reference"


def _kind(name):
    import reftlens as rl

    return getattr(rl.interventions, name)


def _logits(reft, model, batch):
    with torch.no_grad(), reft.eval().on(model, batch):
        return model(batch.tokens, attention_mask=batch.attention_mask.long())


@pytest.mark.parametrize("settled", [True, False], ids=["settled", "as an optimizer leaves it"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_exactly(gpt2, tmp_path, kind, settled):
    import reftlens as rl

    sites = (rl.resid_post(0, "f1+l1"), rl.mlp_out(2, rl.positions.Tokens("cat")), rl.resid_post(0, "last"))
    reft = rl.ReFT({site: _kind(kind)(D, rank, dropout=0.25) for site, rank in zip(sites, (3, 1, D), strict=True)})
    with torch.no_grad():
        for module in reft.distinct:
            for frame in module.frames():
                frame.matrix.mul_(2.0)
    if settled:
        reft.settle()
    folder = rl.storage.save_pyreft(reft, tmp_path / "saved", gpt2)
    again = rl.storage.load_pyreft(folder)
    assert again.sites == reft.sites and not again.training
    batch = rl.encode_prompts(gpt2, ["the cat sat on the mat", "a cat"])
    difference = (_logits(again, gpt2, batch) - _logits(reft, gpt2, batch)).abs().max()
    if settled:
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in reft.state_dict().items())
        assert difference == 0
    # float32: the basis of a parameter is its QR factor, and that of the basis itself is it up to rounding
    assert difference < 2e-5
    assert [(m.kind, m.rank, m.dropout.p) for _, m in again.items()] == [(kind, r, 0.25) for r in (3, 1, D)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_come_back_with_the_same_numbers(gpt2, tmp_path, kind, dtype):
    import reftlens as rl

    module = _kind(kind)(D, 3).to(dtype)
    reft = rl.ReFT({rl.resid_post(1, "last"): module}).eval()
    again = rl.storage.load_pyreft(rl.storage.save_pyreft(reft, tmp_path, gpt2))[0]
    assert {p.dtype for p in again.parameters()} == {torch.promote_types(dtype, torch.float32)}
    h = torch.randn(5, D, dtype=torch.promote_types(dtype, torch.float32))
    # bfloat16 columns are orthonormal to their rounding only: what acts is their QR factor, which is written
    torch.testing.assert_close(again(h), module(h), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, folder", [("LoReFT", "pyreft_saved"), ("DiReFT", "pyreft_saved_nodireft")])
def test_the_files_are_those_that_pyreft_wrote(gpt2, tmp_path, kind, folder):
    """The same keys, shapes and settings as in the folders of tests/reference, which pyreft saved."""
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(layer, "last"): _kind(kind)(D, 3) for layer in (0, 2)})
    ours = rl.storage.save_pyreft(reft, tmp_path, gpt2)
    theirs = json.loads((HERE / folder / "config.json").read_text())
    told = json.loads((ours / "config.json").read_text())
    del theirs["transformers_version"]
    assert told == theirs | {"intervention_dimensions": [D, D]}
    assert {p.name for p in ours.iterdir()} == {p.name for p in (HERE / folder).iterdir()} | {"reftlens.json"}
    for path in (HERE / folder).glob("*.bin"):
        a, b = (torch.load(f / path.name, weights_only=True) for f in (ours, HERE / folder))
        assert {k: tuple(t.shape) for k, t in a.items()} == {
            k: tuple(D if n == 24 else n for n in t.shape) for k, t in b.items()
        }


def test_two_edits_of_one_place_are_told_apart_as_pyreft_does(gpt2, tmp_path):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "first"): rl.LoReFT(D, 2), rl.resid_post(1, "last"): rl.LoReFT(D, 2)})
    told = json.loads((rl.storage.save_pyreft(reft, tmp_path, gpt2) / "config.json").read_text())
    assert told["sorted_keys"] == [f"layer_1_comp_block_output_unit_pos_nunit_1#{i}" for i in (0, 1)]
    assert rl.storage.load_pyreft(tmp_path).sites == reft.sites
    given = rl.storage.load_pyreft(tmp_path, positions=["f2", "l2"], dropout=0.1)
    assert [s.positions for s in given.sites] == [rl.positions.First(2), rl.positions.Last(2)]
    assert given[0].dropout.p == 0.1


def test_a_folder_of_pyreft_itself_wants_positions_and_a_mixed_one_is_refused(gpt2, tmp_path):
    import reftlens as rl

    with pytest.raises(ValueError, match="stores no positions: pass positions="):
        rl.storage.load_pyreft(HERE / "pyreft_saved")
    reft = rl.ReFT({rl.resid_post(1, "first"): rl.LoReFT(D, 2)})
    folder = rl.storage.save_pyreft(reft, tmp_path, gpt2)
    (folder / "reftlens.json").write_text(json.dumps({"layer_9": {}}))
    with pytest.raises(ValueError, match="record of other interventions"):
        rl.storage.load_pyreft(folder)


def _refused(sites, model, tmp_path, match):
    import reftlens as rl

    target = tmp_path / "refused"
    with pytest.raises(ValueError, match=match):
        rl.storage.save_pyreft(rl.ReFT(sites), target, model)
    assert not target.exists()


def test_what_pyreft_cannot_say_is_refused_with_the_reason(gpt2, tmp_path):
    import reftlens as rl

    lo = rl.LoReFT(D, 2)
    _refused({rl.resid_post(1, "last"): rl.SteeringVector(D)}, gpt2, tmp_path, "SteeringVector .* none of pyreft's")
    _refused({rl.resid_post(1, "last"): rl.DAS(D, 1)}, gpt2, tmp_path, "DAS at .* none of pyreft's")
    gated = rl.interventions.Gated(rl.LoReFT(D, 2), rl.interventions.HardConcrete())
    _refused({rl.resid_post(1, "last"): gated}, gpt2, tmp_path, "none of pyreft's")
    for site in (rl.resid_mid(1, "last"), rl.final_norm("last"), rl.attn_z(1, "last")):
        _refused({site: lo}, gpt2, tmp_path, "has no name in pyreft's files")
    relu = rl.LoReFT(D, 2, activation="relu")
    _refused({rl.resid_post(1, "last"): relu}, gpt2, tmp_path, "activation='relu', which pyreft does not store")
    _refused({rl.resid_post(1, "last"): lo, rl.resid_post(2, "last"): lo}, gpt2, tmp_path, "several sites, .*a copy")
    _refused({rl.resid_post(1, "last"): rl.LoReFT(D - 1, 2)}, gpt2, tmp_path, "width 32")
    _refused({rl.attn_z(1, "last", [0]): rl.LoReFT(architectures.D_HEAD, 2)}, gpt2, tmp_path, "heads .*no name")
    broken = rl.LoReFT(D, 2)
    with torch.no_grad():
        broken.W[0, 0] = torch.nan
    with pytest.raises(rl.errors.NotFinite, match="LoReFT: weight"):
        rl.storage.save_pyreft(rl.ReFT({rl.resid_post(1, "last"): broken}), tmp_path, gpt2)


def test_outputs_after_a_norm_are_not_the_attention_output_of_pyreft(tmp_path):
    import reftlens as rl

    model = architectures.bridge("gemma2")
    _refused({rl.attn_out(1, "last"): rl.LoReFT(D, 2)}, model, tmp_path, "before any norm after them")
    site = rl.Site("blocks.1.attn.hook_out", "last")
    told = rl.storage.save_pyreft(rl.ReFT({site: rl.LoReFT(D, 2)}), tmp_path / "a", model) / "config.json"
    assert json.loads(told.read_text())["representations"][0][:2] == [1, "attention_output"]


def test_writing_draws_no_random_numbers(gpt2, tmp_path):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.interventions.ConsReFT(D, 2)})
    state = torch.random.get_rng_state()
    first = rl.storage.save_pyreft(reft, tmp_path / "a", gpt2)
    assert torch.equal(torch.random.get_rng_state(), state)
    second = rl.storage.save_pyreft(reft, tmp_path / "b", gpt2)
    a, b = (torch.load(next(f.glob("*.bin")), weights_only=True) for f in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a)
