"""How rows are asked: a model writes texts in which answers are read, or says which answer is the likeliest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftlens.experiments.methods import Trained
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.rows.task import Row
from reftlens.experiments.runs.records import Prediction
from reftlens.text.encoding import encode, encode_prompts
from reftlens.text.template import Example

if TYPE_CHECKING:
    from reftlens.experiments.recipes.texts import TextRecipe

WRITTEN, LIKELIHOOD, TEXT = "written", "likelihood", "text"
"""Ways of answering: the model writes a text, in which the task's rule reads an answer; the answer of the highest
log-probability, summed over its tokens; a text that only a judge can score."""


@dataclass(frozen=True)
class Asking:
    """Rows asked as a recipe says, of one model."""

    recipe: "TextRecipe"
    subject: Subject

    def answers(self, trained: Trained, rows: Sequence[Row], ways: Sequence[str]) -> list[Prediction]:
        """What is answered to rows in these ways; nothing, to one that does not fit, with the longest of its choices
        and, where a text is written, with all that may be.

        By likelihood, only where each row has a few answers: a similarity from 0 to 5 has not.
        """
        ways = [way for way in ways if way != LIKELIHOOD or all(row.choices for row in rows)]
        longest = [max(self._written(row), key=len) if row.choices else "" for row in rows]
        fits = [i for i, row in enumerate(rows) if self.fits(row.prompt + longest[i]) and self._has_room(row, ways)]
        named = [way for way in ways if way != TEXT]
        given: list[dict[str, str | None]] = [dict.fromkeys(named) for _ in rows]
        details: list[dict[str, Any]] = [{} for _ in rows]
        some = [rows[i] for i in fits]
        if _writes(ways) and some:
            for i, row, text in zip(fits, some, self._texts(trained, some), strict=True):
                asked = {"instruction": row.fields["question"]} if TEXT in ways else {}
                details[i] |= {**asked, "text": text}
                given[i] |= {WRITTEN: self._read(row, text)} if WRITTEN in ways else {}
        if LIKELIHOOD in ways and some:
            for i, values in zip(fits, self._log_probs(trained, some), strict=True):
                given[i][LIKELIHOOD] = max(values, key=lambda choice: values[choice])
                details[i]["log_probs"] = values
        return [
            Prediction(row.task, row.index, row.answer, g, details=d if i in set(fits) else {"fits": False})
            for i, (row, g, d) in enumerate(zip(rows, given, details, strict=True))
        ]

    def tokens(self, rows: Sequence[Row], ways: Sequence[str]) -> tuple[int, int]:
        """How many `answers` reads, and how many it writes at most."""
        asked = sum(self.length(row.prompt) for row in rows)
        scored = sum(self.length(row.prompt + answer) for row in rows if row.choices for answer in self._written(row))
        written = len(rows) * self.recipe.decoding.max_new_tokens
        return scored * (LIKELIHOOD in ways) + asked * _writes(ways), written * _writes(ways)

    def length(self, text: str) -> int:
        return len(self.subject.bridge.tokenizer(text).input_ids)

    def fits(self, text: str) -> bool:
        """With two tokens to spare, for a BOS token and the end."""
        return self.length(text) + 2 <= self.most

    def fitting(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that fit with their completions; `ValueError` where none does."""
        if found := [row for row in rows if self.fits(row.prompt + row.completion)]:
            return found
        raise ValueError(
            f"none of {len(rows)} training rows fits into {self.most} tokens, two of them to spare: the longest row of "
            f"the recipe has {self.recipe.max_length}, the model's context {self.subject.bridge.cfg.n_ctx}"
        )

    def check_room(self, rows: Sequence[Row]) -> None:
        """`ValueError` where what is written to rows cannot fit, in any of them."""
        if not any(self._has_room(row, self.recipe.ways) for row in rows):
            raise ValueError(
                f"none of {len(rows)} test rows leaves room for the {self.recipe.decoding.max_new_tokens} tokens that "
                f"may be written to it, in the model's context of {self.subject.bridge.cfg.n_ctx}"
            )

    @property
    def most(self) -> int:
        """Tokens of the longest row that fits."""
        return min(self.recipe.max_length, self.subject.bridge.cfg.n_ctx)

    def _has_room(self, row: Row, ways: Sequence[str]) -> bool:
        """For a BOS token and all that may be written, where a text is."""
        written = self.recipe.decoding.max_new_tokens if _writes(ways) else 0
        return self.length(row.prompt) + 1 + written <= self.subject.bridge.cfg.n_ctx

    def _texts(self, trained: Trained, rows: Sequence[Row]) -> list[str]:
        prompts = encode_prompts(self.subject.bridge, [row.prompt for row in rows])
        return trained.texts(prompts, self.recipe.decoding)

    def _log_probs(self, trained: Trained, rows: Sequence[Row]) -> list[dict[str, float]]:
        """For each row the log-probability of each of its answers, in nats, summed over the answer's tokens."""
        examples = [Example(row.prompt, answer) for row in rows for answer in self._written(row)]
        values = trained.log_probs(encode(self.subject.bridge, examples, end=False, boundary="split")).tolist()
        found, start = [], 0
        for row in rows:
            found.append(dict(zip(row.choices, values[start : start + len(row.choices)], strict=True)))
            start += len(row.choices)
        return found

    def _written(self, row: Row) -> list[str]:
        """The completions of all answers; the right one, where there is no choice."""
        task = self.recipe.task(row.task)
        return [task.written(answer, row) for answer in row.choices or (row.answer,)]

    def _read(self, row: Row, text: str) -> str | None:
        """The answer in a text; the right one as the row writes it, where it is the same."""
        task = self.recipe.task(row.task)
        answer = task.extract(text, row)
        return row.answer if answer is not None and task.equal(answer, row.answer) else answer


def _writes(ways: Sequence[str]) -> bool:
    return WRITTEN in ways or TEXT in ways
