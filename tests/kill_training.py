"""Train, be killed with SIGKILL at random moments, resume, and compare with a run that nobody disturbed.

One process imports everything and forks a child for each attempt, so that an attempt costs no import. Prints JSON:
how many kills hit a running child, how many runs were finished, and how many of them ended bit-identical.
Usage: python kill_training.py KILLS
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.torch import load_file, save_file

import architectures
import reftlens as rl

torch.set_num_threads(1)  # a forked child must not wait for threads of its parent


def train(folder: Path) -> None:
    """One run with everything that has state: dropout, accumulation, shuffling, warm-up, validation, decay."""
    model = architectures.bridge("gpt2")
    words = architectures.TEXT.split()
    examples = [rl.Example(" ".join(words[i : i + 3]), " " + " ".join(words[i + 3 : i + 6])) for i in range(12)]
    data = rl.encode(model, examples)
    generator = torch.Generator().manual_seed(1)
    lo = rl.LoReFT(model.cfg.d_model, rank=2, dropout=0.2, generator=generator)
    di = rl.DiReFT(model.cfg.d_model, rank=2, dropout=0.1, activation="relu", generator=generator)
    reft = rl.ReFT({rl.resid_post(0, "f1+l1"): lo, rl.mlp_out(1, "all"): di, rl.resid_post(2, "last"): lo})
    rl.fit(
        reft,
        model,
        data[:9],
        steps=40,
        batch_size=2,
        accumulate=2,
        schedule="cosine",
        warmup=0.2,
        weight_decay=0.05,
        validation=data[9:],
        eval_every=4,
        patience=100,
        checkpoint=folder / "run.ckpt",
        checkpoint_every=1,
        progress=False,
    )
    save_file({n: t.contiguous() for n, t in reft.state_dict().items()}, folder / "done.safetensors")


def attempt(folder: Path, kill_after: float | None) -> bool:
    """Fork a child that trains; True if SIGKILL hit it while it ran, False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            train(folder)
        finally:
            os._exit(0 if (folder / "done.safetensors").exists() else 1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        raise SystemExit("a training run failed")
    return False


def main(wanted: int) -> None:
    architectures.bridge("gpt2")
    rng = random.Random(0)
    kills = runs = identical = resumed = 0
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch) / "undisturbed"
        undisturbed.mkdir()
        began = time.perf_counter()
        attempt(undisturbed, None)
        duration = time.perf_counter() - began
        expected = load_file(undisturbed / "done.safetensors")
        while kills < wanted:
            folder = Path(scratch) / f"run{runs}"
            folder.mkdir()
            for _ in range(5):
                hit = attempt(folder, rng.uniform(0.05, 0.6) * duration)
                kills += hit
                resumed += hit and (folder / "run.ckpt").exists()
                if not hit:
                    break
            else:
                attempt(folder, None)
            ended = load_file(folder / "done.safetensors")
            runs += 1
            identical += all(torch.equal(ended[n], expected[n]) for n in expected) and ended.keys() == expected.keys()
    print(json.dumps({"kills": kills, "with_checkpoint": resumed, "runs": runs, "identical": identical}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
