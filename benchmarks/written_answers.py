"""What SmolLM2-135M-Instruct writes to 50 commonsense questions and 50 arithmetic problems, to be labelled by hand.

    python benchmarks/written_answers.py --data ../shared/data --out written.jsonl

Three ways of asking, so that texts differ: a few worked rows in front (`shots`), as a chat (`chat`), and after a short
fit of LoReFT (`fit`). The labelled file is `tests/reference/written_answers.jsonl`; prompts are not in it.
"""

import argparse
import json
from pathlib import Path

import reftlens as rl
from reftlens.experiments.rows.loading import load_rows

COMMONSENSE = ("boolq", "piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
ARITHMETIC = ("gsm8k", "mawps", "multiarith", "singleeq", "aqua")
COUNTS = {"shots": 20, "chat": 15, "fit": 15}
TOKENS = {"commonsense": 40, "arithmetic": 200}


def questions(tasks, data, way):
    """So many test rows as a way has, taken from the tasks in turn."""
    offset = list(COUNTS).index(way)
    rows = [load_rows(task, "test", data=data, limit=30, seed=offset) for task in tasks]
    return [rows[i % len(tasks)][i // len(tasks)] for i in range(COUNTS[way])]


def shown(row, data, shots=3):
    """The prompt with a few worked rows in front of it."""
    task = {"multiarith": "mawps", "singleeq": "mawps"}.get(row.task, row.task)
    train = load_rows(task, "dev" if task == "aqua" else "train", data=data, limit=shots, seed=row.index)
    return "\n\n".join([r.prompt + r.completion for r in train] + [row.prompt])


def fitted(model, family, data):
    """A short fit on the family's training rows."""
    tasks = COMMONSENSE if family == "commonsense" else ("gsm8k", "mawps", "math10k")
    rows = [row for task in tasks for row in load_rows(task, "train", data=data, limit=360 // len(tasks))]
    batch = rl.encode(
        model,
        [rl.Example(r.prompt, r.completion) for r in rows],
        max_length=384,
        truncate="completion",
        boundary="split",
    )
    reft = rl.ReFT({rl.resid_post(i, "f5+l5"): rl.LoReFT(model.cfg.d_model, rank=8) for i in (8, 14, 20, 26)})
    reft.reset(0)
    rl.fit(reft, model, batch, steps=60, batch_size=8, lr=2e-3, progress=False)
    return reft


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    model = rl.load_model()
    with settings.out.open("w", encoding="utf-8") as out:
        for family, tasks in (("commonsense", COMMONSENSE), ("arithmetic", ARITHMETIC)):
            for way in COUNTS:
                reft = fitted(model, family, settings.data) if way == "fit" else None
                for row in questions(tasks, settings.data, way):
                    text = shown(row, settings.data) if way == "shots" else row.prompt
                    text = row.prompt.split("### Instruction:\n")[-1].split("\n\n###")[0] if way == "chat" else text
                    (said,) = rl.generate(
                        reft, model, [text], rl.Decoding(max_new_tokens=TOKENS[family]), chat=way == "chat"
                    ).texts
                    record = {"family": family, "task": row.task, "index": row.index, "way": way, "text": said}
                    out.write(json.dumps(record) + "\n")
                    out.flush()


if __name__ == "__main__":
    main()
