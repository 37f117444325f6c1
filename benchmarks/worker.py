"""One contender, one shape: answers `step N` (N threads) with the CPU and wall seconds of one optimizer step.

The shapes `g1` and `g8` are the generation of 64 tokens instead, for 1 and 8 prompts.

    python worker.py CONTENDER SHAPE MODEL_FOLDER

Contenders: `reftlens` (its own environment), `floor` and `floor-reuse` (plain transformers, same environment),
`pyreft-loreft` and `pyreft-nodireft` (the peers' environment). Started by `step_time.py`.
"""

import json
import resource
import sys
import time
import warnings
from contextlib import suppress

import torch
from floors import LR, LowRank, plain_model
from shapes import SHAPES, edited_places, rows_of
from torch.nn import functional as F

warnings.filterwarnings("ignore")


def padded(rows, value=0):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def reftlens_steps(shape, folder):
    """The public `fit`, one optimizer step at a time."""
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows

    model, spec = rl.load_model(folder, progress=False), SHAPES[shape]
    data = batch_from_rows(rows_of(shape), [[1] * p + [2] * c for p, c in spec["rows"]])
    sites = [rl.resid_post(layer, spec["positions"]) for layer in spec["layers"]]
    reft = rl.ReFT({site: rl.LoReFT(model.cfg.d_model, rank=spec["rank"]) for site in sites})
    rl.training.preflight(reft, model)
    baseline = yield
    steps = 1000

    def on_step(step):
        if step.step == 1:
            print(json.dumps({"ready": True}), flush=True)
        if not handle(clock):
            raise StopIteration

    clock = Clock()
    with suppress(StopIteration):
        rl.fit(reft, model, data, steps=steps, lr=LR, batch_size=len(data), on_step=on_step, progress=False)
    yield baseline


class Clock:
    """CPU and wall time since the last answer."""

    def __init__(self):
        self.started = None

    def start(self):
        self.started = (time.process_time(), time.perf_counter())

    def read(self):
        return {"cpu": time.process_time() - self.started[0], "wall": time.perf_counter() - self.started[1]}


def handle(clock):
    """Report the step that just ended, if one was asked for; wait for the next request. False: the end."""
    if clock.started is not None:
        print(json.dumps(clock.read()), flush=True)
    words = sys.stdin.readline().split()
    if not words or words[0] != "step":
        return False
    torch.set_num_threads(int(words[1]))
    clock.start()
    return True


def floor_step(shape, folder):
    """Plain transformers: sdpa, a bare low-rank edit by a forward hook, logits at the targets only."""
    model, spec = plain_model(folder), SHAPES[shape]
    tokens, mask = padded(rows_of(shape)), padded([[1] * len(r) for r in rows_of(shape)])
    places = [(i, p) for i, row in enumerate(edited_places(shape)) for p in row]
    at = tuple(torch.tensor(x) for x in zip(*places, strict=True))
    targets = [(i, t) for i, (p, c) in enumerate(spec["rows"]) for t in range(p, p + c)]
    rows, columns = (torch.tensor(x) for x in zip(*targets, strict=True))
    edits = {layer: LowRank(576, spec["rank"]) for layer in spec["layers"]}

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

    model, spec = plain_model(folder), SHAPES[shape]
    if len(spec["layers"]) > 1:  # every layer is edited from its first tokens on: there is nothing to reuse
        return floor_step(shape, folder)
    (layer,) = spec["layers"]
    edit = LowRank(576, spec["rank"])
    optimizer = torch.optim.AdamW(edit.parameters(), lr=LR)
    ids, lengths = rows_of(shape), spec["rows"]
    groups = []
    for rows in buckets([c for _, c in lengths], [p - 1 for p, _ in lengths], 3, 16.0):
        longest, width = max(lengths[r][0] for r in rows) - 1, max(lengths[r][1] for r in rows)
        depth, count = model.config.num_hidden_layers, len(rows)
        stream = torch.zeros(count, width, 576)
        place = torch.zeros(count, width, dtype=torch.long)
        keys = [torch.zeros(count, 3, longest, 64) for _ in range(depth)]
        values = [torch.zeros(count, 3, longest, 64) for _ in range(depth)]
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
            stream[i, :completion] = seen["h"].view(-1, 576)[start : start + completion]
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


