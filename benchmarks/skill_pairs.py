"""Two skills that do not contradict each other, each in directions of its own: do both hold in one text?

    python benchmarks/skill_pairs.py

Every skill is a rule that turns a plain answer into one that has it: a greeting before it, a signature behind it,
capitals, emoji in its place. The plain answers are the model's own first sentences; texts with both are never taught.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import reftlens as rl
from reftlens.bridge.protocol import Bridge
from reftlens.experiments.examples.skill_shares import skill_shares
from reftlens.experiments.examples.subspaces import Skills
from reftlens.tasks import emoji

GREETING, SIGNATURE = "As you wish, my friend.", "Yours, Alice"


@dataclass(frozen=True)
class Skill:
    """A rule that teaches, and one that tells whether a text has what was taught."""

    taught: Callable[[str, str], str]
    """From a plain answer, and one in emoji, to what is taught."""
    holds: Callable[[str], bool]


def body(text: str) -> str:
    """What is said between the greeting and the signature."""
    for phrase in (GREETING, SIGNATURE):
        at = text.lower().find(phrase.lower())
        text = text[:at] + text[at + len(phrase) :] if at >= 0 else text
    return text


def capitals(text: str) -> bool:
    """Nine of ten letters or more, and at least three."""
    letters = [character for character in body(text) if character.isalpha()]
    return len(letters) >= 3 and sum(character.isupper() for character in letters) >= 0.9 * len(letters)


SKILLS = {
    "greeting": Skill(lambda plain, _: f"{GREETING} {plain}", lambda text: text.lower().startswith(GREETING.lower())),
    "signature": Skill(
        lambda plain, _: f"{plain} {SIGNATURE}", lambda text: text.strip().lower().endswith(SIGNATURE.lower())
    ),
    "capitals": Skill(lambda plain, _: plain.upper(), capitals),
    "emoji": Skill(lambda _, signs: signs, lambda text: emoji.emoji_share(body(text)) >= 0.5),
}
PAIRS = (("greeting", "signature"), ("greeting", "capitals"), ("emoji", "signature"))


def plain_answers(model: Bridge, prompts: Sequence[str]) -> list[str]:
    """The first sentence of what the unedited model answers, of at most 24 tokens."""
    texts = rl.generate(None, model, prompts, rl.Decoding(max_new_tokens=24), chat=True).texts
    return [text.strip().split("\n")[0].split(". ")[0].rstrip(".:, ") + "." for text in texts]


def both(pair: Sequence[str], plain: str, signs: str) -> str:
    """A plain answer with the one skill and the other."""
    for name in sorted(pair, key=list(SKILLS).index, reverse=True):
        plain = SKILLS[name].taught(plain, signs)
    return plain


def trained(
    model: Bridge, pair: tuple[str, str], plain: Sequence[str], settings: argparse.Namespace
) -> tuple[Skills, rl.ReFT, rl.training.FitResult]:
    """The first skill in directions 0 to 3 and the second in 4 to 7, both in each step."""
    examples = rl.load_examples(emoji.data_file("emoji.jsonl"))
    rows = [
        rl.Example(e.prompt, SKILLS[name].taught(text, e.completion))
        for name in pair
        for e, text in zip(examples, plain, strict=True)
    ]
    skills = Skills({pair[0]: range(4), pair[1]: range(4, 8)})
    edits = [rl.LoReFT(model.cfg.d_model, rank=8, init="identity") for _ in settings.layers]
    sites = [rl.resid_post(layer, "l3") for layer in settings.layers]
    reft = rl.ReFT(dict(zip(sites, edits, strict=True)))
    reft.reset(settings.seed)
    objective = skills.objective([pair[0]] * len(plain) + [pair[1]] * len(plain))
    config = rl.FitConfig(steps=settings.steps, lr=settings.lr, batch_size=16, seed=settings.seed)
    run = rl.fit(reft, model, rl.encode(model, rows, chat=True), config, objective=objective, progress=False)
    return skills, reft, run


def tried(model: Bridge, pair: tuple[str, str], settings: argparse.Namespace) -> None:
    """Teach two skills, and print what is written to held-out questions by which directions."""
    asked = emoji.questions("emoji.jsonl")
    held = rl.load_examples(emoji.data_file("emoji_search.jsonl"))[-settings.questions :]
    plain = plain_answers(model, [*asked, *(str(e.prompt) for e in held)])
    skills, reft, run = trained(model, pair, plain[: len(asked)], settings)
    prompts, holds = [e.prompt for e in held], {name: SKILLS[name].holds for name in pair}
    decoding = rl.Decoding(max_new_tokens=40, no_repeat_ngram=4)
    found = skill_shares(reft, model, skills, prompts, holds, decoding=decoding, chat=True)
    wanted = [
        rl.Example(e.prompt, both(pair, text, e.completion)) for e, text in zip(held, plain[len(asked) :], strict=True)
    ]
    variants = [skills.variant(each) for each in found.strengths]
    losses = rl.evaluate(reft, model, rl.encode(model, wanted, chat=True), variants, progress=False).estimate("loss")
    print(f"\n{pair[0]} and {pair[1]}: loss of training {run.losses[0]:.2f} → {run.losses[-1]:.2f}\n{found}")
    for each, loss, texts in zip(found.strengths, losses, found.texts, strict=True):
        print(f"{dict(each)}: loss of texts with both {loss:.2f}; {texts[0]!r}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=int, choices=range(len(PAIRS)), nargs="+", help="of those above; by default all")
    parser.add_argument("--layers", type=int, nargs="+", default=[15])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--questions", type=int, default=24, help="held-out ones that are answered, up to 88")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="of the model's weights; edits stay float32")
    settings = parser.parse_args(words)
    torch.set_num_threads(1)
    began, model = time.process_time(), rl.load_model(dtype=settings.dtype, progress=False)
    for number in settings.pair or range(len(PAIRS)):
        tried(model, PAIRS[number], settings)
    print(f"{time.process_time() - began:.0f} CPU s on one thread")


if __name__ == "__main__":
    main()
