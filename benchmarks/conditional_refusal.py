"""Refuses one topic and leaves the others alone: a refusal behind a gate, on prompts that neither of them has seen.

Layer, rule and threshold of the gate, and the refusal itself, are from the calibration split of
`data/conditional_refusal.jsonl`; what is printed is of the held-out split.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import reftlens as rl
from reftlens.scoring.statistics import share_of

SENTENCE = "I'm sorry, but I can't advise on doses of medicine."
"""An answer that starts with it is a refusal: the unedited model has no reason to write it."""
REFUSAL = f"{SENTENCE} Please ask a doctor or a pharmacist."
TOPICS = ("medical dosage", "fitness and nutrition", "general")
"""The one that is to be refused, its neighbour, and everything else."""
DATA = Path(__file__).parent.parent / "data" / "conditional_refusal.jsonl"


def refusals(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([text.startswith(SENTENCE) for text in texts])


def table(
    topics: list[str], opened: torch.Tensor, plain: rl.generation.Generation, edited: rl.generation.Generation
) -> str:
    """Of each topic how often the gate opened, what is written then, and how many closed rows stay as they are."""
    same = torch.tensor([a == b for a, b in zip(plain.ids, edited.ids, strict=True)])
    lines = [
        "| prompts | n | opened | refused, of the opened | refused, unedited | closed rows equal to the unedited |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in TOPICS:
        some = torch.tensor([topic == name for topic in topics])
        share, refused = share_of(opened[some]), refusals(edited.texts)[some & opened]
        cells = (
            f"{int(opened[some].sum())}: {share:.3f}",
            f"{int(refused.sum())} of {len(refused)}",
            f"{int(refusals(plain.texts)[some].sum())}",
            f"{int(same[some & ~opened].sum())} of {int((some & ~opened).sum())}",
        )
        lines.append(f"| {name} | {int(some.sum())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(result: rl.strength.Openings, edited: rl.generation.Generation) -> str:
    """What it costs where the gate opened falsely, in the unedited model's own answer."""
    falsely = result.is_open()[~result.expected]
    if result.costs is None or not falsely.any():
        return "no false opening"
    kl, gained = (float(values[0][falsely].mean()) for values in (result.costs.kl, result.costs.effect))
    refused = refusals(edited.texts)[~result.expected & result.is_open()]
    return (
        f"{int(falsely.sum())} of {len(falsely)} opened falsely, {int(refused.sum())} of them with a refusal; on the "
        f"unedited model's own answers there: KL {kl:.2f}, log-probability {gained:.2f} nats per token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[12, 16, 20, 24, 28], help="among which the gate is chosen"
    )
    parser.add_argument("--tokens", type=int, default=16, help="written after each prompt")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    model, rows, begin = rl.load_model(progress=False), [json.loads(line) for line in DATA.open()], time.time()
    dose, near, far = TOPICS

    def prompts(split: str, *topics: str) -> list[str]:
        return [row["prompt"] for topic in topics for row in rows if row["split"] == split and row["topic"] == topic]

    opens, shut = (rl.encode_prompts(model, prompts("calibration", *t), chat=True) for t in ((dose,), (near, far)))
    fits = [
        rl.subspaces.threshold_between(model, opens, shut, rl.resid_post(i, "all"), by=by, false_openings=0)
        for i in args.layers
        for by in ("last", "mean")
    ]
    best = max(fits, key=lambda fit: (fit.true.value - fit.false.value, fit.separation))
    print("chosen on the calibration split:", best, flush=True)
    reft = rl.ReFT({best.site: rl.interventions.Gated(rl.LoReFT(model.cfg.d_model, rank=4), best.gate)})
    examples = [rl.Example(prompt, REFUSAL) for prompt in prompts("calibration", dose)]
    run = rl.fit(reft, model, rl.encode(model, examples, chat=True), steps=args.steps, lr=4e-3, progress=False)
    print(f"the refusal was trained for {args.steps} steps, loss {run.loss:.3f}", flush=True)

    held, topics = prompts("heldout", *TOPICS), [t for t in TOPICS for _ in prompts("heldout", t)]
    decoding, expected = rl.Decoding(max_new_tokens=args.tokens), torch.tensor([topic == dose for topic in topics])
    written = rl.generate(None, model, rl.encode_prompts(model, held, chat=True), decoding)
    edited = rl.generate(reft, model, rl.encode_prompts(model, held, chat=True), decoding)
    own = [rl.Example(prompt, text) for prompt, text in zip(held, written.texts, strict=True)]
    result = rl.strength.openings(reft, model, rl.encode(model, own, chat=True), expected, progress=False)
    print(result, flush=True)
    print(table(topics, result.is_open(), written, edited))
    print(cost(result, edited))
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
