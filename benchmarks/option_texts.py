"""What SmolLM2-135M knows of the commonsense sets where no letter stands for an option: `--data FOLDER`.

The unedited model is asked the same test rows as `reftlens run commonsense`, once as the recipe does, where it names an
option by its number, and once by the texts of the options: the likeliest continuation of the question, per byte.
"""

import argparse
from pathlib import Path

import torch

import reftlens as rl
from reftlens.experiments import RECIPES, Row, Scope
from reftlens.experiments.answers.scores import accuracy, difference

TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge")


def continued(row: Row) -> list[rl.Example]:
    """The question and each option as what follows it."""
    words = row.prompt.split("\n\n")[0].split(": ", 1)[1]
    asked = words if row.task == "hellaswag" else f"Question: {words}\nAnswer:"
    return [rl.Example(asked, f" {option.strip()}") for option in row.fields["options"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    arguments = parser.parse_args()
    recipe = RECIPES["commonsense"]
    subject = recipe.subject(None, "bfloat16")
    trial = recipe.trial("mix", "base", 0, subject, Scope(arguments.data, TASKS, arguments.limit))
    trial.fit(None, progress=False)
    base = trial.trained.acting
    for task in TASKS:
        rows, by_number, by_text = trial.questions(task), [], []
        for row, prediction in zip(rows, trial.answers(rows, ("likelihood",)), strict=True):
            options = continued(row)
            scores = base.log_probs(rl.encode(subject.bridge, options, end=False, boundary="split"), 8)
            lengths = torch.tensor([len(option.completion.encode()) for option in options])
            by_text.append(row.choices[int((scores / lengths).argmax())] == row.answer)
            by_number.append(prediction.given["likelihood"] == row.answer)
        number, text = torch.tensor(by_number), torch.tensor(by_text)
        less = difference(text.double(), number.double())
        print(f"{task}: by number {accuracy(number):.3f}, by text {accuracy(text):.3f}, paired {less:+.3f}", flush=True)


if __name__ == "__main__":
    main()
