"""What SmolLM2-135M-Instruct writes to commonsense questions and arithmetic problems, to be labelled by hand.

    python benchmarks/written_answers.py --data ../shared/data --out written.jsonl
    python benchmarks/written_answers.py --data ../shared/data --out unseen.jsonl --sample unseen --dtype bfloat16

Three ways of asking, so that texts differ: a few worked rows in front (`shots`), as a chat (`chat`), and after a short
fit of LoReFT (`fit`). The first sample has 100 texts, to test rows; the rules of extraction were extended after it had
been read. The second, `unseen`, has 50, to training rows that the fit does not see; no rule was changed because
of it. The labelled files are `tests/reference/written_answers.jsonl` and `written_answers_unseen.jsonl`; prompts are
not in them.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import reftlens as rl
from reftlens.experiments.rows.loading import load_rows

COMMONSENSE = ("boolq", "piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
TAUGHT = {"commonsense": COMMONSENSE, "arithmetic": ("gsm8k", "mawps", "math10k")}
TOKENS = {"commonsense": 40, "arithmetic": 200}


@dataclass(frozen=True)
class Sample:
    """Which rows are asked, and how many in each way."""

    tasks: dict[str, tuple[str, ...]]
    split: str
    counts: dict[str, int]


SAMPLES = {
    "first": Sample(
        {"commonsense": COMMONSENSE, "arithmetic": ("gsm8k", "mawps", "multiarith", "singleeq", "aqua")},
        "test",
        {"shots": 20, "chat": 15, "fit": 15},
    ),
    "unseen": Sample(
        {"commonsense": COMMONSENSE, "arithmetic": ("gsm8k", "mawps", "math10k", "aqua")},
        "train",
        {"shots": 8, "chat": 8, "fit": 9},
    ),
}


def rows_of(task, split, **settings):
    """Rows of a task; AQuA has none to train on but those of its dev file."""
    return load_rows(task, "dev" if (task, split) == ("aqua", "train") else split, **settings)


def questions(sample, family, data, way):
    """So many rows as a way has, taken from the tasks in turn; none that the fit is trained on."""
    tasks, count, offset = sample.tasks[family], sample.counts[way], list(sample.counts).index(way)
    taught = {row.question for row in lessons(family, data)} if sample.split == "train" else set()
    # Of training rows enough others: those of seed 0 are the ones that are taught.
    drawn = {"limit": 100, "seed": offset + 1} if taught else {"limit": 30, "seed": offset}
    rows = [rows_of(task, sample.split, data=data, **drawn) for task in tasks]
    asked = [[row for row in part if row.question not in taught] for part in rows]
    return [asked[i % len(tasks)][i // len(tasks)] for i in range(count)]


def shown(row, data, shots=3):
    """The prompt with a few worked rows in front of it."""
    task = {"multiarith": "mawps", "singleeq": "mawps"}.get(row.task, row.task)
    train = rows_of(task, "train", data=data, limit=shots, seed=row.index)
    return "\n\n".join([r.prompt + r.completion for r in train if r.question != row.question] + [row.prompt])


def lessons(family, data):
    """The rows that the fit is trained on."""
    tasks = TAUGHT[family]
    return [row for task in tasks for row in load_rows(task, "train", data=data, limit=360 // len(tasks))]


def fitted(model, family, data):
    """A short fit on the family's training rows."""
    batch = rl.encode(
        model,
        [rl.Example(r.prompt, r.completion) for r in lessons(family, data)],
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
    parser.add_argument("--sample", choices=SAMPLES, default="first")
    parser.add_argument("--dtype", default="float32")
    settings = parser.parse_args()
    model, sample = rl.load_model(dtype=settings.dtype), SAMPLES[settings.sample]
    with settings.out.open("w", encoding="utf-8") as out:
        for family in sample.tasks:
            for way in sample.counts:
                reft = fitted(model, family, settings.data) if way == "fit" else None
                for row in questions(sample, family, settings.data, way):
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
