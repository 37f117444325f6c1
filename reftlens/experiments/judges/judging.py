"""Answers compared by a judge, each pair in both orders; and a judge behind an OpenAI-compatible endpoint.

A judge is any callable that takes what it is asked, a text, and returns its reply: a language model, a person at a
prompt, a rule. What it is asked for is a mark, `[[A]]`, `[[B]]`, `[[C]]` or `Rating: [[1]]`; replies without one are
parse failures, counted and left out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from reftlens.experiments.judges.marks import verdict_in
from reftlens.numbers import real, whole
from reftlens.scoring.statistics import Estimate, mean_of

Judge = Callable[[str], str]
PAIRWISE = """Two assistants answered the same instruction. Decide which answer is better: more helpful, correct, \
to the point and well written. Neither order nor length matters by itself.

[Instruction]
{instruction}

[Answer A]
{a}

[Answer B]
{b}

Reason in a sentence or two. Then end with one mark: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] \
if they are equally good."""


@dataclass(frozen=True)
class Duel:
    """One instruction, two answers, and what the judge replied to them in both orders."""

    instruction: str
    replies: tuple[str, str]
    """With the first answer as A, and with it as B."""

    @property
    def points(self) -> tuple[float | None, float | None]:
        """Of the first answer in each order: 1 for a win, 1/2 for a tie, 0 for a loss, None where nothing was read."""
        first, second = (verdict_in(reply) for reply in self.replies)
        return (
            None if first is None else {"A": 1.0, "tie": 0.5, "B": 0.0}[first],
            None if second is None else {"B": 1.0, "tie": 0.5, "A": 0.0}[second],
        )


@dataclass(frozen=True)
class WinRate:
    """How often the first answers win over the second; ties count half, and both orders of a pair as one row."""

    rate: Estimate
    """The mean over pairs of their points, with a bootstrap over pairs."""
    duels: tuple[Duel, ...]
    ties: int
    """Replies that said so."""
    failures: int
    """Replies in which nothing was read; a pair without any other is left out of the rate."""
    by_place: int
    """Pairs in which the judge preferred the same place in both orders, and so no answer."""

    def __repr__(self) -> str:
        count = len(self.duels)
        return (
            f"win rate {self.rate} over {self.rate.count} of {count} pair{'s' * (count != 1)}, {2 * count} replies: "
            f"{self.ties} ties, {self.failures} not read; {self.by_place} pairs decided by place alone"
        )


def win_rate(
    judge: Judge,
    instructions: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    template: str = PAIRWISE,
    workers: int = 1,
) -> WinRate:
    """How often `ours` are judged better than `theirs`.

    Args:
        template: what the judge is asked, with `{instruction}`, `{a}` and `{b}` in it; it has to ask for a mark.
        workers: questions that are asked at a time.

    Raises:
        ValueError: for texts that are not as many as the instructions, or where no reply at all could be read.
    """
    if not instructions or not len(instructions) == len(ours) == len(theirs):
        raise ValueError(f"{len(instructions)} instructions, {len(ours)} and {len(theirs)} answers, expected as many")
    if missing := [part for part in ("{instruction}", "{a}", "{b}") if part not in template]:
        raise ValueError(f"the template has no {missing[0]}, expected it to show instruction and both answers")
    asked = [
        filled(template, {"instruction": instruction, "a": first, "b": second})
        for instruction, a, b in zip(instructions, ours, theirs, strict=True)
        for first, second in ((a, b), (b, a))
    ]
    replies = replies_to(judge, asked, workers)
    pairs = zip(instructions, replies[::2], replies[1::2], strict=True)
    return rate_of([Duel(instruction, (first, second)) for instruction, first, second in pairs])


def rate_of(duels: Sequence[Duel]) -> WinRate:
    """The win rate of duels whose replies are known, such as stored ones."""
    points = [duel.points for duel in duels]
    means = [sum(read) / len(read) for pair in points if (read := [p for p in pair if p is not None])]
    every = [point for pair in points for point in pair]
    if not means:
        raise ValueError(
            f"none of {len(every)} replies could be read, expected a mark, [[A]], [[B]] or [[C]]; the first is "
            f"{duels[0].replies[0][:80]!r}"
            if duels
            else "no duels to rate"
        )
    return WinRate(
        mean_of(torch.tensor(means)), tuple(duels), every.count(0.5), every.count(None),
        sum(pair in ((1.0, 0.0), (0.0, 1.0)) for pair in points),
    )  # fmt: skip


def replies_to(judge: Judge, questions: Sequence[str], workers: int = 1) -> list[str]:
    """What a judge replies to each question, in their order."""
    if whole(workers, "workers", 1) == 1:
        return [reply_to(judge, question) for question in questions]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda question: reply_to(judge, question), questions))


def reply_to(judge: Judge, question: str) -> str:
    """What a judge replies to one question; `TypeError` where that is no text."""
    reply = judge(question)
    if not isinstance(reply, str):
        raise TypeError(f"the judge replied {reply!r}, expected text")
    return reply


@dataclass(frozen=True)
class Endpoint:
    """A judge behind an OpenAI-compatible endpoint; needs the extra `judge` (`openai`).

    Args:
        model: its name there.
        base_url: where it is, "http://localhost:8000/v1"; None is OpenAI's own, or `OPENAI_BASE_URL`.
        api_key: None is what `OPENAI_API_KEY` says; servers of one's own often take any.
        attempts: how often a question is asked again where no answer came, after a growing pause.

    Raises:
        ModuleNotFoundError: without the extra.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    attempts: int = 3
    timeout: float = 60.0

    def __post_init__(self) -> None:
        whole(self.max_tokens, "max_tokens", 1)
        whole(self.attempts, "attempts", 0)
        real(self.temperature, "temperature")
        _openai()

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, {self.base_url!r})"

    def __call__(self, question: str) -> str:
        """The reply to one question.

        Raises:
            ConnectionError: where the endpoint gave none, with what it said.
        """
        openai = _openai()
        try:
            with openai.OpenAI(
                base_url=self.base_url, api_key=self.api_key, max_retries=self.attempts, timeout=self.timeout
            ) as client:
                reply: Any = client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": question}],
                    temperature=self.temperature, max_tokens=self.max_tokens,
                )  # fmt: skip
            return _content(reply)
        except (openai.OpenAIError, ValueError) as error:  # what is no JSON is a ValueError
            raise ConnectionError(
                f"{self.model} at {self.base_url or 'the default address'} gave no reply: {error}; check base_url=, "
                "api_key= (or OPENAI_API_KEY) and the name of the model"
            ) from error


def _content(reply: Any) -> str:
    """The text of a reply, empty where the model wrote none; `ValueError` for what an endpoint sends in its place."""
    try:
        content = reply.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        raise ValueError(
            f"it sent {str(getattr(reply, 'error', None) or reply)[:200]!r}, expected a chat completion with a choice"
        ) from None
    if not isinstance(content, str | None):
        raise ValueError(f"its message holds {str(content)[:200]!r}, expected text")
    return content or ""


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ModuleNotFoundError('a judge behind an endpoint needs openai: pip install "reftlens[judge]"') from None
    return openai


def filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with its named parts in place; braces within the texts are text."""
    return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), template)
