"""The shapes on real text: tokenised once, so that every environment computes the same ids.

The texts are not part of this project. A folder with them has `commonsense/train/TASK.jsonl` (`instruction`, `output`,
as LLM-Adapters writes them), `glue/sst2/train.jsonl` and `validation.jsonl` (`sentence`, `label`) and
`instruction/ultrafeedback_1k.jsonl` (`instruction`, `input`, `output`).
"""

import json
import random
from pathlib import Path

from shapes import TEXTS

BATCHES = 5
NEEDED = {"f": "commonsense/train", "h1": "glue/sst2", "h2": "glue/sst2", "i": "instruction/ultrafeedback_1k.jsonl"}
ANSWERS = (" negative", " positive")
SHOTS = 8
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commonsense(data: Path) -> list[tuple[str, str]]:
    """All tasks in one, as the paper trains on them."""
    rows = [row for path in sorted((data / NEEDED["f"]).glob("*.jsonl")) for row in lines(path)]
    return [(row["instruction"] + "\n", row["output"]) for row in rows]


def eight_shot(data: Path) -> list[tuple[str, str]]:
    """Sentences after the same eight, which are answered."""
    train, test = (lines(data / "glue" / "sst2" / f"{part}.jsonl") for part in ("train", "validation"))
    asked = [f"Review: {row['sentence'].strip()}\nSentiment:" for row in (*train[:SHOTS], *test, *train[SHOTS:])]
    answers = [ANSWERS[row["label"]] for row in (*train[:SHOTS], *test, *train[SHOTS:])]
    shots = "".join(f"{q}{a}\n\n" for q, a in zip(asked[:SHOTS], answers[:SHOTS], strict=True))
    return [(shots + q, a) for q, a in zip(asked[SHOTS:], answers[SHOTS:], strict=True)]


def ultrafeedback(data: Path) -> list[tuple[str, str]]:
    rows = lines(data / NEEDED["i"])
    return [((ALPACA_INPUT if row["input"] else ALPACA).format(**row), row["output"]) for row in rows]


SOURCES = {"f": commonsense, "h1": eight_shot, "h2": eight_shot, "i": ultrafeedback}


def batches_of(shape: str, data: Path, folder: str, count: int = BATCHES) -> list[list[tuple[list[int], int]]]:
    """The first of five fixed batches: of each row its ids, and how many of them are the prompt's."""
    from transformers import AutoTokenizer

    tokenizer, spec = AutoTokenizer.from_pretrained(folder), TEXTS[shape]
    pairs = SOURCES[shape](data)
    chosen = random.Random(spec["seed"]).sample(pairs, BATCHES * spec["batch"])
    rows = []
    for prompt, completion in chosen:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        after = [*after, *([tokenizer.eos_token_id] if spec["ends"] else [])][: spec["most"]]
        rows.append(([*before, *after], len(before)))
    return [rows[i : i + spec["batch"]] for i in range(0, count * spec["batch"], spec["batch"])]
