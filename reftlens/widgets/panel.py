"""The panel that `slider` shows: controls, the prompt with its edited tokens, the edited text beside the unedited one.

Text is written by a task on the kernel's own event loop, one token at a time. Hooks are attached for the length of one
forward pass, so between two tokens the model is as the user left it, and a cell that runs meets no hook of ours.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from markupsafe import Markup

from reftlens.analysis.places.questions import edited_positions
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.generation.decoding import Decoding
from reftlens.generation.probe import checked
from reftlens.generation.prompt_cache import PromptCache
from reftlens.generation.result import Generation, marked_tokens
from reftlens.generation.session import Session
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions, Response
from reftlens.widgets.grid import STRENGTHS, STYLE, Grid, marked_text

_WAIT = 0.02  # seconds; a control that is dragged sends many values, and only the last one is written for
_BREATH = 0.01  # seconds between tokens: the kernel takes several turns of the loop to read one message
_EVERYWHERE = "all edited tokens"
_MOST_DIRECTIONS = 16


def widgets() -> Any:
    """The module ipywidgets; an error says how to get it."""
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            'the panel needs ipywidgets: pip install "reftlens[notebook]", or ask for the grid with live=False'
        ) from error
    return ipywidgets


class Slider:
    """What `slider` shows in a kernel. Each control is a widget, so a program can move it as well.

    `dial` is where the control of strength begins, stands and ends.
    """

    def __init__(
        self, reft: ReFT, model: Bridge, prompts: PromptCache, decoding: Decoding, dial: tuple[float, float, float]
    ) -> None:
        self.reft, self.model, self.prompts = reft, model, prompts
        self.places = _places(reft, prompts.prompts)
        self.edited: Generation | None = None
        """What is written, so far."""
        self.unedited: Generation | None = None
        self.first_token: float | None = None
        """Seconds from the last move of a control to the first new token."""
        self._decoding = decoding
        self._unedited_with: Decoding | None = None
        self._saved_texts: dict[float, Generation] = {}
        self._saved_view: Any = None
        self._task: asyncio.Task[None] | None = None
        self._build(*dial)

    # -- the panel ---------------------------------------------------------------------------------------------

    def _build(self, low: float, strength: float, high: float) -> None:
        w, decoding = widgets(), self._decoding
        style, fits = {"description_width": "7em"}, {"width": "32em", "max_width": "calc(100% - 4px)"}
        look = {"style": style, "layout": w.Layout(**fits)}
        on_a_phone = {"flex_flow": "row wrap", "height": "auto"}  # name and slider in a line each
        slides = {"style": style, "layout": w.Layout(**fits, **on_a_phone)}
        self.strength = w.FloatSlider(strength, min=low, max=high, step=0.05, description="strength", **slides)
        self.positions = w.Dropdown(options=list(self.places), description="positions", **look)
        self.temperature = w.FloatSlider(
            decoding.temperature, min=0, max=2, step=0.1, description="temperature", **slides
        )
        self.seed = w.IntText(decoding.seed, description="seed", disabled=decoding.temperature == 0, **look)
        self.directions = [
            w.FloatSlider(1.0, min=-2, max=3, step=0.1, description=f"direction {i}", **slides)
            for i in range(_shared_rank(self.reft))
        ]
        self.prompt_view, self.base_view, self.edited_view, self.status = (w.HTML() for _ in range(4))
        self.base_view.layout.flex = self.edited_view.layout.flex = "1 1 18em"
        by_direction = w.Accordion([w.VBox(self.directions)], selected_index=None)
        by_direction.set_title(0, "strength of each direction (columns of the basis, as trained)")
        controls = [self.strength, self.positions, self.temperature, self.seed]
        texts = w.HBox([self.base_view, self.edited_view], layout=w.Layout(flex_flow="row wrap", grid_gap="1.5em"))
        shown = [*controls, *([by_direction] if self.directions else []), self.prompt_view, texts, self.status]
        self.panel = w.VBox(shown).add_class("reftlens-slider")
        for control in (*controls, *self.directions):
            control.observe(self._moved, names="value")

    def variant(self) -> Variant:
        """What the controls say."""
        among, factors = self.places[self.positions.value], [d.value for d in self.directions] or [1.0]
        strengths = [self.strength.value * factor for factor in factors]
        strength = strengths[0] if len(set(factors)) == 1 else strengths
        acting = [i for i, site in enumerate(self.reft.sites) if self._acts(site, among)]
        return Variant(strength, among, None if len(acting) == len(self.reft) else acting)

    def decoding(self) -> Decoding:
        """What the controls say of how tokens are chosen."""
        if self.temperature.value == 0:
            return replace(self._decoding, temperature=0.0, top_k=None, top_p=None)
        return replace(self._decoding, temperature=self.temperature.value, seed=self.seed.value)

    def _acts(self, site: Site, among: Positions | None) -> bool:
        variant = Variant(among=among)
        return variant.reaches_response(site) or bool(variant.mask(site, self.prompts.prompts.view).any())

    def _moved(self, _: Any) -> None:
        self.seed.disabled = self.temperature.value == 0
        self.write()

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write anew; what is still being written is given up. Where no event loop runs, it is done at once."""
        if self._task is not None:
            self._task.cancel()
        self._show_prompt()
        steps = self._report_errors(self._steps(time.perf_counter()))
        try:
            self._task = asyncio.get_running_loop().create_task(_stepwise(steps))
        except RuntimeError:
            for _ in steps:
                pass

    def _report_errors(self, steps: Iterator[None]) -> Iterator[None]:
        """The steps; an error is shown in the panel, as nobody waits for a task of the event loop."""
        try:
            yield from steps
        except ValueError as error:
            self.status.value = _status(f"{error}; then make a new slider")

    def _steps(self, start: float) -> Iterator[None]:
        """One token at a time: the edited text, then the unedited one if it is not there, then what is to be saved."""
        variant, decoding = self.variant(), self.decoding()
        self.edited = self.first_token = None
        self.status.value = _status("writing …")
        for generation in self._drafts(variant, decoding):
            if self.first_token is None:
                self.first_token = time.perf_counter() - start
            self.edited = generation
            self.edited_view.value = _block(f"Edited, strength {self.strength.value:g}", generation)
            yield
        seconds = time.perf_counter() - start
        if self._unedited_with != decoding:
            for generation in self._drafts(Variant(0.0), decoding):
                self.unedited = generation
                self.base_view.value = _block("Unedited", generation)
                yield
            self._unedited_with = decoding
        times = f"first token after {self.first_token:.2f} s, all after {seconds:.1f} s"
        self.status.value = _status(f"{times}; {self.prompts.computation}")
        if self._saved_view is not None:
            yield from self._save()

    @torch.no_grad()
    def _drafts(self, variant: Variant, decoding: Decoding) -> Iterator[Generation]:
        """What was written so far, after each token; the model is edited only while it computes one."""
        self.prompts.check(self.reft, self.model)
        session = checked(Session(self.reft, self.model, self.prompts, [variant], decoding))
        for _ in session.greedy_or_sampled():
            yield Generation.of(session.rows)

    def _save(self) -> Iterator[None]:
        """The grid for the saved notebook, greedy; strengths that are done are not done again."""
        greedy = replace(self._decoding, temperature=0.0, top_k=None, top_p=None)
        for strength in [s for s in STRENGTHS if s not in self._saved_texts]:
            drafts = []
            for draft in self._drafts(Variant(strength), greedy):
                drafts = [draft]
                yield
            self._saved_texts[strength] = drafts[0]
        generations = tuple(self._saved_texts[s] for s in STRENGTHS)
        prompts = tuple(example.prompt for example in self.prompts.prompts.examples)
        grid = Grid(prompts, STRENGTHS, generations, self.prompts.computation)
        self._saved_view.update(_details(grid._repr_html_()))
        self._saved_view = None

    # -- what is shown -----------------------------------------------------------------------------------------

    def _show_prompt(self) -> None:
        batch, variant = self.prompts.prompts, self.variant()
        sites = range(len(self.reft)) if variant.sites is None else variant.sites
        masks = [variant.mask(self.reft.sites[i], batch.view)[0] for i in sites]
        acted = [bool(hit) and variant.strength != 0.0 for hit in torch.stack(masks).any(dim=0)]
        shown = marked_tokens(batch.tokenizer, batch.tokens[0].tolist(), acted)
        read = Markup('<div class="reftlens-grid"><pre class="reftlens-read">{}</pre></div>').format(shown)
        self.prompt_view.value = f"<style>{STYLE}</style>{read}"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.panel)
        self._saved_view = display(_details("<p>being computed while the kernel is idle …</p>"), display_id=True)
        self.write()


