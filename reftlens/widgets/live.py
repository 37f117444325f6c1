"""A slider over the strength of an edit: a panel in a notebook, a grid of texts where no kernel is."""

import sys

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT, check_types
from reftlens.generation.decoding import Decoding, check_decoding
from reftlens.generation.prompt_cache import prefill
from reftlens.generation.site_edits import check_writes
from reftlens.text.template import Prompt
from reftlens.widgets.grid import Grid, strength_grid
from reftlens.widgets.panel import Slider


def slider(
    reft: ReFT,
    model: Bridge,
    prompt: Prompt,
    decoding: Decoding = Decoding(),
    *,
    chat: bool = False,
    system: str | None = None,
    strength: float = 1.0,
    low: float = -1.0,
    high: float = 3.0,
    live: bool | None = None,
) -> "Slider | Grid":
    """A panel with controls for strength, directions, positions and seed; where no kernel is, a `Grid`.

    Under the panel a grid of a few strengths is computed while the kernel is idle: it still slides in the saved
    notebook. In a notebook that a program runs, such as `nbconvert --execute`, ask for `live=False`.

    Args:
        strength: where the panel starts.
        low: the lower end of the strength slider; 0 is the unedited model.
        high: its upper end; 1 is the edit as trained.
        decoding: how text is written; the panel starts at its temperature (0 is greedy) and seed.
        live: True for the panel, False for the grid; None: the panel in a Jupyter kernel, the grid elsewhere.

    Raises:
        ImportError: for the panel without ipywidgets.
        ValueError: for an intervention that exchanges, as generation has no source to take from; and for beams in
            the panel.
    """
    check_types(reft, model)
    check_writes(reft)
    check_decoding(decoding)
    if not (in_kernel() if live is None else live):
        return strength_grid(reft, model, [prompt], decoding=decoding, chat=chat, system=system)
    if not low < high or not low <= strength <= high:
        raise ValueError(f"low={low:g}, strength={strength:g}, high={high:g}: expected them in this order, low < high")
    if decoding.beams > 1:
        raise ValueError("the panel shows each token as it is written, and needs beams=1: ask for live=False")
    prompts = prefill(reft, model, [prompt], chat=chat, system=system)
    return Slider(reft, model, prompts, decoding, (low, strength, high))


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
