"""What a GPU would feel of a training step: operations dispatched, and reads that make the host wait, counted on a CPU.

    python benchmarks/dispatches.py [--shapes d rows64] [--prompt TOKENS] [--where] [--before CHECKOUT]

A step is one of the public `rl.fit`, from one optimizer step to the next, after warm steps: nothing is captured or
checked any more. Beside it a floor by hand of the same computation (`floors.py`): the blocks of transformers on the
tokens of the cone, stored keys and values as one tensor per block, a bare low-rank edit, logits at the targets, clipped
gradients, AdamW. SmolLM2-135M in float32. Counts do not depend on the lengths: `--prompt 16` takes seconds.

Logits are taken as many at a time as on a GPU. A launch is an operation that is not a view. A read is what a GPU's host
has to wait for (`item`, `tolist`, `nonzero`, `cpu`, an index by a mask); an upload is a tensor brought from the host.
What is on the host in any case is no read.

`--where` lists the operations that reftlens dispatches more often, and the lines that they come from.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from floors import cone_step
from shapes import DISPATCHED, rows_of, spec_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
WARM = 3
HOST = torch.device("cpu", 0)  # what tensors say that are on the host in any case; the model's is without a number
READING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount", "repeat_interleave"}
TO_HOST = {"tolist", "cpu", "numpy", "__array__"}
MAKING = {"tensor", "as_tensor", "arange", "zeros", "ones", "empty", "full", "randperm", "rand", "randn"}


def on_host(value):
    """Whether a tensor would be on the host with the model on a GPU."""
    return getattr(value, "on_host", False)


def tensors_in(values):
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def is_of_model(value):
    """Whether an argument of `to` is the device of the model; the host's is given by its name."""
    return isinstance(value, torch.device | str) and value != "cpu"


class Hosts(TorchFunctionMode):
    """Follows what is on the host in any case: made without a device, or from nothing but what is there already."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, inputs = kwargs or {}, getattr(func, "__name__", ""), tensors_in((args, kwargs))
        host = bool(inputs) and all(map(on_host, inputs))
        if name in TO_HOST and not host:
            self.count.note("reads", name)
        if name in MAKING and not inputs:
            host = kwargs.get("device") in (None, "cpu", HOST)  # not so the device of the model
            if name in ("tensor", "as_tensor") and not host:
                self.count.note("uploads", name)
        if name == "__get__" and host and func.__self__ is torch.Tensor.device:
            return HOST
        out = func(*args, **kwargs)
        moved = name == "to" and any(map(is_of_model, (*args[1:], *kwargs.values())))
        if (moved and host) or (name == "cpu" and not host):
            with torch._C.DisableTorchFunction():
                out = out.view(out.shape)  # apart from what it was moved from, which may be the same here
            host = not host
            if not host:
                self.count.note("uploads", name)
        for tensor in tensors_in(out) if host else ():
            tensor.on_host = True
        return out


class Count(TorchDispatchMode):
    """Counts while `on`; with `lines`, by line as well."""

    def __init__(self, lines):
        super().__init__()
        self.on, self.lines = False, lines
        self.kinds = {kind: Counter() for kind in ("dispatched", "launches", "reads", "uploads")}
        self.from_line = Counter()

    def note(self, kind, name):
        if self.on:
            self.kinds[kind][name] += 1
            if self.lines and kind != "launches":
                self.from_line[f"{kind}|{name}|{line_of_caller()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        inputs = tensors_in((args, kwargs or {}))
        if not (inputs and all(map(on_host, inputs))):
            self.note("dispatched", name)
            if not (func.is_view or name == "_unsafe_view"):
                self.note("launches", name)
            if name in READING or indexes_by_mask(name, args):
                self.note("reads", name)
            elif name.startswith("index") and any(map(on_host, inputs)):
                self.note("uploads", name)
        return func(*args, **(kwargs or {}))


def indexes_by_mask(name, args):
    """Whether places are looked up in a mask, which takes their number to the host."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return masks and (name == "index" or args[2].numel() > 1)


def line_of_caller():
    """The innermost line outside of torch, and of reftlens where that is another."""
    frame, shown = sys._getframe(2), []
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and f"{os.sep}torch{os.sep}" not in name:
            ours = f"{os.sep}reftlens{os.sep}" in name
            if ours or not shown:
                shown.append(f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}")
            if ours:
                break
        frame = frame.f_back
    return " < ".join(shown)