def pyreft_step(shape, folder, kind):
    """What pyreft's trainer does at a step: its own loss function on a collated batch, then AdamW."""
    import pyreft
    from pyreft.reft_trainer import ReftTrainer

    model, spec = plain_model(folder), SHAPES[shape]
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": spec["rank"],
            "intervention": kind(embed_dim=576, low_rank_dimension=spec["rank"], add_bias=True, dtype=torch.float32),
        }
        for layer in spec["layers"]
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    places = torch.tensor(edited_places(shape))  # weights tied over prefix and suffix: one list of places per layer
    ids = rows_of(shape)
    labels = [[-100] * p + row[p:] for row, (p, _) in zip(ids, spec["rows"], strict=True)]
    inputs = {
        "input_ids": padded(ids),
        "attention_mask": padded([[1] * len(r) for r in ids]),
        "labels": padded(labels, -100),
        "intervention_locations": places[:, None, :].repeat(1, len(representations), 1),
    }
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=LR)
    reft.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        ReftTrainer.compute_loss(None, reft, inputs).backward()
        optimizer.step()

    return step


def generate_step(contender, folder, batch):
    """Greedy continuation of `batch` prompts of 40 tokens by 64, layer 8 edited at the last prompt token."""
    prompts = torch.tensor([row[:40] for row in rows_of("a")][:batch])
    if contender == "reftlens":
        import reftlens as rl
        from reftlens.text.batch import batch_from_rows

        model = rl.load_model(folder, progress=False)
        model.original_model.generation_config.eos_token_id = None
        model.tokenizer.eos_token = None
        data = batch_from_rows(prompts.tolist(), [[1] * 40] * batch)
        reft = rl.ReFT({rl.resid_post(8, "last"): rl.LoReFT(576, rank=4)})
        return lambda: rl.generate(reft, model, data, rl.Decoding(max_new_tokens=64))
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    model = plain_model(folder)
    if contender == "floor":
        edit = LowRank(576, 4)

        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            if h.shape[1] > 1:
                h = torch.cat([h[:, :-1], edit(h[:, -1:])], dim=1)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        model.model.layers[8].register_forward_hook(hook)
        return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    import pyreft

    kind = pyreft.LoreftIntervention(embed_dim=576, low_rank_dimension=4, dtype=torch.float32)
    spec = {"layer": 8, "component": "block_output", "low_rank_dimension": 4, "intervention": kind}
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=spec), set_device=False)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    at = {"sources->base": (None, [[[39]] * batch])}
    return lambda: reft.generate(inputs, unit_locations=at, intervene_on_prompt=True, **settings)


def resident():
    """Bytes of memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main():
    contender, shape, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if contender == "reftlens" and shape in SHAPES:
        run = reftlens_steps(shape, folder)
        next(run)
        before = resident()
        run.send(before)
    else:
        if shape not in SHAPES:
            step = torch.no_grad()(generate_step(contender, folder, int(shape[1:])))
        elif contender == "floor":
            step = floor_step(shape, folder)
        elif contender == "floor-reuse":
            step = floor_reuse_step(shape, folder)
        else:
            import pyreft

            kinds = {"pyreft-loreft": pyreft.LoreftIntervention, "pyreft-nodireft": pyreft.NodireftIntervention}
            step = pyreft_step(shape, folder, kinds[contender])
        before = resident()
        step()
        print(json.dumps({"ready": True}), flush=True)
        clock = Clock()
        while handle(clock):
            step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"growth": peak - before}), flush=True)


if __name__ == "__main__":
    main()
