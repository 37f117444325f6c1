"""Texts of the same prompts at several strengths, computed beforehand: a slider that needs no kernel."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, SupportsFloat

import torch

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT, Variant
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import PromptCache, prefill
from reftlens.generation.result import Generation, marked_tokens
from reftlens.generation.session import Session
from reftlens.generation.site_edits import check_writes
from reftlens.generation.writing import generate_each
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt

if TYPE_CHECKING:
    from pandas import DataFrame

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""What a grid holds where nothing else is asked for."""

SCRIPT = """
document.querySelectorAll(".reftlens-grid[data-strengths]:not([data-live])").forEach(function (grid) {
  const input = grid.querySelector("input"), said = grid.querySelector("output");
  const strengths = JSON.parse(grid.dataset.strengths);
  function show() {
    const at = strengths[input.value];
    said.textContent = at;
    input.setAttribute("aria-valuetext", "strength " + at);
    grid.querySelectorAll("[data-at]").forEach(function (one) { one.hidden = one.dataset.at !== input.value; });
  }
  grid.dataset.live = "";
  grid.querySelector(".reftlens-dial").hidden = false;
  input.addEventListener("input", show);
  show();
});
"""
"""Shows one strength at a time; where no script runs, all of them stay visible."""

STYLE = """
.reftlens-grid pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.2em 0; }
.reftlens-grid pre { font: inherit; line-height: 1.45; }
.reftlens-grid mark { background: #ffe08a; color: #000; border-bottom: 2px solid #b35900; border-radius: 2px; }
.reftlens-grid pre.reftlens-read { font-family: ui-monospace, monospace; font-size: 0.8em; }
.reftlens-grid [hidden] { display: none !important; }
.reftlens-dial { display: flex; flex-wrap: wrap; gap: 0.4em 0.8em; align-items: center; }
.reftlens-dial label { display: flex; flex: 1; gap: 0.8em; align-items: center; }
.reftlens-dial input { flex: 1; min-width: 10em; max-width: 32em; accent-color: #0072b2; }
.reftlens-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16em), 1fr)); gap: 0 1.5em; }
.reftlens-pair h4 { margin: 0.6em 0 0; font-size: 0.9em; }
"""


