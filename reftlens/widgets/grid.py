"""Texts of the same prompts at several strengths, computed beforehand: a slider that needs no kernel."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, SupportsFloat

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import prefill
from reftlens.generation.result import Generation, marked_tokens
from reftlens.generation.site_edits import check_writes
from reftlens.generation.writing import generate
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt

if TYPE_CHECKING:
    from pandas import DataFrame

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""What a grid holds where nothing else is asked for."""

SCRIPT = """
document.querySelectorAll(".reftlens-grid[data-strengths]:not([data-live])").forEach(function (grid) {
  const input = grid.querySelector("input"), output = grid.querySelector("output");
  const strengths = JSON.parse(grid.dataset.strengths);
  function show() {
    const at = strengths[input.value];
    output.textContent = at;
    input.setAttribute("aria-valuetext", "strength " + at);
    grid.querySelectorAll("[data-at]").forEach(function (cell) { cell.hidden = cell.dataset.at !== input.value; });
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

        columns, unedited = ["row", "prompt", "strength", "text", "tokens", "changed"], self.at(0.0).texts
        records = [
            (row, prompt_text(prompt), strength, text, len(generation.ids[row]), text != unedited[row])
            for row, prompt in enumerate(self.prompts)
            for strength, generation in zip(self.strengths, self.generations, strict=True)
            for text in [generation.texts[row]]
        ]
        return pd.DataFrame(records, columns=pd.Index(columns))

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
        prompt = f"<h3>{escape(prompt_text(self.prompts[row]))}</h3>{self.read(row)}"
        return f'{prompt}<div class="reftlens-pair">{unedited}<div>{edited}</div></div>'

    def cell(self, row: int, strength: float) -> str:
        """HTML of what was written at a strength, edited tokens marked."""
        return marked_text(self.at(strength), row) or "<em>(nothing)</em>"

    def read(self, row: int) -> str:
        """HTML of the prompt as the model reads it, from shortly before its first edited token; or nothing."""
        generation = self.at(max(self.strengths, key=abs))
        ids, edited = generation.prompt_ids[row], generation.edited[row][: len(generation.prompt_ids[row])]
        if not any(edited):
            return ""
        start = max(0, edited.index(True) - 12)
        shown = marked_tokens(generation.tokenizer, ids[start:], edited[start:])
        return f'<pre class="reftlens-read">{"… " if start else ""}{shown}</pre>'

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.html()}<script>{SCRIPT}</script>"

    def __str__(self) -> str:
        lines = []
        for row, prompt in enumerate(self.prompts):
            lines.append(prompt_text(prompt))
            for strength, generation in zip(self.strengths, self.generations, strict=True):
                lines.append(f"  strength {strength:<5g} {' '.join(generation.texts[row].split())}")
        return "\n".join(lines)


def strength_grid(
    reft: ReFT,
    model: Bridge,
    prompts: Sequence[Prompt] | Batch,
    strengths: Sequence[SupportsFloat] = STRENGTHS,
    decoding: Decoding = Decoding(),
    *,
    chat: bool = False,
    system: str | None = None,
    progress: bool = True,
) -> Grid:
    """Continue the prompts at each strength, 0 included, all in one batch; prompts are read once.

    Raises:
        ValueError: for an intervention that exchanges, as generation has no source to take from.
    """
    check_writes(reft)
    every = tuple(sorted({0.0, *(float(s) for s in strengths)}))
    cached = prefill(reft, model, prompts, chat=chat, system=system)
    generations = generate(reft, model, cached, decoding, variant=every, progress=progress)
    return Grid(tuple(e.prompt for e in cached.prompts.examples), every, tuple(generations), cached.computation)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text; of a chat, each turn with its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{t['role']}: {t['content']}" for t in prompt)


def marked_text(generation: Generation, row: int) -> str:
    """HTML of what was written, edited tokens marked, without the special token that ends it."""
    ids, edited = list(generation.ids[row]), generation.edited[row][len(generation.prompt_ids[row]) :]
    while ids and ids[-1] in generation.tokenizer.all_special_ids:
        ids.pop()
    return marked_tokens(generation.tokenizer, ids, edited[: len(ids)])


def _listed(strengths: Sequence[float]) -> str:
    return ", ".join(f"{s:g}" for s in strengths)
