"""Control vectors: what gguf reads back, added to every token's hidden states, is what the edit does; else refused."""

import gguf
import numpy as np
import pytest
import torch

import architectures

D = architectures.D
TEXTS = ["the cat sat on the mat and looked at the moon", "a dog ran"]


def _read(path):
    """The vectors by block, and the keys, as another program finds them."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {int(t.name.removeprefix("direction.")): torch.from_numpy(np.array(t.data)) for t in reader.tensors}, keys


def _steered(model, batch, vectors, scale=1.0):
    """Logits as llama.cpp computes them: `scale · direction.N` added to what block N gives, of every token."""
    hooks = [(f"blocks.{n}.hook_resid_post", lambda h, hook, v=v: h + scale * v) for n, v in vectors.items()]
    with torch.no_grad():
        return model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask.long(), fwd_hooks=hooks)


def _edited(reft, model, batch, variant):
    with torch.no_grad(), reft.eval().on(model, batch, variant):
        return model(batch.tokens, attention_mask=batch.attention_mask.long())


def _kinds():
    import reftlens as rl

    shared = torch.linalg.qr(torch.randn(D, 2))[0]
    same = rl.LoReFT(D, 2)  # W = R: it reads h and takes as much away
    with torch.no_grad():
        same.frame.set(shared)
        same.W.copy_(same.basis().T)
    return {
        "SteeringVector": rl.SteeringVector(D, torch.randn(D)),
        "LobiReFT": rl.interventions.LobiReFT(D, 3),
        "LobiReFT dropout": rl.interventions.LobiReFT(D, 3, dropout=0.5),
        "Noise": rl.interventions.Noise(D, 0.5),
        "LoReFT, bias alone": same,
        "identity": rl.LoReFT(D, 2, init="identity"),
    }


KINDS = ("SteeringVector", "LobiReFT", "LobiReFT dropout", "Noise", "LoReFT, bias alone", "identity")


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_adds_what_the_edit_adds(tmp_path, kind, architecture):
    import reftlens as rl

    model = architectures.bridge(architecture)
    batch, strength = rl.encode_prompts(model, TEXTS), 0.7
    reft = rl.ReFT({rl.resid_post(1, "all"): _kinds()[kind], rl.resid_post(2, "all"): rl.SteeringVector(D)}).train()
    path = rl.storage.save_control_vector(reft, tmp_path / "v.gguf", model, variant=strength)
    assert reft.training and reft[0].dropout.training
    vectors, keys = _read(path)
    assert keys["general.architecture"] == "controlvector" and keys["controlvector.layer_count"] == 2
    assert keys["controlvector.model_hint"] == model.original_model.config.model_type
    assert sorted(vectors) == [1, 2] and all(v.dtype == torch.float32 and v.shape == (D,) for v in vectors.values())
    edited = _edited(reft, model, batch, rl.Variant(strength))
    # float32: h + (c·s) and h + s·code·basis round differently
    assert (_steered(model, batch, vectors) - edited)[batch.attention_mask].abs().max() < 2e-5
    moved = (edited - _steered(model, batch, {}))[batch.attention_mask].abs().max()
    assert moved < 1e-5 if kind == "identity" else moved > 1e-2


def test_strengths_sites_and_several_edits_of_one_block(tmp_path, gpt2):
    import reftlens as rl

    a, b, c = torch.randn(3, D)
    steer = rl.SteeringVector
    first = rl.ReFT({rl.resid_post(1, "all"): steer(D, a)})
    both = rl.ReFT({rl.resid_post(1, "all"): steer(D, b), rl.resid_post(2, "all"): steer(D, c)})
    joined = first | both  # the second edit of block 1 stands at All() | All(), the same tokens
    vectors, _ = _read(rl.storage.save_control_vector(joined, tmp_path / "v.gguf", gpt2, variant=-2))
    torch.testing.assert_close(vectors[1], -2 * (a + b))
    torch.testing.assert_close(vectors[2], -2 * c)
    vectors, _ = _read(
        rl.storage.save_control_vector(joined, tmp_path / "v.gguf", gpt2, variant=rl.Variant(1, None, [1, 2]))
    )
    torch.testing.assert_close(vectors[1], b)
    lobi = rl.interventions.LobiReFT(D, 2)
    one = rl.ReFT({rl.resid_post(1, "all"): lobi})
    vectors, _ = _read(rl.storage.save_control_vector(one, tmp_path / "v.gguf", gpt2, variant=rl.Variant((0.5, 2.0))))
    with torch.no_grad():
        torch.testing.assert_close(vectors[1], lobi.basis() @ (lobi.b * torch.tensor([0.5, 2.0])))


def _refused(site, module, model, tmp_path, match, **kwargs):
    import reftlens as rl

    path = tmp_path / "v.gguf"
    with pytest.raises(ValueError, match=match):
        rl.storage.save_control_vector(rl.ReFT({site: module}), path, model, **kwargs)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["LoReFT", "DiReFT", "OrthoDiReFT", "NoReFT", "ConsReFT"])
def test_what_reads_the_hidden_state_is_no_constant(gpt2, tmp_path, kind):
    import reftlens as rl

    module = getattr(rl.interventions, kind)(D, 3)
    _refused(rl.resid_post(1, "all"), module, gpt2, tmp_path, f"{kind} at .* is no constant: it adds h A")


@pytest.mark.parametrize("kind", ["DAS", "relu", "r1"])
def test_what_is_not_affine_or_has_a_source_is_no_constant(gpt2, tmp_path, kind):
    import reftlens as rl

    module = {
        "DAS": lambda: rl.DAS(D, 1),
        "relu": lambda: rl.DiReFT(D, 2, activation="relu"),
        "r1": lambda: rl.interventions.ReFTr1(D),
    }[kind]()
    site = rl.resid_post(1, "prompt" if kind == "r1" else "all")
    match = "acts at" if kind == "r1" else f"{module.kind} at .* is no constant: .* depends on the hidden state"
    _refused(site, module, gpt2, tmp_path, match)


def test_places_and_positions_that_llama_cpp_does_not_know_are_refused(gpt2, tmp_path):
    import reftlens as rl

    vector = rl.SteeringVector(D, torch.randn(D))
    _refused(rl.resid_post(0, "all"), vector, gpt2, tmp_path, "output of block 0, .* from block 1 on")
    for site in (rl.resid_pre(1, "all"), rl.mlp_out(1, "all"), rl.attn_out(1, "all"), rl.final_norm("all")):
        _refused(site, vector, gpt2, tmp_path, "is not the output of a block")
    for positions in ("last", "prompt", "f1+l1"):
        _refused(rl.resid_post(1, positions), vector, gpt2, tmp_path, "acts at .*every token")
    _refused(rl.resid_post(1, "all"), vector, gpt2, tmp_path, "some tokens only", variant=rl.Variant(1, "last"))


def test_processed_weights_and_other_objects_are_refused(tmp_path, gpt2):
    import reftlens as rl

    model = architectures.fresh_bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    vector = rl.SteeringVector(D, torch.randn(D))
    _refused(rl.resid_post(1, "all"), vector, model, tmp_path, "compatibility mode")
    narrow = rl.SteeringVector(D - 1, torch.randn(D - 1))
    _refused(
        rl.resid_post(1, "all"), narrow, gpt2, tmp_path, f"width {D}, and its SteeringVector was made for d={D - 1}"
    )
    with pytest.raises(TypeError):  # jaxtyping's own, where it looks first
        rl.storage.save_control_vector(vector, tmp_path / "v.gguf", gpt2)
    with pytest.raises(ValueError, match="is a folder"):
        rl.storage.save_control_vector(rl.ReFT({rl.resid_post(1, "all"): vector}), tmp_path, gpt2)
