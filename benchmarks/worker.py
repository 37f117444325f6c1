"""One contender, one shape: answers `step N` (N threads) with the CPU and wall seconds of one optimizer step.

The shapes `g1` and `g8` are the generation of 64 tokens instead, for 1 and 8 prompts.

    python worker.py CONTENDER SHAPE MODEL [TEXTS]

The model is a folder or the name of a shape in `RANDOM`, whose random weights lie on the GPU where there is one.

Contenders: `reftlens` (its own environment; `reftlens-whole` is capture, check and 20 steps as one, `reftlens-full`
computes everything at every step), `floor` and `floor-reuse` (plain transformers, same environment), `pyreft-loreft`
and `pyreft-nodireft` (the peers' environment).
Shapes on real text take one of five batches after the other from the file TEXTS, and answer with the loss as well.
Started by `step_time.py`.
"""

import ctypes
import json
import resource
import sys
import time
import warnings
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from floors import LR, LowRank, floor_reuse_step, floor_step, plain_model
from shapes import RANDOM, SHAPES, TEXTS, TINY_RATE, WHOLE, rows_of, start_of

warnings.filterwarnings("ignore")
LARGE = 2 * 2**30  # bytes that a waiting contender holds: unused ones are handed back, as several of them wait at once


def bridge_of(folder):
    import reftlens as rl

    if folder not in RANDOM:
        return rl.load_model(folder, progress=False)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # none are read: tokens are given as numbers
    return rl.load_model(plain_model(folder), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))


def reftlens_fit(shape, folder, batches, reuse=True):
    """The public `fit`, ready to be called; what it trains starts at `start_of` on real text."""
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows

    model, spec = bridge_of(folder), TEXTS.get(shape) or SHAPES[shape]
    rows = [row for batch in batches for row in batch] or zip(rows_of(shape), (p for p, _ in spec["rows"]), strict=True)
    ids, prompts = zip(*rows, strict=True)
    data = batch_from_rows(ids, [[1] * p + [2] * (len(row) - p) for row, p in zip(ids, prompts, strict=True)])
    sites = [rl.resid_post(layer, spec["positions"]) for layer in spec["layers"]]
    reft = rl.ReFT({site: rl.LoReFT(model.cfg.d_model, rank=spec["rank"]) for site in sites})
    settings = dict(lr=LR, batch_size=len(data), reuse=reuse)
    if batches:
        settings = dict(lr=TINY_RATE, batch_size=spec["batch"], shuffle=False)
        for layer, (_, module) in zip(spec["layers"], reft.items(), strict=True):
            R, W, b = start_of(layer, module.d, module.rank)
            module.frame.set(R), module.W.data.copy_(W), module.b.data.copy_(b)
    rl.training.preflight(reft, model)
    reft.to(next(model.original_model.parameters()).device)
    return lambda **more: rl.fit(reft, model, data, **settings, **more, progress=False)


