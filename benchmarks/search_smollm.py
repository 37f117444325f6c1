"""Where to edit SmolLM2-135M-Instruct, found by `rl.search`: the gender of a name, answers in emoji, sentiment.

    python benchmarks/search_smollm.py gender emoji
    python benchmarks/search_smollm.py sentiment --glue FOLDER

FOLDER holds `sst2/train.jsonl` and `sst2/validation.jsonl` (`sentence`, `label`). Each task's section of
`docs/search_smollm.md` is written anew; one thread, CPU minutes of the process.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import reftlens as rl
from reftlens.tasks import emoji
from reftlens.tasks.gendered_pronoun import gendered_pronoun

LABELS = (" negative", " positive")
TEMPLATES = ("Last night {name} {verb}, but then", "On Sunday {name} {verb}, and then")


def gender(model, options):
    """Names, verbs and templates are not those of training; dev and test have no name in common. The last token is left
    out of the space: behind the last blocks an exchange there is one of the answer itself."""
    task = gendered_pronoun()
    task = replace(task, templates={**task.templates, "test": TEMPLATES})
    train, held = task.pairs(192, "gender"), task.pairs(1000, "gender", split="test")
    rows = list(zip(held.base, held.sources["gender"], strict=True))
    names = [{example.prompt.split()[2] for example in pair} for pair in rows]
    of = {
        answer: sorted({b.prompt.split()[2] for b in held.base if b.completion == answer}) for answer in (" she", " he")
    }
    parts = [{name for some in of.values() for name in some[half]} for half in (slice(3), slice(3, None))]
    dev, test = (held[[i for i, own in enumerate(names) if own <= part][:120]] for part in parts)
    data = [pairs.encode(model, first_token=True).among_answers(list(of)) for pairs in (train, dev, test)]
    space = rl.selection.Space(layers=range(1, 30, 8), positions=[*map(rl.positions.Nth, range(1, 5))])
    settings = {"budget": 240, "config": rl.FitConfig(steps=12), "seeds": 1}
    found = rl.search(model, *data, space, **settings, progress=options.progress)
    (site,) = found.recommended.sites
    whole = rl.ReFT({site: rl.Interchange(model.cfg.d_model)})
    every = test.encode(model, first_token=True)
    scores = {name: rl.causal.interchange_scores(reft, model, every, progress=False) for name, reft in
              (("recommended", found.recommended), ("whole vector", whole))}  # fmt: skip
    lines = ["Test pairs among all tokens, as notebook 02 scores them:", "", "```"]
    lines += [f"{name}: {score}" for name, score in scores.items()] + ["```"]
    return found, lines


def emoji_answers(model, options):
    """Trained on the demo's examples, chosen and reported on other questions; the demo's own setting beside it."""
    train = rl.encode(model, rl.load_examples(emoji.data_file("emoji.jsonl")), chat=True)
    rows = [json.loads(line) for line in emoji.data_file("emoji_search.jsonl").read_text("utf-8").splitlines()]
    of = {s: [rl.Example(r["prompt"], r["completion"]) for r in rows if r["split"] == s] for s in ("dev", "test")}
    dev, test = (rl.encode(model, some, chat=True) for some in of.values())
    space = rl.selection.Space(positions=["last", "l3"], strengths=[0.5, 1.0, 2.0])
    settings = {"budget": 620, "config": rl.FitConfig(steps=30, batch_size=8), "seeds": 1}
    found = rl.search(model, train, dev, test, space, **settings, progress=options.progress)
    edits = {"unedited": (found.recommended, 0.0), "recommended": (found.recommended, found.variant.strength)}
    edits |= {f"demo, seed {seed}": (emoji.run(model, seed, progress=False)[0], 1.0) for seed in range(3)}
    lines = ["| edit | trained numbers | loss on test | share of emoji, mean | answers mostly emoji |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, (reft, strength) in edits.items():
        (loss,) = rl.evaluate(reft, model, test, [strength], progress=False).estimate("loss")
        texts = emoji.answers(reft, model, emoji.questions(), strength).texts
        shares = [emoji.emoji_share(text) for text in texts]
        size = 0 if strength == 0 else sum(p.numel() for p in reft.parameters())
        mostly = f"{sum(share > 0.5 for share in shares)} of {len(shares)}"
        lines.append(f"| {name} | {size:,} | {loss:.3f} | {sum(shares) / len(shares):.2f} | {mostly} |")
    return found, lines


def sentiment(model, options):
    """SST-2, scored among two labels; chosen by the loss."""
    parts = {}
    for name in ("train", "validation"):
        records = map(json.loads, (options.glue / "sst2" / f"{name}.jsonl").read_text("utf-8").splitlines())
        parts[name] = [(f"Review: {r['sentence'].strip()}\nSentiment:", LABELS[r["label"]]) for r in records]
    rows = parts["train"][:400], parts["train"][400:600], parts["validation"][:300]
    data = [rl.encode(model, [rl.Example(*r) for r in some], end=False, among_answers=LABELS) for some in rows]
    space = rl.selection.Space(positions=["last", "l3"])
    settings = {"budget": 800, "config": rl.FitConfig(steps=40, batch_size=8), "seeds": 1}
    found = rl.search(model, *data, space, **settings, progress=options.progress)
    strengths = [0, found.variant.strength]
    scores = rl.evaluate(found.recommended, model, data[2], strengths, progress=False)
    return found, ["On the test rows:", "", "```", str(scores), "```"]


TASKS = {
    "gender": ("The gender of a name", gender),
    "emoji": ("Answers in emoji", emoji_answers),
    "sentiment": ("Sentiment", sentiment),
}


def section(title, task, found, lines, minutes):
    """Of one task on the page."""
    importance = found.importance().round(3).reset_index().to_dict("records")
    axes = [list(importance[0]), ["---"] * len(importance[0]), *(row.values() for row in importance)]
    table = [f"| {' | '.join(map(str, row))} |" for row in axes]
    said = ["```", str(found), "```", "", "What each axis matters, at the first rung:", "", *table]
    about = " ".join(task.__doc__.split())
    return "\n".join([f"## {title}", "", f"{about} {minutes:.1f} CPU minutes.", "", *said, "", *lines]).rstrip()


def write(path, new):
    """Each section in the place of the one with its title, the text before the first left as it is."""
    begin, *old = path.read_text("utf-8").split("\n## ") if path.exists() else ["# Searches on SmolLM2\n"]
    sections = {text.partition("\n")[0]: f"## {text}".rstrip() for text in old} | new
    path.write_text("\n\n".join([begin.rstrip(), *sections.values()]) + "\n", "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    if "sentiment" in options.tasks and (options.glue is None or not (options.glue / "sst2").is_dir()):
        parser.error("sentiment needs --glue FOLDER with sst2/train.jsonl and sst2/validation.jsonl")
    torch.set_num_threads(1)
    model = rl.load_model(progress=False)
    for name in options.tasks:
        (title, task), began = TASKS[name], time.process_time()
        found, lines = task(model, options)
        text = section(title, task, found, lines, (time.process_time() - began) / 60)
        print(text, flush=True)
        write(options.out / "search_smollm.md", {title: text})


if __name__ == "__main__":
    main()
