"""Floors: steps of training written by hand on plain transformers, against which those of reftlens are measured."""

import json
from pathlib import Path

import torch
from shapes import RANDOM, SHAPES, edited_places, rows_of
from torch.nn import functional as F

LR = 4e-3
WIDTH = 576  # of the residual stream of SmolLM2-135M


def padded(rows, value=0):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def random_model(name):
    """A Llama of the shape of `RANDOM[name]` in bfloat16 with random weights, on the GPU where there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**RANDOM[name], attn_implementation="sdpa")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def plain_model(folder):
    """A model in a folder, in float32, or one of the names in `RANDOM`.

    The transformers of the peers, before 5, does not read where newer ones write the base of the rotary angles.
    """
    if str(folder) in RANDOM:
        return random_model(str(folder))
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    config = AutoConfig.from_pretrained(folder)
    if int(__version__.split(".")[0]) < 5:
        config.rope_theta = json.loads((Path(folder) / "config.json").read_text())["rope_parameters"]["rope_theta"]
    settings = dict(config=config, torch_dtype=torch.float32, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval().requires_grad_(False)


class LowRank(torch.nn.Module):
    """The bare edit of the floor: `h + (h A + b) B`, no constraint, in float32."""

    def __init__(self, d, rank):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(d, rank) / d**0.5)
        self.B = torch.nn.Parameter(torch.randn(rank, d) / d**0.5)
        self.b = torch.nn.Parameter(torch.zeros(rank))

    def forward(self, h):
        return h + ((h.to(self.A.dtype) @ self.A + self.b) @ self.B).to(h.dtype)


class Stored:
    """A cache of transformers with one stored tensor of keys, and of values, per block."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def update(self, keys, values, block, *args, **_):
        return torch.cat([self.keys[block], keys], dim=2), torch.cat([self.values[block], values], dim=2)


def floor_step(shape, folder):
    """Plain transformers: sdpa, a bare low-rank edit by a forward hook, logits at the targets only."""
    model, spec = plain_model(folder), SHAPES[shape]
    tokens, mask = padded(rows_of(shape)), padded([[1] * len(r) for r in rows_of(shape)])
    places = [(i, p) for i, row in enumerate(edited_places(shape)) for p in row]
    at = tuple(torch.tensor(x) for x in zip(*places, strict=True))
    targets = [(i, t) for i, (p, c) in enumerate(spec["rows"]) for t in range(p, p + c)]
    rows, columns = (torch.tensor(x) for x in zip(*targets, strict=True))
    edits = {layer: LowRank(model.config.hidden_size, spec["rank"]) for layer in spec["layers"]}

    def hook_for(edit):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            out = h.clone()
            out[at] = edit(h[at])
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    for layer, edit in edits.items():
        model.model.layers[layer].register_forward_hook(hook_for(edit))
    optimizer = torch.optim.AdamW([p for e in edits.values() for p in e.parameters()], lr=LR)

    def step():
        optimizer.zero_grad(set_to_none=True)
        hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[rows, columns - 1])
        F.cross_entropy(logits, tokens[rows, columns]).backward()
        optimizer.step()

    return step


def floor_reuse_step(shape, folder):
    """The same with the same reuse: layers above the edit, tokens from the edit on, the same groups of rows."""
    from transformers import DynamicCache

    from reftlens.cone.spans import buckets

    spec = SHAPES[shape]
    if len(spec["layers"]) > 1:  # every layer is edited from its first tokens on: there is nothing to reuse
        return floor_step(shape, folder)
    model, (layer,) = plain_model(folder), spec["layers"]
    d, dtype = model.config.hidden_size, model.dtype
    edit = LowRank(d, spec["rank"])
    optimizer = torch.optim.AdamW(edit.parameters(), lr=LR)
    ids, lengths = rows_of(shape), spec["rows"]
    groups = []
    for rows in buckets([c for _, c in lengths], [p - 1 for p, _ in lengths], 3, 16.0):
        longest, width = max(lengths[r][0] for r in rows) - 1, max(lengths[r][1] for r in rows)
        depth, count = model.config.num_hidden_layers, len(rows)
        cached = (count, model.config.num_key_value_heads, longest, model.config.head_dim)
        stream = torch.zeros(count, width, d, dtype=dtype)
        place = torch.zeros(count, width, dtype=torch.long)
        keys = [torch.zeros(cached, dtype=dtype) for _ in range(depth)]
        values = [torch.zeros(cached, dtype=dtype) for _ in range(depth)]
        allowed = torch.zeros(count, 1, width, longest + width, dtype=torch.bool)
        at, targets = [], []
        for i, r in enumerate(rows):
            prompt, completion = lengths[r]
            with torch.no_grad():
                seen, cache = {}, DynamicCache()
                handle = model.model.layers[layer].register_forward_hook(
                    lambda m, a, o, seen=seen: seen.update(h=o[0] if isinstance(o, tuple) else o)
                )
                model.model(input_ids=torch.tensor([ids[r]]), past_key_values=cache, use_cache=True)
                handle.remove()
            start = prompt - 1
            stream[i, :completion] = seen["h"].view(-1, d)[start : start + completion]
            place[i] = (start + torch.arange(width)).clamp(max=start + completion - 1)
            for n in range(depth):
                keys[n][i, :, longest - start :] = cache.layers[n].keys[0, :, :start]
                values[n][i, :, longest - start :] = cache.layers[n].values[0, :, :start]
            for q in range(width):
                allowed[i, 0, q, longest - start : longest + q + 1] = True
            at += [(i, t) for t in range(completion)]
            targets += ids[r][prompt:]
        rotary = model.model.rotary_emb(stream, place)
        index = tuple(torch.tensor(x) for x in zip(*at, strict=True))
        groups.append((stream, rotary, place, keys, values, allowed, index, torch.tensor(targets)))

    def step():
        optimizer.zero_grad(set_to_none=True)
        hidden, targets = [], []
        for stream, rotary, place, keys, values, allowed, index, wanted in groups:
            cache = DynamicCache()
            for n, (k, v) in enumerate(zip(keys, values, strict=True)):
                cache.update(k, v, n)
            h = torch.cat([edit(stream[:, :1]), stream[:, 1:]], dim=1)
            for block in model.model.layers[layer + 1 :]:
                h = block(
                    h, attention_mask=allowed, position_embeddings=rotary, position_ids=place, past_key_values=cache
                )
                h = h[0] if isinstance(h, tuple) else h
            hidden.append(h[index])
            targets.append(wanted)
        logits = model.lm_head(model.model.norm(torch.cat(hidden)))
        F.cross_entropy(logits, torch.cat(targets)).backward()
        optimizer.step()

    return step


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
