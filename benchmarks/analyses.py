"""Analyses on the light cone beside the same analyses with every variant computed in full, interleaved.

    python benchmarks/analyses.py [--repeats 3] [--out docs]

SmolLM2-135M-Instruct, float32, one thread, CPU seconds, capture and all; weights as initialised, as what they are
does not change what is computed. Writes docs/performance_analyses.md. Shapes:

- dose: the emoji intervention (layers 8, 16, 24, last three prompt tokens) at 9 strengths on 50 prompts with answers,
  teacher-forced: effect, accuracy and KL of each strength;
- texts: continuations of 16 of the prompts, 32 tokens, at the same strengths, all in one batch on both sides;
- positions: effects of the last 8 prompt tokens, alone and left out, of a steering vector at layer 15, on 8 prompts of
  64 tokens or more with short answers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import reftlens as rl
from reftlens.cone.plans import plans_of
from reftlens.scoring.responses import responses
from reftlens.tasks import emoji

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
WANTED = {"dose": "0.50", "texts": "", "positions": "0.25"}
WHAT = {
    "dose": "dose-response, 9 strengths x 50 prompts, teacher-forced",
    "texts": "32 tokens from 16 prompts at 9 strengths, one batch",
    "positions": "effects of the last 8 positions at layer 15, 8 prompts",
}


def contenders(model) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """For each shape: on the light cone, and in full."""
    d = model.cfg.d_model
    chatbot = emoji.emoji_reft(d)
    examples = rl.load_examples(emoji.data_file("emoji.jsonl"))
    fifty = [*examples, *(rl.Example(q, examples[i].completion) for i, q in enumerate(emoji.questions()))]
    data = rl.encode(model, fifty, chat=True)
    variants = [rl.Variant(s) for s in STRENGTHS]
    some = rl.encode_prompts(model, [e.prompt for e in fifty[:16]], chat=True)

    long = [" ".join(e.prompt for e in examples[i : i + 6]) for i in range(8)]
    noise = torch.randn(d, generator=torch.Generator().manual_seed(0))
    vector = rl.ReFT({rl.resid_post(15, "l8"): rl.SteeringVector(d, noise)})
    asked = [rl.Example(text, e.completion) for text, e in zip(long, examples, strict=False)]
    prompts = rl.encode(model, asked, chat=True)
    assert prompts.prompt_mask.sum(dim=1).min() >= 64

    def texts(reuse: bool):
        read = rl.generation.prefill(chatbot, model, some) if reuse else some
        return rl.generate(chatbot, model, read, rl.Decoding(max_new_tokens=32), variant=variants)

    def dose(reuse: bool):
        plans = plans_of(chatbot, {str(v): v for v in variants})
        return responses(model, data, plans, reuse=rl.training.Reuse.of(reuse), progress=False)

    def positions(reuse: bool):
        return rl.effects(vector, model, prompts, of="positions", reuse=reuse, progress=False)

    made = {"dose": dose, "texts": texts, "positions": positions}
    return {name: (lambda f=f: f(True), lambda f=f: f(False)) for name, f in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = rl.load_model()
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in WHAT}
    both = contenders(model)
    for _ in range(options.repeats):
        for name, sides in both.items():
            for side, run in enumerate(sides):
                began = time.process_time()
                run()
                seconds[name][side].append(time.process_time() - began)
                print(f"{name} {('cone', 'full')[side]} {seconds[name][side][-1]:.1f} s", flush=True)
    lines = [
        "## Analyses on the light cone",
        "",
        f"CPU seconds of one thread, medians of {options.repeats} interleaved repetitions, capture and check included, "
        "SmolLM2-135M-Instruct in float32 (`python benchmarks/analyses.py`). Full: the same analysis with "
        "`reuse=False`, every variant through the whole model.",
        "",
        "| analysis | light cone | full | ratio | wanted at most |",
        "|---|---|---|---|---|",
    ]
    for name, sides in seconds.items():
        cone, full = map(statistics.median, sides)
        lines.append(f"| {WHAT[name]} | {cone:.1f} | {full:.1f} | {cone / full:.2f} | {WANTED[name]} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (options.out / "performance_analyses.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
