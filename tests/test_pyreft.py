"""Files that pyreft 0.1.0 wrote give here the logits that pyreft itself computed (tests/reference)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

import architectures

HERE = Path(__file__).parent / "reference"
CASES = {"pyreft_saved": ("logits", "LoReFT"), "pyreft_saved_nodireft": ("nodireft_logits", "DiReFT")}
KEYS = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0" for layer in (0, 2)]


def _plain():
    config = json.loads((HERE / "pyreft_saved_model.json").read_text())
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    model.load_state_dict(load_file(HERE / "pyreft_saved_model.safetensors"))
    return model


@pytest.fixture(scope="module")
def reference():
    """The bridge of the model that pyreft ran, its input and what it computed."""
    model = _plain()
    model.config.architectures = ["GPT2LMHeadModel"]
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=model, tokenizer=architectures.tokenizer(), device="cpu"
    )
    return bridge.eval(), load_file(HERE / "pyreft_saved_outputs.safetensors")


@pytest.fixture
def batch(reference):
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    ids = reference[1]["input_ids"].tolist()
    return batch_from_rows(ids, [[int(TokenRole.PROMPT)] * len(row) for row in ids])


def _logits(reft, reference, batch):
    with torch.no_grad(), reft.on(reference[0], batch):
        return reference[0](batch.tokens, attention_mask=batch.attention_mask.long())


def _copy(folder, tmp_path, **changes):
    """A copy of a reference folder with changes to its config.json."""
    target = tmp_path / "copy"
    shutil.copytree(HERE / folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_the_unedited_model_is_the_one_that_pyreft_ran(reference, batch):
    with torch.no_grad():
        logits = reference[0](batch.tokens, attention_mask=batch.attention_mask.long())
    # float32, other versions of torch and transformers: the order of summation
    assert (logits - reference[1]["base_logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("folder", CASES)
def test_logits_are_those_that_pyreft_computed(reference, batch, folder):
    import reftlens as rl

    key, kind = CASES[folder]
    reft = rl.storage.load_pyreft(HERE / folder, positions="last")
    assert [s.hook for s in reft.sites] == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    assert [m.kind for _, m in reft.items()] == [kind] * 2 and not reft.training
    # as above; the twin: pyreft's edit moves the last logits by far more than that, and no others
    assert (_logits(reft, reference, batch) - reference[1][key]).abs().max() < 1e-5
    moved = (reference[1][key] - reference[1]["base_logits"]).abs()
    assert moved[:, -1].max() > 1e-1 and moved[:, :-1].max() < 1e-5


@pytest.mark.parametrize("folder", CASES)
def test_it_runs_on_the_plain_model_too_and_survives_our_own_store(reference, batch, folder, tmp_path):
    import reftlens as rl

    reft = rl.storage.load_pyreft(HERE / folder, positions="last")
    plain = _plain()
    with torch.no_grad(), rl.attach(reft, plain, batch=batch):
        assert (plain(batch.tokens).logits - reference[1][CASES[folder][0]]).abs().max() < 1e-5
    again = rl.load(rl.save(reft, tmp_path, reference[0]), reference[0])
    assert torch.equal(_logits(again, reference, batch), _logits(reft, reference, batch))


def test_other_positions_give_other_logits(reference, batch):
    """The positions are the user's to give: pyreft does not store them."""
    import reftlens as rl

    reft = rl.storage.load_pyreft(HERE / "pyreft_saved", positions="first")
    assert (_logits(reft, reference, batch) - reference[1]["logits"]).abs().max() > 1e-2


def test_a_list_of_positions_has_one_for_each_intervention(reference, batch):
    import reftlens as rl

    same = rl.storage.load_pyreft(HERE / "pyreft_saved", positions=["last", rl.positions.Last(1)])
    assert (_logits(same, reference, batch) - reference[1]["logits"]).abs().max() < 1e-5
    mixed = rl.storage.load_pyreft(HERE / "pyreft_saved", positions=["first", rl.positions.parse("l2")])
    assert [s.positions for s in mixed.sites] == [rl.positions.First(1), rl.positions.Last(2)]
    with pytest.raises(ValueError, match="3 positions for the 2 interventions"):
        rl.storage.load_pyreft(HERE / "pyreft_saved", positions=["last"] * 3)


