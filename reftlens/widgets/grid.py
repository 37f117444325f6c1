"""Texts of the same prompts at several strengths, computed beforehand: a slider that needs no kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

from markupsafe import Markup

from reftlens import figures
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.files import templates
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import prefill
from reftlens.generation.result import Generation, marked_tokens
from reftlens.generation.site_edits import check_writes
from reftlens.generation.writing import generate
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""What a grid holds by default."""
_FOLDER = Path(__file__).parent
SCRIPT, STYLE = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("grid.js", "grid.css"))


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
            strengths = ", ".join(f"{s:g}" for s in self.strengths)
            raise ValueError(f"strength {strength:g} is not in the grid, which has {strengths}")
        return self.generations[self.strengths.index(strength)]

    def to_frame(self) -> figures.DataFrame:
        """One row per prompt and strength; `changed`: not the text of the unedited model."""
        unedited, records = self.at(0.0).texts, []
        for row, prompt in enumerate(self.prompts):
            for strength, generation in zip(self.strengths, self.generations, strict=True):
                text, tokens = generation.texts[row], len(generation.ids[row])
                record = {"row": row, "prompt": prompt_text(prompt), "strength": strength, "text": text}
                records.append(record | {"tokens": tokens, "changed": text != unedited[row]})
        return figures.table(records)

    def html(self) -> str:
        """The slider without style and script; with them it moves, and without them every strength is shown."""
        return templates(_FOLDER).get_template("grid.html.j2").render(grid=self, prompts=map(prompt_text, self.prompts))

    def cell(self, row: int, strength: float) -> Markup:
        """HTML of what was written at a strength, edited tokens marked."""
        return marked_text(self.at(strength), row) or Markup("<em>(nothing)</em>")

    def read(self, row: int) -> Markup:
        """HTML of the prompt as the model reads it, from shortly before its first edited token; or nothing."""
        generation = self.at(max(self.strengths, key=abs))
        ids, edited = generation.prompt_ids[row], generation.edited[row][: len(generation.prompt_ids[row])]
        if not any(edited):
            return Markup()
        start = max(0, edited.index(True) - 12)
        tokens = marked_tokens(generation.tokenizer, ids[start:], edited[start:])
        return Markup('<pre class="reftlens-read">{}{}</pre>').format("… " if start else "", tokens)

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


def marked_text(generation: Generation, row: int) -> Markup:
    """HTML of what was written, edited tokens marked, without the special token that ends it."""
    ids, edited = list(generation.ids[row]), generation.edited[row][len(generation.prompt_ids[row]) :]
    while ids and ids[-1] in generation.tokenizer.all_special_ids:
        ids.pop()
    return marked_tokens(generation.tokenizer, ids, edited[: len(ids)])
