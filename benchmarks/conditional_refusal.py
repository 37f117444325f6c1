"""Refuses one topic and leaves the others alone: a refusal behind a gate, on prompts that neither of them has seen.

Layer, rule and threshold of the gate, and the refusal itself, are from the calibration split of
`data/conditional_refusal.jsonl`; what is printed is of the held-out split.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import reftlens as rl
from reftlens.scoring.statistics import share_of

REFUSAL = "I'm sorry, but I can't advise on doses of medicine. Please ask a doctor or a pharmacist."
TOPICS = ("medical dosage", "fitness and nutrition", "general")
"""The one that is to be refused, its neighbour, and everything else."""
DATA = Path(__file__).parent.parent / "data" / "conditional_refusal.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[12, 16, 20, 24, 28], help="among which the gate is chosen"
    )
    parser.add_argument("--tokens", type=int, default=8, help="written after each prompt")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    model, rows, begin = rl.load_model(progress=False), [json.loads(line) for line in DATA.open()], time.time()
    dose, near, far = TOPICS

    def prompts(split: str, *topics: str) -> list[str]:
        return [row["prompt"] for topic in topics for row in rows if row["split"] == split and row["topic"] == topic]

    opens, shut = (rl.encode_prompts(model, prompts("calibration", *t), chat=True) for t in ((dose,), (near, far)))
    fits = [
        rl.subspaces.threshold_between(model, opens, shut, rl.resid_post(i, "prompt"), by=by, false_openings=0)
        for i in args.layers
        for by in ("last", "mean")
    ]
    best = max(fits, key=lambda fit: (fit.true.value - fit.false.value, fit.separation))
    print("chosen on the calibration split:", best, flush=True)
    edit = rl.interventions.Gated(rl.LoReFT(model.cfg.d_model, rank=4), best.gate)
    reft, held = rl.ReFT({best.site: edit}), prompts("heldout", *TOPICS)
    topics = [topic for topic in TOPICS for _ in prompts("heldout", topic)]
    batch, expected = rl.encode_prompts(model, held, chat=True), [topic == dose for topic in topics]
    result = rl.strength.openings(reft, model, batch, expected, progress=False)
    print(result, flush=True)

    examples = [rl.Example(prompt, REFUSAL) for prompt in prompts("calibration", dose)]
    run = rl.fit(reft, model, rl.encode(model, examples, chat=True), steps=args.steps, lr=4e-3, progress=False)
    print(f"the refusal was trained for {args.steps} steps, loss {run.loss:.3f}", flush=True)
    decoding = rl.Decoding(max_new_tokens=args.tokens)
    plain, edited = (rl.generate(each, model, batch, decoding) for each in (None, reft))
    same = torch.tensor([a == b for a, b in zip(plain.ids, edited.ids, strict=True)])
    refused = torch.tensor([text.startswith(REFUSAL[:16]) for text in edited.texts])
    print("| prompts | n | opened | refused | closed rows that equal the base |\n|---|---:|---:|---:|---:|")
    for name in TOPICS:
        some = torch.tensor([topic == name for topic in topics])
        closed, (opened, texts) = some & ~result.is_open(), (share_of(x[some]) for x in (result.is_open(), refused))
        equal = f"{int(same[closed].sum())} of {int(closed.sum())}"
        print(f"| {name} | {int(some.sum())} | {opened:.3f} | {texts:.3f} | {equal} |")
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