def test_two_interventions_of_one_layer_need_positions_of_their_own(tmp_path):
    """An untied prefix and suffix: pyreft tells them apart by the number after #."""
    import reftlens as rl

    twice = _copy("pyreft_saved", tmp_path, sorted_keys=[KEYS[0], KEYS[0].replace("#0", "#1")])
    shutil.copy(twice / f"intkey_{KEYS[1]}.bin", twice / f"intkey_{KEYS[0].replace('#0', '#1')}.bin")
    with pytest.raises(ValueError, match=r"two interventions at blocks.0.hook_resid_post.*list of positions"):
        rl.storage.load_pyreft(twice, positions="last")
    reft = rl.storage.load_pyreft(twice, positions=["first", "last"])
    assert len(reft) == 2 and not torch.equal(reft[0].W, reft[1].W)


def test_activation_and_dropout_are_the_users_to_give(reference, batch):
    """pyreft's own load forgets them and computes something else without a word."""
    import reftlens as rl

    reft = rl.storage.load_pyreft(HERE / "pyreft_saved", positions="last", activation="relu", dropout=0.25)
    assert reft[0].settings()["activation"] == "relu" and reft[0].dropout.p == 0.25
    assert (_logits(reft, reference, batch) - reference[1]["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("folder", CASES)
@pytest.mark.parametrize(
    "stored, kept", [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_the_numbers_of_the_file_are_kept_whatever_their_dtype(tmp_path, folder, stored, kept):
    import reftlens as rl

    target = _copy(folder, tmp_path)
    path = target / f"intkey_{KEYS[0]}.bin"
    # As pyreft does: the rotation stays float32 where W and b are bfloat16.
    tensors = {
        name: tensor
        if not isinstance(tensor, torch.Tensor) or (name == "rotate_layer" and stored == torch.bfloat16)
        else tensor.to(stored)
        for name, tensor in torch.load(path, weights_only=True).items()
    }
    torch.save(tensors, path)
    module = rl.storage.load_pyreft(target, positions="last")[0]
    assert {p.dtype for p in module.parameters()} == {kept}
    names = ("weight", "bias") if folder == "pyreft_saved" else ("learned_source.weight", "learned_source.bias")
    assert torch.equal(module.W, tensors[names[0]].to(kept)) and torch.equal(module.b, tensors[names[1]].to(kept))


def test_a_file_of_a_cuda_machine_is_read_here(monkeypatch):
    """style.md: pyreft maps every file to cuda:0."""
    import reftlens as rl

    places, real = [], torch.load

    def spying(*args, **kwargs):
        places.append((kwargs["map_location"], kwargs["weights_only"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spying)
    rl.storage.load_pyreft(HERE / "pyreft_saved", positions="last")
    assert places == [("cpu", True)] * 2


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    import pickle

    import reftlens as rl

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    target = _copy("pyreft_saved", tmp_path)
    torch.save({"weight": Evil()}, target / f"intkey_{KEYS[0]}.bin")
    with pytest.raises(pickle.UnpicklingError):
        rl.storage.load_pyreft(target, positions="last")


@pytest.mark.parametrize("name", ["SubloreftIntervention", "Evil"])
def test_a_class_that_is_not_read_is_refused_even_where_its_tensors_look_alike(tmp_path, name):
    import reftlens as rl

    target = _copy("pyreft_saved", tmp_path, intervention_types=[f"<class 'pyreft.interventions.{name}'>"] * 2)
    with pytest.raises(ValueError, match=f"files of {name} are not read"):
        rl.storage.load_pyreft(target, positions="last")


def test_a_class_whose_tensors_are_not_in_the_file_is_refused(tmp_path):
    import reftlens as rl

    kinds = ["<class 'pyreft.interventions.NoreftIntervention'>"] * 2
    with pytest.raises(ValueError, match=r"NoreftIntervention has no learned_source.bias, .*it has bias, rotate_layer"):
        rl.storage.load_pyreft(_copy("pyreft_saved", tmp_path, intervention_types=kinds), positions="last")


def test_a_noreft_file_is_read_as_noreft(tmp_path):
    """It has the tensors of a NodiReFT file; the class alone tells them apart."""
    import reftlens as rl

    kinds = ["<class 'pyreft.interventions.NoreftIntervention'>"] * 2
    target = _copy("pyreft_saved_nodireft", tmp_path, intervention_types=kinds)
    module = rl.storage.load_pyreft(target, positions="last")[0]
    tensors = torch.load(target / f"intkey_{KEYS[0]}.bin", weights_only=True)
    w2, w, b = (tensors[n] for n in ("proj_layer.weight", "learned_source.weight", "learned_source.bias"))
    h = torch.randn(5, 24)
    # float32: our linear case is one product where the formula has two
    assert module.kind == "NoReFT" and (module(h) - (h + (h @ w.T + b - h @ w2.T) @ w2)).abs().max() < 1e-5


def test_a_bias_of_the_projection_is_refused(tmp_path):
    import reftlens as rl

    target = _copy("pyreft_saved_nodireft", tmp_path)
    path = target / f"intkey_{KEYS[0]}.bin"
    torch.save({**torch.load(path, weights_only=True), "proj_layer.bias": torch.zeros(24)}, path)
    with pytest.raises(ValueError, match="add_bias=True"):
        rl.storage.load_pyreft(target, positions="last")


@pytest.mark.parametrize(
    "component, hook",
    [
        ("block_output", "blocks.2.hook_resid_post"),
        ("block_input", "blocks.2.hook_resid_pre"),
        ("attention_output", "blocks.2.hook_attn_out"),
        ("mlp_output", "blocks.2.hook_mlp_out"),
    ],
)
@pytest.mark.parametrize("dots", [False, True], ids=["underscores", "dots, as older files have"])
def test_components_have_their_hooks(reference, tmp_path, component, hook, dots):
    import reftlens as rl

    key = f"layer_2_comp_{component}_unit_pos_nunit_1#0"
    key = key.replace("_", ".").replace(component.replace("_", "."), component) if dots else key
    kinds = ["<class 'pyreft.interventions.LoreftIntervention'>"]
    target = _copy("pyreft_saved", tmp_path, sorted_keys=[key], intervention_types=kinds)
    shutil.copy(target / f"intkey_{KEYS[0]}.bin", target / f"intkey_{key}.bin")
    reft = rl.storage.load_pyreft(target, positions="last")
    assert [s.hook for s in reft.sites] == [hook]
    rl.training.preflight(reft, reference[0])


@pytest.mark.parametrize(
    "key",
    [
        "layer_0_comp_head_attention_value_output_unit_h.pos_nunit_1#0",
        "layer_0_comp_value_output_unit_pos_nunit_1#0",
        "layer_0_comp_block_output_unit_h_nunit_1#0",
        "comp_model.layers[0].output_unit_pos_nunit_1#0",
        "layer_0_comp_block_output_unit_pos_nunit_1#0/../../x",
    ],
)
def test_a_component_or_unit_without_a_counterpart_is_refused(tmp_path, key):
    import reftlens as rl

    target = _copy("pyreft_saved", tmp_path, sorted_keys=[key, KEYS[1]])
    with pytest.raises(ValueError, match=r"cannot place 'l?.*block_output"):
        rl.storage.load_pyreft(target, positions="last")


@pytest.mark.parametrize("name", ["DireftIntervention", "ConsreftIntervention", "LobireftIntervention"])
def test_a_rotation_that_torch_parametrised_is_read_as_what_it_is(tmp_path, name):
    """pyreft stores all its rotations but LoReFT's that way; the formulas and outputs are pyreft's own."""
    from torch.nn.utils.parametrizations import orthogonal

    import reftlens as rl

    known = load_file(HERE / "pyreft_functions.safetensors")
    R, b, h, out = (known[f"{name}.{key}"] for key in ("R", "b", "h", "out"))
    layer = torch.nn.Linear(3, 24, bias=False)
    orthogonal(layer)
    with torch.no_grad():  # as training leaves it: the free matrix away from its start, beside a base
        free = layer.parametrizations.weight.original.add_(0.3 * torch.randn(24, 3).tril(-1)).clone()
        turned = layer.parametrizations.weight[0].base.T @ layer.weight
        here, there = (torch.linalg.qr(torch.cat([x, torch.randn(24, 21)], dim=1))[0] for x in (turned, R))
        here[:, :3], there[:, :3] = turned, R
    parts = "rotate_layer.parametrizations.weight"
    state = {f"{parts}.original": free, f"{parts}.0.base": there @ here.T}  # the base that turns it into R
    if name == "DireftIntervention":
        state |= {"learned_source.weight": known[f"{name}.W"], "learned_source.bias": b}
    else:
        state |= {"learned_source": b}
    target = _copy("pyreft_saved", tmp_path, intervention_types=[f"<class 'pyreft.interventions.{name}'>"] * 2)
    for key in KEYS:
        torch.save(state | {"embed_dim": torch.tensor(24)}, target / f"intkey_{key}.bin")
    module = rl.storage.load_pyreft(target, positions="last")[0]
    # float32: R comes back through three products
    assert (module.basis() - R).abs().max() < 1e-5 and (module(h) - out).abs().max() < 1e-5


def test_reading_draws_no_random_numbers(reference):
    import reftlens as rl

    state = torch.random.get_rng_state()
    rl.storage.load_pyreft(HERE / "pyreft_saved", positions="last")
    assert torch.equal(torch.random.get_rng_state(), state)
