"""A learning curve from few examples: a method trained on them, against the same examples in the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from reftlens import figures
from reftlens.experiments.methods.method import Method, Trained
from reftlens.experiments.methods.refts import Unedited
from reftlens.experiments.methods.subjects import Subject
from reftlens.figures import Axes, DataFrame
from reftlens.numbers import Integers, seeded, whole, whole_numbers
from reftlens.scoring.statistics import Estimate, mean_of
from reftlens.text.encoding import encode
from reftlens.text.template import Example
from reftlens.training.config import FitConfig


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Which test rows were answered right after so many examples."""

    method: str
    shots: tuple[int, ...]
    trained: Bool[Tensor, "shots seed row"]
    in_context: Bool[Tensor, "shots seed row"]
    """With the same examples before the question, and no training."""
    unedited: Bool[Tensor, " row"]

    def estimates(self, name: str) -> list[Estimate]:
        """Accuracy at each number of examples with its 95 % interval over rows, of the mean over seeds; `name` is
        `"trained"` or `"in_context"`."""
        right: Tensor = {"trained": self.trained, "in_context": self.in_context}[name]
        return [mean_of(of_shots.double().mean(dim=0)) for of_shots in right]

    def to_frame(self) -> DataFrame:
        """One row per number of examples."""
        pairs = zip(self.shots, self.estimates("trained"), self.estimates("in_context"), strict=True)
        return figures.table(
            [{"shots": n, **a.as_columns("trained"), **b.as_columns("in_context")} for n, a, b in pairs], "shots"
        )

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """Accuracy over the number of examples, trained and in the prompt, with 95 % bands."""
        ax = figures.axes(ax)
        figures.level(ax, self.unedited.double().mean().item(), "unedited model")
        names = figures.entry(ax, label, self.method), figures.entry(ax, label, "in context")
        figures.curve(ax, list(self.shots), self.estimates("trained"), names[0], color)
        figures.curve(ax, list(self.shots), self.estimates("in_context"), names[1], color)
        ax.set(xlabel="examples", ylabel="accuracy", ylim=(0, 1))
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        rows = len(self.unedited)
        lines = [f"accuracy on {rows} rows, {self.trained.shape[1]} seeds; unedited {mean_of(self.unedited.double())}:"]
        pairs = zip(self.shots, self.estimates("trained"), self.estimates("in_context"), strict=True)
        lines += [f"{n:>4} examples: {self.method} {a}, in context {b}" for n, a, b in pairs]
        return figures.screenful(lines)


def learning_curve(
    method: Method,
    subject: Subject,
    examples: Sequence[Example],
    test: Sequence[Example],
    answers: Sequence[str],
    *,
    shots: Integers = (4, 8, 16, 32),
    seeds: Integers = (0, 1, 2),
    config: FitConfig = FitConfig(steps=200, lr=2e-3),
    separator: str = "\n\n",
    progress: bool = True,
) -> LearningCurve:
    """Train a method on a few examples, drawn by each seed, and ask the model with as many in its prompt.

    A row is answered by the likeliest of `answers`, the completions that there are; that of a test row is its own.

    Raises:
        ValueError: for fewer examples than shots, a completion that is none of `answers`, or a prompt that is longer
            than the model's context.
    """
    counts, numbers = whole_numbers(shots, "shots"), whole_numbers(seeds, "seed")
    if not counts or not numbers or max(counts) > len(examples):
        raise ValueError(f"shots={list(counts)}, seeds={list(numbers)}: expected some, and up to {len(examples)} shots")
    if odd := [e.completion for e in (*examples, *test) if e.completion not in answers]:
        raise ValueError(f"completion {odd[0]!r} is none of the answers {', '.join(map(repr, answers))}")
    base = Unedited().fit(subject)
    trained = torch.zeros(len(counts), len(numbers), len(test), dtype=torch.bool)
    in_context = torch.zeros_like(trained)
    for s, seed in enumerate(numbers):
        order = torch.randperm(len(examples), generator=seeded(seed)).tolist()
        for n, count in enumerate(counts):
            some = [examples[i] for i in order[: whole(count, "shots", 1)]]
            data = encode(subject.bridge, some, end=False)
            fitted = method.fit(subject, data, config, seed=seed, progress=progress)
            trained[n, s] = right(fitted, test, answers)
            shown = "".join(f"{e.prompt}{e.completion}{separator}" for e in some)
            asked = [Example(f"{shown}{e.prompt}", e.completion) for e in test]
            in_context[n, s] = right(base, asked, answers)
    return LearningCurve(method.name, counts, trained, in_context, right(base, test, answers))


def right(trained: Trained, test: Sequence[Example], answers: Sequence[str]) -> Bool[Tensor, " row"]:
    """Which rows have their own completion as the likeliest of the answers."""
    rows = [Example(example.prompt, answer) for example in test for answer in answers]
    data = encode(trained.subject.bridge, rows, end=False)
    likeliest = trained.log_probs(data).view(len(test), len(answers)).argmax(dim=1).tolist()
    return torch.tensor([answers[i] == e.completion for i, e in zip(likeliest, test, strict=True)])
