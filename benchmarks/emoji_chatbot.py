"""The emoji chatbot over seeds and strengths, and the tutorial's own setting beside it.

    python benchmarks/emoji_chatbot.py [--seeds 0 1 2] [--out docs]

Prints, for every seed, how many of ten unseen questions are answered mostly in emoji at each strength, and all
answers at strength 1; draws `emoji_chatbot.png`.
"""

import argparse
from pathlib import Path

import reftlens as rl
from reftlens import figures
from reftlens.tasks import emoji

STRENGTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25)


def measure(model, reft, questions):
    """Share of emoji in each answer, per strength, and the answers at strength 1."""
    generations = {s: emoji.answers(reft, model, questions, strength=s) for s in STRENGTHS}
    return {s: [emoji.emoji_share(t) for t in g.texts] for s, g in generations.items()}, generations[1.0].texts


def report(label, run, shares, texts, questions):
    counts = "  ".join(f"{s:g}: {sum(v > 0.5 for v in values)}" for s, values in shares.items())
    print(f"\n{label}: loss {run.losses[0]:.2f} → {run.loss:.2f} in {len(run.losses)} steps, {run.seconds:.0f} s")
    print(f"  answers mostly in emoji, of {len(questions)}, by strength:  {counts}")
    print(f"  distinct answers at strength 1: {len(set(texts))} of {len(texts)}")
    for question, text in zip(questions, texts, strict=True):
        print(f"    {question:<60} {' '.join(text.split())[:70]}")


def draw(runs, all_shares, path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    figures.axes(left), figures.axes(right)
    colours = (figures.BLUE, figures.ORANGE, figures.GREEN)
    for (seed, run), shares, colour in zip(runs.items(), all_shares, colours, strict=False):
        left.plot(range(1, len(run.losses) + 1), run.losses, color=colour, label=f"seed {seed}")
        means = [100 * sum(values) / len(values) for values in shares.values()]
        right.plot(list(shares), means, color=colour, marker="o", markersize=4, label=f"seed {seed}")
    left.set(xlabel="optimizer step", ylabel="loss per target token (nats)", ylim=(0, None))
    right.set(xlabel="strength of the edit (1: as trained)", ylabel="emoji in the answers (% of characters)")
    right.set(ylim=(-3, 103))
    left.legend(frameon=False)
    figure.savefig(path, dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    model, questions = rl.load_model(), emoji.questions()
    runs, all_shares = {}, []
    for seed in options.seeds:
        reft, runs[seed] = emoji.run(model, seed)
        shares, texts = measure(model, reft, questions)
        report(f"seed {seed}", runs[seed], shares, texts, questions)
        all_shares.append(shares)
    draw(runs, all_shares, options.out / "emoji_chatbot.png")
    reft = emoji.tutorial_reft(model.cfg.d_model, options.seeds[0])
    reft, run = emoji.run(model, options.seeds[0], reft=reft, config=emoji.TUTORIAL)
    shares, texts = measure(model, reft, questions)
    report("the tutorial's setting", run, shares, texts, questions)


if __name__ == "__main__":
    main()
