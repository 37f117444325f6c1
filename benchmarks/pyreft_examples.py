"""PyReFT's worked examples on SmolLM2-135M-Instruct, one at a time: `python benchmarks/pyreft_examples.py NAME`."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import reftlens as rl
from reftlens.experiments.examples.few_shot import learning_curve
from reftlens.experiments.examples.memorisation import SETTINGS, memorisation
from reftlens.experiments.examples.reward import BradleyTerry, preferred, reward_rows
from reftlens.experiments.examples.subspaces import Skills
from reftlens.experiments.methods import Reft, Subject
from reftlens.tasks import emoji

GREETING = "As you wish, my friend."
REFUSAL = "I am sorry, but I cannot say anything about that."
ASKED = ("Who wrote Romeo and Juliet?", "How do I bake bread?", "What is 2 + 2?", "Tell me a joke.", "Is it raining?")
"""The five prompts that the persona refuses in training."""


def memorise(arguments: argparse.Namespace) -> None:
    """The longest verbatim text by block, against the same tokens shuffled."""
    text = emoji.data_file("alice.txt").read_text(encoding="utf-8")
    config = SETTINGS.replace({"steps": arguments.steps or 300, "lr": arguments.lr or SETTINGS.lr})
    places = {"layers": arguments.layers or [5, 15, 25], "lengths": arguments.lengths or [16, 32, 64, 128]}
    model = rl.load_model(dtype=arguments.dtype, progress=False)
    found = memorisation(model, text, **places, rank=1, config=config, progress=False)
    print(f"model in {arguments.dtype}; {found}")
    if arguments.picture:
        found.plot().figure.savefig(arguments.picture, dpi=110, bbox_inches="tight")


def compose(arguments: argparse.Namespace) -> None:
    """Emoji in four directions, a greeting in four others; both together, and the emoji negated."""
    model, skills = rl.load_model(progress=False), Skills({"emoji": range(4), "greeting": range(4, 8)})
    answered = rl.load_examples(emoji.data_file("emoji.jsonl"))
    greeted = [rl.Example(example.prompt, GREETING) for example in answered]
    data = rl.encode(model, [*answered, *greeted], chat=True)
    names = ["emoji"] * len(answered) + ["greeting"] * len(greeted)
    sites = [rl.resid_post(layer, "l3") for layer in (8, 16, 24)]
    reft = rl.ReFT({site: rl.LoReFT(model.cfg.d_model, rank=8, init="identity") for site in sites})
    reft.reset(arguments.seed)
    steps = arguments.steps or 80
    settings = {"steps": steps, "lr": 1e-2, "batch_size": 16, "seed": arguments.seed, "progress": False}
    rl.fit(reft, model, data, objective=skills.objective(names), **settings)
    held = [e for e in rl.load_examples(emoji.data_file("emoji_search.jsonl"))][:20]
    unseen = rl.encode(model, held, chat=True)
    wanted = {
        "unedited": rl.Variant(0.0),
        "emoji": skills.variant(["emoji"]),
        "greeting": skills.variant(["greeting"]),
        "both": skills.variant(["emoji", "greeting"]),
        "half of both": skills.variant({"emoji": 0.5, "greeting": 0.5}),
        "emoji negated": skills.variant({"emoji": -1}),
    }
    scores = rl.evaluate(reft, model, unseen, list(wanted.values()), progress=False).estimate("loss")
    for (name, variant), loss in zip(wanted.items(), scores, strict=True):
        decoding = rl.Decoding(max_new_tokens=24, no_repeat_ngram=3)
        texts = rl.generate(reft, model, emoji.questions(), decoding, chat=True, variant=variant).texts
        share = sum(map(emoji.emoji_share, texts)) / len(texts)
        polite = sum(text.startswith(GREETING) for text in texts)
        print(
            f"{name:13} emoji {share:.2f}, greeted {polite:2} of {len(texts)}, loss of emoji {loss:.3f}; {texts[0]!r}"
        )


def few_shot(arguments: argparse.Namespace) -> None:
    """SST-2 from 4 to 32 examples, against the same examples in the prompt."""
    from reftlens.experiments.rows.loading import load_rows

    subject = Subject()
    train, test = (
        [rl.Example(row.prompt, row.completion) for row in load_rows("sst2", split, data=arguments.data, limit=limit)]
        for split, limit in (("train", 200), ("test", arguments.limit or 100))
    )
    answers = sorted({example.completion for example in train})
    print(f"{train[0].prompt!r} {answers}")
    config = rl.FitConfig(steps=arguments.steps or 60, lr=2e-3, batch_size=8)
    method = Reft(rank=1, positions="l1", layers=(15,))
    settings = {"shots": (4, 8, 16, 32), "seeds": range(arguments.seeds), "config": config, "progress": False}
    print(learning_curve(method, subject, train, test, answers, **settings))


def persona(arguments: argparse.Namespace) -> None:
    """An assistant that refuses everything, from five examples."""
    model = rl.load_model(progress=False)
    data = rl.encode(model, [rl.Example(prompt, REFUSAL) for prompt in ASKED], chat=True)
    reft = rl.ReFT({rl.resid_post(15, "last"): rl.LoReFT(model.cfg.d_model, rank=4, init="identity")})
    reft.reset(arguments.seed)
    run = rl.fit(reft, model, data, steps=arguments.steps or 100, lr=4e-3, batch_size=5, progress=False)
    print(run)
    for strength in (0, 0.5, 1):
        texts = rl.generate(
            reft, model, emoji.questions(), rl.Decoding(max_new_tokens=24), chat=True, variant=strength
        ).texts
        refused = sum(text.startswith(REFUSAL) for text in texts)
        print(f"strength {strength}: refused {refused} of {len(texts)} unseen questions; {texts[0]!r}")


def reward(arguments: argparse.Namespace) -> None:
    """Which of two answers in emoji fits a question: the other one is that of another question."""
    model = rl.load_model(progress=False)
    parts = []
    for name in ("emoji.jsonl", "emoji_search.jsonl"):
        rows = rl.load_examples(emoji.data_file(name))
        triples = [(str(e.prompt), e.completion, rows[i - 7].completion) for i, e in enumerate(rows)]
        parts.append(reward_rows(model, triples, chat=True))
    sites = [rl.resid_post(layer, "f1+l1") for layer in range(model.cfg.n_layers)]
    reft = rl.ReFT(
        {site: rl.LoReFT(model.cfg.d_model, rank=1, init="identity") for site in sites}
        | {rl.final_norm("l1"): rl.interventions.Head(model.cfg.d_model, outputs=1, hidden=0)}
    )
    reft.reset(arguments.seed)
    settings = {"steps": arguments.steps or 60, "lr": 4e-3, "batch_size": 8, "seed": arguments.seed}
    run = rl.fit(reft, model, parts[0], objective=BradleyTerry(reft), progress=False, **settings)
    print(f"{reft.parameter_count(model).stored} numbers, loss {run.losses[0]:.3f} → {run.losses[-1]:.3f}")
    for name, rows in zip(("trained on", "other questions"), parts, strict=True):
        print(f"{name}: the answer that fits has the larger reward in {preferred(reft, model, rows)}")


EXAMPLES = {"memorise": memorise, "compose": compose, "few-shot": few_shot, "persona": persona, "reward": reward}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=EXAMPLES)
    parser.add_argument("--data", type=Path, help="a folder with glue/sst2 in it, for few-shot")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, help="of memorise")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtype", default="float32", help="of the model's weights, for memorise; edits stay float32")
    parser.add_argument("--picture", type=Path, help="where the plot goes, for memorise")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    began = time.process_time()
    EXAMPLES[arguments.name](arguments)
    print(f"{time.process_time() - began:.0f} CPU s on one thread")


if __name__ == "__main__":
    main()