async def _stepwise(steps: Iterator[None]) -> None:
    """Go through the steps, letting the kernel take messages between them."""
    await asyncio.sleep(_WAIT)
    for _ in steps:
        await asyncio.sleep(_BREATH)


def _places(reft: ReFT, prompt: Batch) -> dict[str, Positions | None]:
    """The options of the control of positions: everything, or one edited token, or what is written."""
    places: dict[str, Positions | None] = {_EVERYWHERE: None}
    if any(bool(site.positions.mask(prompt.view).any()) for site in reft.sites):
        ids = prompt.tokens[0].tolist()
        for name, where in edited_positions(reft, prompt).items():
            places[f"{name}  {prompt.tokenizer.decode([ids[int(name)]])!r}"] = where
    if any(site.positions.reaches_response for site in reft.sites):
        places["what is written"] = Response()
    return places


def _shared_rank(reft: ReFT) -> int:
    """The rank of all interventions, for a control of each direction; 0 where they differ or are many."""
    ranks = {module.rank for _, module in reft.items()}
    return max(ranks) if len(ranks) == 1 and max(ranks) <= _MOST_DIRECTIONS else 0


def _block(title: str, generation: Generation) -> str:
    return Markup('<div class="reftlens-grid"><b>{}</b><pre>{}</pre></div>').format(title, marked_text(generation, 0))


def _status(text: str) -> str:
    return Markup('<small role="status">{}</small>').format(text)


def _details(html: str) -> Any:
    """What a saved notebook shows, folded away where the panel is alive."""
    from IPython.display import HTML

    summary = "<summary>The same without a kernel: greedy texts at fixed strengths</summary>"
    return HTML(f'<details class="reftlens-saved">{summary}{html}</details>')