def done():
    """Wait for the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Clock:
    """CPU and wall time since the last answer."""

    def __init__(self):
        self.started = None

    def start(self):
        done()
        self.started = (time.process_time(), time.perf_counter())

    def read(self):
        done()
        return {"cpu": time.process_time() - self.started[0], "wall": time.perf_counter() - self.started[1]}


def handle(clock, loss=None):
    """Report the step that just ended, if one was asked for; wait for the next request. False: the end."""
    if clock.started is not None:
        print(json.dumps({**clock.read(), "loss": loss}), flush=True)
    if resident() > LARGE:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    words = sys.stdin.readline().split()
    if not words or words[0] != "step":
        return False
    torch.set_num_threads(int(words[1]))
    clock.start()
    return True


def reftlens_steps(fit, warm):
    """One optimizer step after the other of a call of `fit`; the first ones capture and check."""
    clock = Clock()

    def on_step(step):
        if step.step == warm:
            print(json.dumps({"ready": True}), flush=True)
        if step.step >= warm and not handle(clock, step.loss):
            raise StopIteration

    with suppress(StopIteration):
        fit(steps=100_000, on_step=on_step)


def reftlens_whole(fit):
    """A call of `fit`, as one step."""
    clock = Clock()
    print(json.dumps({"ready": True}), flush=True)
    handle(clock)
    run = fit(steps=WHOLE)
    handle(clock, sum(run.losses) / len(run.losses))


def steps(step, batches):
    """The steps of another contender, after a warm one."""
    clock, loss = Clock(), None
    if batches:
        step(0, only_first=True)
    else:
        step()
    print(json.dumps({"ready": True}), flush=True)
    for number in count():
        if not handle(clock, loss):
            return
        if batches:
            loss = step(number % len(batches))
        else:
            step()


def generate_step(contender, folder, batch):
    """Greedy continuation of `batch` prompts of 40 tokens by 64, layer 8 edited at the last prompt token."""
    prompts = torch.tensor([row[:40] for row in rows_of("a")][:batch])
    if contender == "reftlens":
        import reftlens as rl
        from reftlens.text.batch import batch_from_rows

        model = bridge_of(folder)
        model.original_model.generation_config.eos_token_id = None
        model.tokenizer.eos_token = None
        data = batch_from_rows(prompts.tolist(), [[1] * 40] * batch)
        reft = rl.ReFT({rl.resid_post(8, "last"): rl.LoReFT(model.cfg.d_model, rank=4)})
        return lambda: rl.generate(reft, model, data, rl.Decoding(max_new_tokens=64))
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    model = plain_model(folder)
    if contender == "floor":
        edit = LowRank(model.config.hidden_size, 4)

        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            if h.shape[1] > 1:
                h = torch.cat([h[:, :-1], edit(h[:, -1:])], dim=1)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        model.model.layers[8].register_forward_hook(hook)
        return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    import pyreft

    d = model.config.hidden_size
    kind = pyreft.LoreftIntervention(embed_dim=d, low_rank_dimension=4, dtype=model.dtype).to(model.device)
    spec = {"layer": 8, "component": "block_output", "low_rank_dimension": 4, "intervention": kind}
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=spec), set_device=False)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    at = {"sources->base": (None, [[[39]] * batch])}
    return lambda: reft.generate(inputs, unit_locations=at, intervene_on_prompt=True, **settings)


def step_of(contender, shape, folder, batches):
    if shape not in TEXTS and shape not in SHAPES:
        return torch.no_grad()(generate_step(contender, folder, int(shape[1:])))
    if contender.startswith("pyreft"):
        import peers
        import pyreft

        kinds = {"pyreft-loreft": pyreft.LoreftIntervention, "pyreft-nodireft": pyreft.NodireftIntervention}
        return (
            peers.text_steps(shape, batches, folder) if batches else peers.pyreft_step(shape, folder, kinds[contender])
        )
    if batches:
        from text_floor import Floor

        return Floor(shape, batches, folder).step
    return (floor_step if contender == "floor" else floor_reuse_step)(shape, folder)


def resident():
    """Bytes of memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def held():
    """Bytes that are held now, and at most so far: of the GPU, once it is in use."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    contender, shape, folder, *texts = sys.argv[1:]
    torch.set_num_threads(1)
    if folder in RANDOM and torch.cuda.is_available() and not contender.startswith("reftlens"):
        torch.set_default_device("cuda")
    batches = json.loads(Path(texts[0]).read_text(encoding="utf-8")) if texts else []
    if contender.startswith("reftlens") and (shape in SHAPES or batches):
        fit = reftlens_fit(shape, folder, batches, reuse=contender != "reftlens-full")
        before, _ = held()
        if contender == "reftlens-whole":
            reftlens_whole(fit)
        else:
            reftlens_steps(fit, max(1, len(batches)))
    else:
        step = step_of(contender, shape, folder, batches)
        before, _ = held()
        steps(step, batches)
    print(json.dumps({"growth": held()[1] - before}), flush=True)


if __name__ == "__main__":
    main()
