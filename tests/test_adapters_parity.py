"""On equal weights an edited encoder gives what `adapters`' ReFTs give, and its gradients (tests/reference)."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import architectures

HERE = Path(__file__).parent / "reference"
MODELS = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}
POSITIONS = {"tied": ("f2+l1",), "untied": ("f2", "l1"), "prefix": ("f2",)}
KINDS = ("LoReFT", "NoReFT", "DiReFT")


@cache
def _reference(family):
    """What `adapters` was given and gave, by key."""
    return load_file(HERE / f"adapters_{family}.safetensors")


@cache
def _bridge(family):
    """The encoder that `adapters` ran, under a head that nothing here reads."""
    import reftlens as rl

    sizes = json.loads((HERE / "adapters.json").read_text())["configs"][family]
    model = getattr(transformers, MODELS[family])
    plain = model(model.config_class(**sizes)).eval()
    stored = {k.removeprefix("model."): v for k, v in _reference(family).items() if k.startswith("model.")}
    plain.base_model.load_state_dict(stored)
    return rl.load_model(plain.double(), tokenizer=architectures.tokenizer())


def _batch(family):
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    tokens, mask = _reference(family)["tokens"], _reference(family)["mask"].bool()
    ids = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    return batch_from_rows(ids, [[int(TokenRole.PROMPT)] * len(row) for row in ids])


def _stored(family, name):
    return {k.removeprefix(f"{name}."): v for k, v in _reference(family).items() if k.startswith(f"{name}.")}


@torch.no_grad()
def _reft(kind, place, stored):
    """The edits with the weights of `adapters`, whose units stand in the order of the positions."""
    import reftlens as rl

    sites = {}
    for layer in (0, 1):
        for unit, positions in enumerate(POSITIONS[place]):
            B, W, b = (stored[f"{layer}.{unit}.{name}"] for name in "BWb")
            module = rl.interventions.KINDS[kind](W.shape[1], len(W)).double()
            module.W.copy_(W)
            module.b.copy_(b)
            if module.frame is None:
                module.W2.copy_(B)
            else:
                module.frame.set(B.T)
            sites[rl.resid_post(layer, positions)] = module
    return rl.ReFT(sites)


def _states(family, reft, strength=1.0):
    """The last hidden states."""
    import reftlens as rl

    batch, bridge, found = _batch(family), _bridge(family), {}
    with reft.on(bridge, batch, rl.Variant(strength)):
        reader = bridge.blocks[1].hook_out.register_forward_hook(lambda module, args, out: found.update(h=out))
        bridge(batch.tokens, attention_mask=batch.attention_mask.long())
        reader.remove()
    return found["h"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("place", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_equal_weights_an_encoder_is_edited_as_by_adapters(family, place, kind):
    stored, reference = _stored(family, f"{kind}-{place}"), _reference(family)
    reft, real = _reft(kind, place, stored), reference["mask"].bool()
    states = _states(family, reft)
    assert torch.allclose(states[real], stored["states"][real], atol=1e-10)
    assert (stored["states"] - reference["base"])[real].abs().max() > 0.1  # the edit is no small thing
    trained = [parameter for module in reft.distinct for parameter in (module.W, module.b)]
    gradients = torch.autograd.grad((states[:, 0] * reference["weight"]).sum(), trained)
    wanted = [
        stored[f"{layer}.{u}.{n}.gradient"] for layer in (0, 1) for u in range(len(POSITIONS[place])) for n in "Wb"
    ]
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_without_an_edit_or_at_other_positions_it_is_not_what_adapters_gave(family):
    import reftlens as rl

    reference, real = _reference(family), _reference(family)["mask"].bool()
    stored = _stored(family, "LoReFT-tied")
    reft = _reft("LoReFT", "tied", stored)
    modules = enumerate(module for _, module in reft.items())
    elsewhere = rl.ReFT({rl.resid_post(layer, "f1+l1"): module for layer, module in modules})
    assert (_states(family, elsewhere) - stored["states"])[real].abs().max() > 0.01
    assert torch.allclose(_states(family, reft, strength=0.0)[real], reference["base"][real], atol=1e-10)
