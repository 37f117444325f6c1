"""A step of DAS on a vocabulary of 262,144, scored among two answers and among all tokens, interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/among.py

The bridge has the shape of Gemma 3 270M and random weights. DAS of rank 8 at the last token of the middle layer, 32
pairs a step, sources captured; steps of both take turns, and CPU seconds of this process are compared.
"""

import argparse
import statistics
import time
from contextlib import ExitStack

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import reftlens as rl
from reftlens.bridge.protocol import frozen
from reftlens.cone.plans import Plan
from reftlens.cone.scorer import Scorer
from reftlens.editing.reft import training_mode
from reftlens.scoring.objectives import as_objective
from reftlens.text.batch import batch_from_rows
from reftlens.training.run import Run, advance

SHAPE = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 2048,
    "sliding_window": 512,
}
ANSWERS = (10, 20)


def bridge_of_random_weights():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SHAPE)
    model = Gemma3ForCausalLM(config).eval()
    name = type(model).__name__
    return build_bridge_from_module(model, name, hf_config=config, dtype=torch.float32, model_name=name).eval()


def pairs(rows: int, length: int):
    ids = torch.randint(100, 262_000, (2, rows, length)).tolist()
    base = [[*row, ANSWERS[number % 2]] for number, row in enumerate(ids[0])]
    source = batch_from_rows(ids[1], [[1] * length] * rows)
    return batch_from_rows(base, [[1] * length + [2]] * rows).with_sources(source)


def run_of(model, data, stack: ExitStack):
    reft = rl.ReFT({rl.resid_post(SHAPE["num_hidden_layers"] // 2, "last"): rl.DAS(SHAPE["hidden_size"], 8)})
    reft.reset(0)
    stack.enter_context(training_mode(reft, training=True))
    run = Run(reft, model, data, rl.FitConfig(steps=1000, batch_size=32), None, as_objective(rl.training.cross_entropy))
    scorer = Scorer(model, data, [Plan(reft)], rl.training.Reuse())
    run.judge_by(scorer, None)
    return run, scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    model, data = bridge_of_random_weights(), pairs(rows=64, length=24)
    with frozen(model), ExitStack() as stack:
        contenders = {
            "all tokens": run_of(model, data, stack),
            "two answers": run_of(model, data.among_answers(ANSWERS), stack),
        }
        seconds = {name: [] for name in contenders}
        for _ in range(steps + 4):  # the first capture, and compare with the full computation
            for name, (run, scorer) in contenders.items():
                began = time.process_time()
                advance([run], scorer, None)
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(every[4:]) for name, every in seconds.items()}
    for name, (_, scorer) in contenders.items():
        print(f"{name:<12} {1e3 * medians[name]:8.1f} ms a step; {scorer.computation}")
    print(f"ratio {medians['two answers'] / medians['all tokens']:.3f}, medians of {steps} interleaved steps")


if __name__ == "__main__":
    main()