@dataclass(frozen=True, eq=False)
class Grid:
    """Continuations of the same prompts at several strengths. Shown in a notebook, it is a slider without a kernel."""

    prompts: tuple[Prompt, ...]
    strengths: tuple[float, ...]
    """In ascending order, 0 (the unedited model) among them."""
    generations: tuple[Generation, ...]
    """For each strength, of all prompts."""
    computation: str
    """What of the prompts was read once for all strengths; or why nothing was."""

    def at(self, strength: float) -> Generation:
        """The continuations at one of the strengths."""
        if strength not in self.strengths:
            raise ValueError(f"strength {strength:g} is not in the grid, which has {_listed(self.strengths)}")
        return self.generations[self.strengths.index(strength)]

    def to_frame(self) -> "DataFrame":
        """One row per prompt and strength; `changed`: not the text of the unedited model."""
        import pandas as pd

        base = self.at(0.0).texts
        records = [
            {"row": row, "prompt": prompt_text(prompt), "strength": strength, "text": made.texts[row],
             "tokens": len(made.ids[row]), "changed": made.texts[row] != base[row]}
            for row, prompt in enumerate(self.prompts)
            for strength, made in zip(self.strengths, self.generations, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(records)

    def html(self) -> str:
        """The slider without style and script; with them it moves, and without them every strength is shown."""
        start = self.strengths.index(1.0) if 1.0 in self.strengths else len(self.strengths) - 1
        rows = "".join(self._row(row) for row in range(len(self.prompts)))
        return (
            f'<div class="reftlens-grid" data-strengths="{escape(json.dumps(self.strengths))}">'
            f'<div class="reftlens-dial" hidden><label>Strength <input type="range" min="0" step="1" '
            f'max="{len(self.strengths) - 1}" value="{start}"></label> <output aria-live="polite"></output></div>'
            f"{rows}</div>"
        )

    def _row(self, row: int) -> str:
        """One prompt with its unedited text, and the texts at every strength."""
        edited = "".join(
            f'<div data-at="{i}"><h4>Edited, strength {s:g}</h4><pre>{self.cell(row, s)}</pre></div>'
            for i, s in enumerate(self.strengths)
        )
        unedited = f"<div><h4>Unedited</h4><pre>{self.cell(row, 0.0)}</pre></div>"
        asked = f"<h3>{escape(prompt_text(self.prompts[row]))}</h3>{self.read(row)}"
        return f'{asked}<div class="reftlens-pair">{unedited}<div>{edited}</div></div>'

    def cell(self, row: int, strength: float) -> str:
        """HTML of what was written at a strength, edited tokens marked."""
        return marked_text(self.at(strength), row, acted=strength != 0.0) or "<em>(nothing)</em>"

    def read(self, row: int) -> str:
        """HTML of the prompt as the model reads it, from shortly before its first edited token; or nothing."""
        made = self.at(self.strengths[-1])
        ids, edited = made.prompt_ids[row], made.edited[row][: len(made.prompt_ids[row])]
        if not any(edited):
            return ""
        start = max(0, edited.index(True) - 12)
        shown = marked_tokens(made.tokenizer, ids[start:], edited[start:])
        return f'<pre class="reftlens-read">{"… " if start else ""}{shown}</pre>'

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.html()}<script>{SCRIPT}</script>"

    def __str__(self) -> str:
        lines = []
        for row, prompt in enumerate(self.prompts):
            lines.append(prompt_text(prompt))
            for strength, made in zip(self.strengths, self.generations, strict=True):
                lines.append(f"  strength {strength:<5g} {' '.join(made.texts[row].split())}")
        return "\n".join(lines)


def strength_grid(
    reft: ReFT,
    model: Bridge,
    prompts: Sequence[Prompt] | Batch,
    strengths: Sequence[SupportsFloat] = STRENGTHS,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    no_repeat_ngram: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Grid:
    """Continue the prompts at each strength, 0 included, all in one batch; prompts are read once.

    Args:
        seed: of sampling, where `temperature` is above 0; the same random numbers at every strength.

    Raises:
        ValueError: for an intervention that exchanges, as generation has no source to take from.
    """
    check_writes(reft)
    chosen = tuple(sorted({0.0, *(float(s) for s in strengths)}))
    batch = prompts if isinstance(prompts, Batch) else encode_prompts(model, prompts, chat=chat, system=system)
    read = prefill(reft, model, batch, chat=chat)
    made = generate_each(
        reft, model, read, [Variant(strength) for strength in chosen], max_new_tokens=max_new_tokens,
        temperature=temperature, no_repeat_ngram=no_repeat_ngram, seed=seed, progress=progress,
    )  # fmt: skip
    return Grid(tuple(e.prompt for e in batch.examples), chosen, tuple(made), read.computation)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text; of a chat, each turn with its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{t['role']}: {t['content']}" for t in prompt)


@torch.no_grad()
def writing(reft: ReFT, model: Bridge, read: PromptCache, variant: Variant, decoding: Decoding) -> Iterator[Generation]:
    """What was written so far, after each token. The model is edited only while it computes one."""
    read.check(reft, model)
    session = Session(reft, model, read, [variant], decoding)
    for _ in session.greedy_or_sampled():
        yield Generation.of(session.rows)


def marked_text(made: Generation, row: int, *, acted: bool) -> str:
    """HTML of what was written, edited tokens marked if the edit `acted`, without the special token that ends it."""
    ids, edited = list(made.ids[row]), made.edited[row][len(made.prompt_ids[row]) :]
    while ids and ids[-1] in made.tokenizer.all_special_ids:
        ids.pop()
    return marked_tokens(made.tokenizer, ids, [hit and acted for hit in edited[: len(ids)]])


def _listed(strengths: Sequence[float]) -> str:
    return ", ".join(f"{s:g}" for s in strengths)