def reftlens_steps(name, prompt):
    """Steps of `fit`; counts those after the warm ones."""
    import reftlens as rl
    from reftlens.scoring import objectives
    from reftlens.text.batch import batch_from_rows

    objectives._ROWS["cpu"] = objectives._ROWS["cuda"]
    spec = spec_of(name, prompt)
    model = rl.load_model(progress=False)
    data = batch_from_rows(rows_of(name, prompt), [[1] * p + [2] * c for p, c in spec["rows"]])
    for tensor in (data.tokens, data.role, data.target_mask):
        tensor.on_host = True
    site = rl.resid_post(spec["layers"][0], spec["positions"])
    reft = rl.ReFT({site: rl.LoReFT(model.cfg.d_model, rank=spec["rank"])})

    def run(count):
        def on_step(step):
            count.on = step.step == WARM

        rl.fit(reft, model, data, steps=WARM + 1, batch_size=len(data), on_step=on_step, progress=False)

    return run


def floor_steps(name, prompt):
    from reftlens.bridge.pretrained import DEFAULT_MODEL, find_model

    step = cone_step(spec_of(name, prompt), rows_of(name, prompt), find_model(DEFAULT_MODEL))

    def run(count):
        for turn in range(WARM + 1):
            count.on = turn == WARM
            step()

    return run


def counted(steps, name, options):
    run, count = steps(name, options.prompt), Count(options.where)
    with Hosts(count), count:
        run(count)
    return {**count.kinds, "from_line": count.from_line}


def elsewhere(name, options):
    """The same count of reftlens in another checkout."""
    command = [sys.executable, __file__, "--only", name, *(["--where"] if options.where else [])]
    command += ["--prompt", str(options.prompt)] if options.prompt else []
    environment = os.environ | {"PYTHONPATH": str(options.before.resolve())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(name, results, options):
    print(f"({name}) {spec_of(name, options.prompt)['what']}")
    print(f"{'':12}{'dispatched':>12}{'launches':>12}{'reads':>8}{'uploads':>9}{'/ floor':>9}{'launches / floor':>18}")
    total = {who: {kind: sum(r[kind].values()) for kind in r} for who, r in results.items()}
    for who, t in total.items():
        ratios = [t[kind] / total["floor"][kind] for kind in ("dispatched", "launches")]
        numbers = f"{t['dispatched']:12}{t['launches']:12}{t['reads']:8}{t['uploads']:9}"
        print(f"{who:12}{numbers}{ratios[0]:9.2f}{ratios[1]:18.2f}")
    ours, floor = results["reftlens"], results["floor"]
    more = Counter({op: n - floor["dispatched"].get(op, 0) for op, n in ours["dispatched"].items()})
    print("more than the floor: " + ", ".join(f"{op} +{n}" for op, n in more.most_common(16) if n > 0))
    print("less than the floor: " + ", ".join(f"{op} {n}" for op, n in more.most_common()[:-9:-1] if n < 0))
    print("reads: " + (", ".join(f"{op} {n}" for op, n in ours["reads"].items()) or "none"))
    if options.where:
        where(ours["from_line"], more)
    print(flush=True)


def where(lines, more):
    for kind in ("reads", "uploads"):
        print(f"  {kind}:")
        for key, n in sorted(lines.items(), key=lambda item: -item[1]):
            if key.startswith(kind):
                print(f"    {n:6}  {' '.join(key.split('|')[1:])}")
    for op, extra in more.most_common(16):
        if extra > 0:
            print(f"  {op} +{extra}:")
            mine = {key: n for key, n in lines.items() if key.startswith(f"dispatched|{op}|")}
            for key, n in sorted(mine.items(), key=lambda item: -item[1])[:8]:
                print(f"    {n:6}  {key.split('|')[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=DISPATCHED)
    parser.add_argument("--prompt", type=int, help="tokens of each prompt, in place of the shape's")
    parser.add_argument("--where", action="store_true", help="the lines that dispatch more than the floor")
    parser.add_argument("--before", type=Path, help="another checkout, whose steps are counted too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(counted(reftlens_steps, options.only, options)))
        return
    for name in options.shapes:
        results = {"floor": counted(floor_steps, name, options)}
        if options.before:
            results["before"] = elsewhere(name, options)
        results["reftlens"] = counted(reftlens_steps, name, options)
        show(name, results, options)


if __name__ == "__main__":
    main()
