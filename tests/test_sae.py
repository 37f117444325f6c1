"""SAEs that sae-lens 6.54.12 saved (tests/data) give here the latents and outputs that it computed itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import architectures
import reftlens as rl

HERE = Path(__file__).parent / "data"
SAES = {
    "standard": ("relu", None),
    "standard_raw_input": ("relu", None),
    "jumprelu": ("jumprelu", None),
    "topk": ("topk", 6),
    "batchtopk": ("jumprelu", None),
}
OUTPUTS = load_file(HERE / "sae_lens_outputs.safetensors")


def _copy(name, tmp_path, drop=(), tensors=None, **changes):
    """A copy of a folder with changes to its cfg.json and its tensors."""
    target = tmp_path / "copy"
    shutil.copytree(HERE / f"sae_lens_{name}", target)
    cfg = json.loads((target / "cfg.json").read_text())
    (target / "cfg.json").write_text(json.dumps({k: v for k, v in (cfg | changes).items() if k not in drop}))
    if tensors is not None:
        path = target / "sae_weights.safetensors"
        save_file(tensors(load_file(path)), path)
    return target


@pytest.mark.parametrize("name", SAES)
def test_latents_and_outputs_are_those_that_sae_lens_computed(name):
    sae = rl.storage.load_sae(HERE / f"sae_lens_{name}")
    assert (sae.activation, sae.k, sae.hook, sae.model) == (*SAES[name], "blocks.1.hook_resid_post", "tiny")
    mask, h, wanted = sae.mask(), OUTPUTS["h"], OUTPUTS[f"{name}.latents"]
    # float32: another order of summation
    torch.testing.assert_close(mask.latents(h), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mask.reconstruction(h), OUTPUTS[f"{name}.output"], atol=1e-5, rtol=1e-5)
    assert torch.equal(mask.latents(h) > 0, wanted > 0) and 0 < (wanted > 0).float().mean() < 0.6
    others = [n for n in SAES if n != name]
    assert all((mask.latents(h) - OUTPUTS[f"{n}.latents"]).abs().max() > 0.1 for n in others)


def test_a_setting_that_sae_lens_does_not_look_at_changes_nothing(tmp_path):
    """`rescale_acts_by_decoder_norm` is one of top-k: the config class of the others has no such field."""
    sae = rl.storage.load_sae(_copy("jumprelu", tmp_path, rescale_acts_by_decoder_norm=True))
    torch.testing.assert_close(sae.mask().latents(OUTPUTS["h"]), OUTPUTS["jumprelu.latents"], atol=1e-5, rtol=1e-5)


def test_each_setting_and_the_threshold_change_what_is_computed(tmp_path):
    """The twin: a reader that overlooked one of them would not pass above."""
    h = OUTPUTS["h"]
    for name, change in [
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("topk", {"k": 5}),
    ]:
        sae = rl.storage.load_sae(_copy(name, tmp_path, **change))
        assert (sae.mask().reconstruction(h) - OUTPUTS[f"{name}.output"]).abs().max() > 1e-2
        shutil.rmtree(tmp_path / "copy")
    low = _copy("jumprelu", tmp_path, tensors=lambda t: t | {"threshold": t["threshold"] / 2})
    assert (rl.storage.load_sae(low).mask().latents(h) > 0).sum() > (OUTPUTS["jumprelu.latents"] > 0).sum()


@pytest.mark.parametrize("name", SAES)
def test_open_the_mask_exchanges_the_latents_and_keeps_the_error(name):
    mask = rl.storage.load_sae(HERE / f"sae_lens_{name}").mask()
    h = OUTPUTS["h"]
    source = h.roll(1, 0)
    with torch.no_grad():
        mask.logits.fill_(1e4)
    edited = mask(h, source=source[:, None])
    # float32: what sae-lens gives of both, and the error of h beside it
    expected = h - OUTPUTS[f"{name}.output"] + OUTPUTS[f"{name}.output"].roll(1, 0)
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_a_mask_is_stored_with_its_activation(name, gpt2, tmp_path):
    mask = rl.interventions.SAEMask(
        architectures.D,
        torch.randn(architectures.D, 6),
        torch.randn(6, architectures.D),
        activation=name,
        threshold=torch.rand(6) if name == "jumprelu" else None,
        k=2 if name == "topk" else None,
    )
    site = rl.resid_post(1, "last")
    again = rl.load(rl.save(rl.ReFT({site: mask}), tmp_path, gpt2), gpt2)[site]
    h = torch.randn(5, architectures.D)
    assert isinstance(again, rl.interventions.SAEMask) and torch.equal(again.latents(h), mask.latents(h))


def test_training_with_several_seeds_at_once_computes_the_same(gpt2):
    """`fit_many` runs equal kinds under vmap: top-k too."""
    sae = rl.storage.SparseAutoencoder(
        None, None, torch.randn(32, 12), torch.randn(12, 32), torch.zeros(12), torch.zeros(32), "topk", None, 3
    )
    h, source = torch.randn(2, 7, 5, 32)
    masks = [sae.mask() for _ in range(2)]
    with torch.no_grad():
        masks[1].logits.fill_(2.0)
    states = {k: torch.stack([m.state_dict()[k] for m in masks]) for k in masks[0].state_dict()}

    def run(state, h, source):
        return torch.func.functional_call(masks[0], state, (h, 1.0, None, source[..., None, :]))

    together = torch.func.vmap(run)(states, torch.stack([h, h]), torch.stack([source, source]))
    for one, mask in zip(together, masks, strict=True):
        torch.testing.assert_close(one, mask(h, source=source[..., None, :]))


def test_decoders_stand_in_overlap_tables():
    sae = rl.storage.load_sae(HERE / "sae_lens_topk")
    edit = rl.interventions.DAS(16, basis=torch.linalg.qr(sae.decoder[[3, 17]].T)[0])
    table = rl.subspaces.overlap({"edit": edit, "3 and 17": sae.decoder[[3, 17]].T, "4 and 5": sae.decoder[[4, 5]].T})
    assert table.overlap[0, 1] > 1 - 1e-5 and table.overlap[0, 2] < 0.5
    mask = sae.mask()
    with torch.no_grad():
        mask.logits.fill_(-1.0)[[3, 17]] = 1.0
    assert rl.subspaces.overlap({"edit": edit, "open": mask}).overlap[0, 1] > 1 - 1e-5


def test_folders_of_older_versions_are_read(tmp_path):
    """Before sae-lens 6 the architecture was told by the activation, and names stood beside the settings."""
    drop = ("architecture", "metadata", "k")
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}, "normalize_activations": False}
    folder = _copy(
        "topk",
        tmp_path,
        drop,
        lambda t: t | {"scaling_factor": torch.ones(64)},
        hook_point="blocks.0.hook_mlp_out",
        **old,
    )
    sae = rl.storage.load_sae(folder)
    assert (sae.activation, sae.k, sae.hook) == ("topk", 6, "blocks.0.hook_mlp_out")
    torch.testing.assert_close(sae.mask().latents(OUTPUTS["h"]), OUTPUTS["topk.latents"], atol=1e-5, rtol=1e-5)


NORMS = ("expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening", "other")


@pytest.mark.parametrize(
    "name, change, match",
    [
        *[("standard", {"normalize_activations": n}, f"normalize_activations='{n}', which is not read") for n in NORMS],
        ("standard", {"normalize_activations": True}, "expected_average_only_in"),
        ("standard", {"architecture": "gated"}, "architecture 'gated', and those read are standard, jumprelu, topk"),
        ("standard", {"architecture": "transcoder"}, "architecture 'transcoder'"),
        ("standard", {"activation_fn": "tanh-relu"}, "'standard with tanh-relu'"),
        ("standard", {"d_in": 15}, r"W_enc has shape \[16, 64\], expected \[15, 64\]"),
        ("standard", {"architecture": "jumprelu"}, "has no threshold"),
        ("jumprelu", {"architecture": "standard"}, "has threshold, which a standard SAE has not"),
        ("topk", {"k": None}, "tells no k"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, name, change, match):
    with pytest.raises(ValueError, match=match):
        rl.storage.load_sae(_copy(name, tmp_path, **change))


def test_a_scaling_factor_a_missing_file_and_a_processed_model_are_told(tmp_path):
    scaled = _copy("standard", tmp_path, tensors=lambda t: t | {"scaling_factor": 2 * torch.ones(64)})
    with pytest.raises(ValueError, match="scaling_factor"):
        rl.storage.load_sae(scaled)
    (scaled / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no cfg\.json"):
        rl.storage.load_sae(scaled)
    shutil.rmtree(scaled)
    told = {"hook_name": "blocks.0.hook_resid_pre", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with pytest.warns(UserWarning, match="center_writing_weights"):
        rl.storage.load_sae(_copy("standard", tmp_path, metadata=told))


def test_settings_that_do_not_go_together_are_refused():
    eye = torch.eye(4)
    for settings, match in [
        ({"threshold": torch.ones(4)}, "threshold= is of activation='jumprelu'"),
        ({"activation": "jumprelu", "k": 2}, "k= is of activation='topk'"),
        ({"activation": "topk"}, "k=None"),
        ({"activation": "topk", "k": 5}, "k=5, and there are 4 latents"),
        ({"activation": "jumprelu", "threshold": torch.ones(3)}, r"threshold has shape \[3\], expected \[4\]"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            rl.interventions.SAEMask(4, eye, eye, **settings)
    with pytest.raises((ValueError, TypeError)):  # jaxtyping's own, where it looks first
        rl.interventions.SAEMask(4, eye, eye, activation="tanh")
