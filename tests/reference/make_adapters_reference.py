"""Regenerate `adapters_bert.safetensors`, `adapters_roberta.safetensors` and `adapters.json`: ReFTs of `adapters`.

It runs the real `adapters` 1.3.0 on tiny random encoders in float64 on a CPU with fixed seeds. `adapters` pins an
older transformers, so it gets an environment of its own (Python 3.11):

    python -m venv peers
    peers/bin/pip install torch==2.13.0 transformers==4.57.6 adapters==1.3.0
    peers/bin/python tests/reference/make_adapters_reference.py

The README beside this file lists every key. Takes seconds.
"""

import json
from importlib.metadata import version
from pathlib import Path

import adapters
import torch
from adapters import DiReftConfig, LoReftConfig, NoReftConfig
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

HERE = Path(__file__).resolve().parent
SIZES = dict(
    vocab_size=48,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=40,
    pad_token_id=1,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)
MODELS = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}
KINDS = {"LoReFT": LoReftConfig, "NoReFT": NoReftConfig, "DiReFT": DiReftConfig}
PLACES = {
    "tied": dict(tied_weights=True),
    "untied": dict(tied_weights=False),
    "prefix": dict(suffix_positions=0, tied_weights=True),
}
LENGTHS = (9, 6, 7)


@torch.no_grad()
def shake(module, scale):
    """Move every parameter away from its start; the free form of an orthogonal matrix has a diagonal of signs."""
    for name, parameter in module.named_parameters():
        noise = scale * torch.randn_like(parameter)
        parameter.add_(noise.tril(-1) if "parametrizations" in name else noise)


def rows():
    """Rows of three lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return tokens.masked_fill(~mask, SIZES["pad_token_id"]), mask.long()


def edited(model, name, config, weight):
    """Last states under a ReFT with moved weights, those weights, and their gradients of a sum over the first token."""
    torch.manual_seed(10)
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    units = {
        f"{layer}.{i}": unit
        for layer, block in enumerate(model.encoder.layer)
        for i, unit in enumerate(block.reft_layer.refts[name].units)
    }
    for unit in units.values():
        shake(unit.eval(), 0.2)
    tokens, mask = rows()
    states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    found = {"states": states}
    sources = {place: (unit.learned_source.weight, unit.learned_source.bias) for place, unit in units.items()}
    trained = [parameter for pair in sources.values() for parameter in pair]
    gradients = iter(torch.autograd.grad((states[:, 0] * weight).sum(), trained))
    for place, (W, b) in sources.items():
        found |= {f"{place}.B": units[place].projection.weight, f"{place}.W": W, f"{place}.b": b}
        found |= {f"{place}.W.gradient": next(gradients), f"{place}.b.gradient": next(gradients)}
    model.set_active_adapters(None)
    return {f"{name}.{key}": value.detach() for key, value in found.items()}


def main():
    configs = {}
    for family, (config_class, model_class) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config_class(**SIZES), add_pooling_layer=False).eval()
        shake(model, 0.1)
        tensors = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}  # in float32
        model.double()
        configs[family] = SIZES
        tokens, mask = rows()
        with torch.no_grad():
            base = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = torch.randn(base[:, 0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        tensors |= {"tokens": tokens, "mask": mask, "base": base, "weight": weight}
        adapters.init(model)
        for kind, config in KINDS.items():
            for place, settings in PLACES.items():
                settings = dict(prefix_positions=2, suffix_positions=1, r=3, dropout=0.0, dtype="float64") | settings
                tensors |= edited(model, f"{kind}-{place}", config(**settings), weight)
        save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / f"adapters_{family}.safetensors")
    versions = {name: version(name) for name in ("adapters", "torch", "transformers")}
    told = json.dumps({"versions": versions, "configs": configs}, indent=2, sort_keys=True)
    (HERE / "adapters.json").write_text(f"{told}\n")


if __name__ == "__main__":
    main()
