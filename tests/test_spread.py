"""A model that `device_map` has spread over memory and disk: the same numbers as the model that is whole in memory."""

import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import transformers

import architectures

ON_DISK = {
    "llama": ["model.embed_tokens", "model.layers.1", "model.norm", "lm_head"],
    "gpt2": ["transformer.wpe", "transformer.h.1", "transformer.ln_f"],  # its embeddings are its unembedding, too
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
KINDS = list(ON_DISK)
pytestmark = pytest.mark.usefixtures("doubles")


@cache
def folder(architecture):
    path = mkdtemp()
    architectures.hf_model(architecture).double().save_pretrained(path)
    return path


def loaded(architecture, **settings):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder(architecture), dtype=torch.float64, attn_implementation="eager", **settings).eval()


def on_disk(architecture):
    """The model, some of its parts on disk."""
    named = dict(architectures.hf_model(architecture).named_modules())
    children = {f"{BLOCKS[architecture]}.{i}" for i in range(architectures.LAYERS)}
    stem = BLOCKS[architecture].split(".")[0]
    children |= {n for n in named if n.startswith(f"{stem}.") and n.count(".") == 1 and n != BLOCKS[architecture]}
    places = {name: "disk" if name in ON_DISK[architecture] else "cpu" for name in (*children, "lm_head")}
    return loaded(architecture, device_map=places, offload_folder=mkdtemp())


@cache
def bridges(architecture):
    """The bridge of the whole model and that of the spread one."""
    import reftlens as rl

    made = [make(architecture) for make in (loaded, on_disk)]
    return [rl.load_model(model, tokenizer=architectures.tokenizer()) for model in made]


def away(root):
    return {name for name, p in root.named_parameters() if p.is_meta}


def edit():
    import reftlens as rl

    d = architectures.D
    reft = rl.ReFT({rl.resid_post(0, "f1+l1"): rl.LoReFT(d, rank=2), rl.mlp_out(1, "last"): rl.DiReFT(d, rank=2)})
    reft.reset(seed=0)
    return reft


def rows(bridge):
    import reftlens as rl

    pairs = [("the cat sat", " on the mat"), ("a dog ran", " by the moon and looked"), ("the", " hill")]
    return rl.encode(bridge, [rl.Example(*pair) for pair in pairs])


def trained(bridge, **settings):
    import reftlens as rl

    reft = edit()
    return reft, rl.fit(reft, bridge, rows(bridge), steps=4, lr=2e-2, progress=False, **settings)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("architecture", KINDS)
def test_training_gives_the_numbers_of_the_whole_model_and_leaves_the_model_where_it_was(architecture, reuse):
    whole, spread = bridges(architecture)
    before = away(spread.original_model)
    assert len(before) > 8
    (one, first), (other, second) = (trained(bridge, reuse=reuse) for bridge in (whole, spread))
    assert first.losses == second.losses and first.losses[-1] < first.losses[0]
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert ("light cone" in second.computation) == reuse and first.computation == second.computation
    assert away(spread.original_model) == before
    assert all(p.requires_grad for p in spread.original_model.parameters())


@pytest.mark.parametrize("architecture", KINDS)
def test_texts_states_and_prefilled_prompts_are_those_of_the_whole_model(architecture):
    import reftlens as rl

    prompts, decoding = ["the cat", "a dog ran by"], rl.Decoding(max_new_tokens=5)
    found = []
    for bridge in bridges(architecture):
        reft = edit()
        read = rl.generation.prefill(reft, bridge, prompts)
        texts = [rl.generate(reft, bridge, p, decoding, variant=4.0).texts for p in (prompts, read)]
        states = rl.activations(bridge, rows(bridge), rl.resid_post(2, "all"), progress=False)
        found.append((texts, states, rl.evaluate(reft, bridge, rows(bridge), progress=False).loss))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1:], found[1][1:]))


@pytest.mark.parametrize("architecture", KINDS)
def test_an_edit_is_saved_on_one_and_loaded_on_the_other(architecture, tmp_path):
    import reftlens as rl

    whole, spread = bridges(architecture)
    rl.save(edit(), tmp_path / "a", spread)
    rl.save(rl.load(tmp_path / "a", whole), tmp_path / "b", whole)
    rl.load(tmp_path / "b", spread)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_plain_model_is_edited_where_it_is(architecture):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "f1+l1"): rl.LoReFT(architectures.D, rank=2)})
    reft.reset(seed=0)
    ids, found = torch.arange(6, 20).view(2, 7), []
    for model in (loaded(architecture), on_disk(architecture)):
        with torch.no_grad(), rl.attach(reft, model):
            found.append((model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)))
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, found[-1][0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("architecture", KINDS)
def test_the_merged_model_holds_the_weights_that_are_on_disk(architecture, tmp_path):
    import reftlens as rl

    reft = rl.ReFT({rl.mlp_out(1, "all"): rl.interventions.RED(architectures.D)})
    for name, bridge in zip("ab", bridges(architecture), strict=True):
        rl.storage.save_merged(reft, tmp_path / name, bridge)
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_of_weights_that_is_written_to_is_noticed():
    from reftlens.bridge.weights import kept_by, weights_state

    bridge = bridges("llama")[1]
    before, (_, files) = weights_state(bridge), kept_by(bridge.original_model)
    assert len({*files}) > 0 and all(Path(file).exists() for file in files)
    assert weights_state(bridge) == before
    os.utime(files[0], ns=(1, 1))
    assert weights_state(bridge) != before


def test_weights_that_are_kept_in_memory_are_read_there():
    import accelerate

    import reftlens as rl
    from reftlens.bridge.weights import kept_by, weights_state

    moved = accelerate.cpu_offload(loaded("llama"), execution_device=torch.device("cpu"))
    bridge = rl.load_model(moved, tokenizer=architectures.tokenizer())
    assert away(moved) and not kept_by(moved)[1]
    before, kept = weights_state(bridge), kept_by(moved)[0]
    kept[-1].mul_(2)
    assert weights_state(bridge) != before


def test_what_cannot_be_done_with_a_spread_model_is_refused(monkeypatch):
    import reftlens as rl
    from reftlens.cone.body import Body

    with pytest.raises(ValueError, match=r"spread over cpu, disk: leave device out"):
        rl.load_model(on_disk("llama"), tokenizer=architectures.tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="methods train copies"):
        rl.experiments.methods.Subject(on_disk("llama"), tokenizer=architectures.tokenizer())
    bridge = bridges("llama")[1]
    assert Body(bridge).obstacle() == ""
    hooked = [m for m in bridge.original_model.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    with pytest.raises(ValueError, match="load the model without a device_map that offloads"):
        rl.subspaces.weight_overlap(edit(), bridge, site=0)
    monkeypatch.setattr(hooked[-1]._hf_hook, "execution_device", torch.device("cuda", 1))
    assert Body(bridge).obstacle() == "the model is spread over several devices"
