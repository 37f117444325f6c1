"""One of several processes that train together, on a tiny model: what each of them saw is printed as JSON by rank 0.

Usage, under `torchrun` or `accelerate launch`: python processes.py CASE FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist

import architectures
import reftlens as rl

torch.set_num_threads(1)
WORDS = architectures.TEXT.split()


def example(i, length):
    return rl.Example(" ".join(WORDS[i : i + 3]), " " + " ".join(WORDS[i + 3 : i + 3 + length]))


def training(case, dtype, folder=None, **settings):
    """Losses, validation and weights of a run of 11 rows of unequal length: a step of 4, 4 and 3 rows each epoch."""
    model = architectures.bridge("gpt2", dtype)
    data = rl.encode(model, [example(i, 1 + i % 4) for i in range(16)])
    generator = torch.Generator().manual_seed(1 if case != "starts" else 1 + dist.get_rank())
    lo = rl.LoReFT(model.cfg.d_model, rank=2, generator=generator)
    di = rl.DiReFT(model.cfg.d_model, rank=2, activation="relu", generator=generator)
    reft = rl.ReFT({rl.resid_post(0, "f1+l1"): lo, rl.mlp_out(1, "all"): di}).to(dtype)
    settings = {"epochs": 3, "batch_size": 4, "eval_every": 2, "lr": 2e-2, "progress": True} | settings
    if case == "compared":
        settings |= {"objective": compared, "batch_size": 2, "accumulate": 2}
    if case == "lost":
        settings |= {"on_step": end, "checkpoint": folder / "run.ckpt", "checkpoint_every": 1, "epochs": 50}
    run = rl.fit(reft, model, data[:11], validation=data[11:], **settings)
    weights = torch.cat([p.detach().double().flatten() for p in reft.parameters()])
    return {
        "losses": run.losses,
        "norms": run.gradient_norms,
        "validation": run.validation,
        "weights": weights.tolist(),
    }


def compared(logits, batch):
    """The losses of the rows of a micro-batch, less their mean."""
    every = rl.training.cross_entropy(logits, batch).split(batch.target_mask.sum(dim=1).tolist())
    rows = torch.stack([losses.mean() for losses in every])
    return (rows - rows.mean()) ** 2


def end(step):
    """The second process ends at the third step, as if the machine had taken it."""
    if step.step == 3 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def main(case, folder):
    if os.environ.get("ACCELERATE_USE_CPU"):
        from accelerate import Accelerator

        Accelerator(cpu=True)
    else:
        dist.init_process_group("gloo")
    dtype = torch.float32 if case == "float32" else torch.float64
    told = {"count": dist.get_world_size(), **training(case, dtype, folder)}
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    if dist.get_rank() == 0:
        (folder / "told.json").write_text(json.dumps(every))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
