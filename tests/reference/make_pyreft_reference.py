"""Regenerate the pyreft / pyvene reference data kept in this folder.

It runs the real pyreft and pyvene classes in float32 on a CPU with fixed seeds. pyreft pins
old dependencies, so it gets an environment of its own (Python 3.11):

    python -m venv peers
    peers/bin/pip install torch==2.13.0 transformers==4.57.6 datasets matplotlib
    peers/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    peers/bin/python tests/reference/make_pyreft_reference.py

The README beside this file lists every file and key. Takes a minute and under 2 GB.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pyreft
import torch
from pyreft.reft_model import count_parameters
from pyvene import LowRankRotatedSpaceIntervention
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
DIM, RANK, ROWS = 24, 3, 5
WITH_ACTIVATION = ("Loreft", "Noreft", "Direft", "Nodireft")
CLASSES = (*WITH_ACTIVATION, "Consreft", "Lobireft")


def build(name, dim=DIM, rank=RANK, **options):
    """One pyreft intervention, in eval mode and in float32 (pyreft defaults to bfloat16)."""
    options = dict(options, embed_dim=dim, low_rank_dimension=rank, add_bias=False, dropout=0.0)
    return getattr(pyreft, f"{name}Intervention")(dtype=torch.float32, **options).eval()


def write_json(name, value):
    (HERE / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def shake(module, scale):
    """Move every parameter away from its start, so that no term of a formula is near zero."""
    for name, parameter in module.named_parameters():
        noise = scale * torch.randn_like(parameter)
        if "parametrizations" in name:
            # The free form of R: torch reads its diagonal as integer signs, so it must not move.
            noise = noise.tril(-1)
        parameter.add_(noise)


def plain_weights(module):
    """The weights under plain names: R [d, r], W [r, d], b [r], W2 [r, d]."""
    weights = {}
    for key, layer in (("R", "rotate_layer"), ("W2", "proj_layer")):
        if hasattr(module, layer):
            weights[key] = getattr(module, layer).weight
    if hasattr(module, "learned_source"):  # in ConsReFT and LobiReFT a bare vector
        source = module.learned_source
        linear = isinstance(source, torch.nn.Linear)
        weights.update({"W": source.weight, "b": source.bias} if linear else {"b": source})
    return {name: weight.detach().clone().contiguous() for name, weight in weights.items()}


@torch.no_grad()
def make_functions():
    """Input, output and weights of each intervention, called directly."""
    tensors = {}

    def store(prefix, values):
        tensors.update({f"{prefix}.{key}": value for key, value in values.items()})

    cases = [(name, None) for name in CLASSES] + [(name, "relu") for name in WITH_ACTIVATION]
    for seed, (name, act_fn) in enumerate(cases):
        torch.manual_seed(seed)
        module = build(name, act_fn=act_fn)
        shake(module, 0.3)
        h = torch.randn(ROWS, DIM)
        prefix = f"{name}Intervention" + (f".{act_fn}" if act_fn else "")
        store(prefix, {"h": h, "out": module(h.clone()), **plain_weights(module)})

    torch.manual_seed(100)
    module = LowRankRotatedSpaceIntervention(embed_dim=DIM, low_rank_dimension=RANK).eval()
    shake(module, 0.3)
    base, source = torch.randn(ROWS, DIM), torch.randn(ROWS, DIM)
    values = {"base": base, "source": source, "out": module(base.clone(), source.clone())}
    store("LowRankRotatedSpaceIntervention", {**values, **plain_weights(module)})
    save_file(tensors, HERE / "pyreft_functions.safetensors")


def make_counts():
    """Trainable parameters by pyreft's own count, plus the versions all data came from."""
    counts = {}
    for name in CLASSES:
        sizes = [(4096, 4), (2048, 4), (4096, 8)] + ([(4096, 1)] if name == "Consreft" else [])
        count = {f"d={d},r={r}": count_parameters(build(name, d, r)) for d, r in sizes}
        counts[f"{name}Intervention"] = count
    versions = {name: version(name) for name in ("pyreft", "pyvene", "torch", "transformers")}
    write_json("pyreft_functions.json", {"versions": versions, "trainable_parameters": counts})


def tiny_gpt2():
    """A three-layer GPT-2 whose biases and norms are random too, so that all of them matter."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, n_embd=DIM, n_layer=3, n_head=4, n_positions=64)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    config = GPT2Config(**sizes, **dropout, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    shake(model, 0.1)
    return model


@torch.no_grad()
def save_and_run(model, name, seed, folder, input_ids):
    """Save two interventions the way a pyreft user does; return the logits they give."""
    torch.manual_seed(seed)
    place = {"component": "block_output", "low_rank_dimension": RANK}
    places = [{"layer": layer, "intervention": build(name), **place} for layer in (0, 2)]
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places))
    shake(reft_model.interventions, 0.3)
    shutil.rmtree(HERE / folder, ignore_errors=True)
    reft_model.save(str(HERE / folder))
    last = [[input_ids.shape[1] - 1]] * len(input_ids)  # one list of positions per row
    locations = {"sources->base": (None, [last] * len(places))}
    return reft_model({"input_ids": input_ids}, unit_locations=locations)[1].logits.clone()


@torch.no_grad()
def make_saved():
    model = tiny_gpt2()
    # lm_head.weight shares memory with wte.weight; safetensors wants separate copies.
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, HERE / "pyreft_saved_model.safetensors")
    write_json("pyreft_saved_model.json", model.config.to_dict())

    input_ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    save_file(
        {
            "input_ids": input_ids,
            "base_logits": model(input_ids).logits,
            "logits": save_and_run(model, "Loreft", 10, "pyreft_saved", input_ids),
            "nodireft_logits": save_and_run(model, "Nodireft", 11, "pyreft_saved_nodireft", input_ids),
        },
        HERE / "pyreft_saved_outputs.safetensors",
    )


if __name__ == "__main__":
    make_functions()
    make_saved()
    make_counts()
