"""Floors: steps of training written by hand on plain transformers, against which those of reftlens are measured."""

import json
from pathlib import Path

import torch
from torch.nn import functional as F

LR = 4e-3
WIDTH = 576  # of the residual stream of SmolLM2-135M


def plain_model(folder):
    """The transformers of the peers, before 5, does not read where newer ones write the base of the rotary angles."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    config = AutoConfig.from_pretrained(folder)
    if int(__version__.split(".")[0]) < 5:
        config.rope_theta = json.loads((Path(folder) / "config.json").read_text())["rope_parameters"]["rope_theta"]
    settings = dict(config=config, torch_dtype=torch.float32, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval().requires_grad_(False)


class LowRank(torch.nn.Module):
    """The bare edit of the floor: `h + (h A + b) B`, no constraint."""

    def __init__(self, d, rank):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(d, rank) / d**0.5)
        self.B = torch.nn.Parameter(torch.randn(rank, d) / d**0.5)
        self.b = torch.nn.Parameter(torch.zeros(rank))

    def forward(self, h):
        return h + (h @ self.A + self.b) @ self.B


class Stored:
    """A cache of transformers with one stored tensor of keys, and of values, per block."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def update(self, keys, values, block, *args, **_):
        return torch.cat([self.keys[block], keys], dim=2), torch.cat([self.values[block], values], dim=2)


def cone_step(spec, ids, folder):
    """Edit of the last prompt token at one layer, rows of one length: what is computed, and nothing besides."""
    from transformers import DynamicCache

    model, (layer,), tokens = plain_model(folder), spec["layers"], torch.tensor(ids)
    ((prompt, completion),) = set(spec["rows"])
    start = prompt - 1
    streams, keys, values = [], {}, {}
    handle = model.model.layers[layer].register_forward_hook(
        lambda m, a, o: streams.append((o[0] if isinstance(o, tuple) else o)[:, start:-1])
    )
    caches = []
    with torch.no_grad():
        for row in tokens:
            caches.append(DynamicCache())
            model.model(input_ids=row[None], past_key_values=caches[-1], use_cache=True)
    handle.remove()
    for n in range(layer + 1, len(model.model.layers)):
        keys[n] = torch.cat([c.layers[n].keys[:, :, :start] for c in caches])
        values[n] = torch.cat([c.layers[n].values[:, :, :start] for c in caches])
    stream, cache, blocks = torch.cat(streams), Stored(keys, values), model.model.layers[layer + 1 :]
    del caches, streams
    place = torch.arange(start, start + completion).expand(len(ids), -1)
    rotary = model.model.rotary_emb(stream, place)
    allowed = torch.ones(completion, start + completion, dtype=torch.bool).tril(start).expand(len(ids), 1, -1, -1)
    wanted, edit = tokens[:, prompt:].flatten(), LowRank(WIDTH, spec["rank"])
    optimizer = torch.optim.AdamW(edit.parameters(), lr=LR)

    def step():
        optimizer.zero_grad(set_to_none=True)
        h = torch.cat([edit(stream[:, :1]), stream[:, 1:]], dim=1)
        for block in blocks:
            h = block(h, attention_mask=allowed, position_embeddings=rotary, position_ids=place, past_key_values=cache)
            h = h[0] if isinstance(h, tuple) else h
        logits = model.lm_head(model.model.norm(h.flatten(0, 1)))
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(edit.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step
