"""A slider over the strength of an edit: a panel in a notebook, a grid of texts where no kernel is."""

import sys

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.generation.site_edits import check_writes
from reftlens.text.template import Prompt
from reftlens.widgets.grid import Grid, strength_grid
from reftlens.widgets.panel import Slider


def slider(
    reft: ReFT,
    model: Bridge,
    prompt: Prompt,
    *,
    chat: bool = False,
    system: str | None = None,
    strength: float = 1.0,
    low: float = -1.0,
    high: float = 3.0,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 48,
    live: bool | None = None,
) -> "Slider | Grid":
    """A panel with controls for strength, directions, positions and seed; where no kernel is, a `Grid`.

    Under the panel a grid of a few strengths is computed while the kernel is idle: it still slides in the saved
    notebook. In a notebook that a program runs, such as `nbconvert --execute`, ask for `live=False`.

    Args:
        low, high: ends of the strength slider; 1 is the edit as trained, 0 the unedited model.
        temperature: where the panel starts; 0 is greedy, and then the seed makes no difference.
        live: True for the panel, False for the grid; None: the panel in a Jupyter kernel, the grid elsewhere.

    Raises:
        ImportError: for the panel without ipywidgets.
        ValueError: for an intervention that exchanges, as generation has no source to take from.
    """
    check_writes(reft)
    if not (in_kernel() if live is None else live):
        return strength_grid(
            reft, model, [prompt], chat=chat, system=system, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed,
        )  # fmt: skip
    if not low < high or not low <= strength <= high:
        raise ValueError(f"low={low:g}, strength={strength:g}, high={high:g}: expected them in this order, low < high")
    return Slider(
        reft, model, prompt, chat=chat, system=system, strength=strength, low=low, high=high, temperature=temperature,
        seed=seed, max_new_tokens=max_new_tokens,
    )  # fmt: skip


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
