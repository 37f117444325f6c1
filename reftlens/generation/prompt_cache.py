"""Prompts read once for many generations: an edit at one strength or another changes only what lies in its cone.

A slider over strengths asks for the same prompts again and again. `prefill` keeps their keys and values, and the
residual stream at the first edited token and block; `generate` then starts from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.bridge.trial import check_predicts
from reftlens.bridge.weights import weights_state
from reftlens.cone.spans import first_block
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.site import Site
from reftlens.generation.rows import Rows
from reftlens.generation.runner import PromptStates, Runner, read
from reftlens.generation.stages import OVERHEAD
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt
from reftlens.text.vocabulary import check_vocabulary


@dataclass(frozen=True, eq=False)
class PromptCache:
    """Prompts, and what of them no edit at the sites of one `ReFT` can change. Made by `prefill`."""

    prompts: Batch
    sites: tuple[Site, ...]
    computation: str
    """What is reused, or why nothing is."""
    states: PromptStates | None = field(default=None, repr=False)
    weights: tuple[int, ...] = field(default=(), repr=False)
    """State of the model's weights when the prompts were read."""

    def __len__(self) -> int:
        return len(self.prompts)

    def check(self, reft: ReFT | None, model: Bridge) -> None:
        """Raise if these are not the sites, or this is not the model, that the prompts were read for."""
        if reft is None:
            raise ValueError("prefilled prompts are for the edits they were read for: use Variant(strength=0)")
        if reft.sites != self.sites:
            then, now = (", ".join(map(str, sites)) for sites in (self.sites, reft.sites))
            raise ValueError(f"the prompts were read for edits at {then}, not {now}")
        if self.states is not None and weights_state(model) != self.weights:
            raise ValueError("the model or its weights changed since the prompts were read: call prefill again")


Prompts = Sequence[Prompt] | Batch | PromptCache


@torch.no_grad()
def prefill(
    reft: ReFT, model: Bridge, prompts: Sequence[Prompt] | Batch, *, chat: bool = False, system: str | None = None
) -> PromptCache:
    """Read prompts once, for `generate(reft, model, prefilled, variant=…)` at any strength and with any edit there.

    The model's weights stay as they are: `generate` raises where they changed, unless it was a few numbers of a weight
    through `.data`, which torch does not count.
    """
    check_types(reft, model)
    check_deterministic(model)
    check_predicts(model)
    return read_prompts(reft, model, encoded(model, prompts, chat=chat, system=system))


def read_prompts(reft: ReFT, model: Bridge, batch: Batch, *, overhead: float | None = None) -> PromptCache:
    """What prompts begin alike is read once, where that pays at this `overhead` of a pass, in tokens."""
    rows, runner, places = Rows.of(batch, device_of(model)), Runner(model), reft.bind(model)
    with exclusive(model):
        obstacle, body = runner.obstacle(), runner.body
    if body is None or obstacle:
        return PromptCache(batch, reft.sites, f"nothing is reused: {obstacle}")
    blocks = [first_block(place.point.name or "", body.depth) for place in places]
    first = min(block for block in blocks if block is not None) if None not in blocks else None
    if first is None:
        return PromptCache(batch, reft.sites, "nothing is reused: a site has no known place among the blocks")
    view, last = rows.view, rows.tokens.shape[1] - 1
    edited = torch.stack([site.positions.mask(view) for site in reft.sites]).any(dim=0).any(dim=0)
    start = min([*edited.nonzero().flatten().tolist(), last])
    states = read(runner, rows, first, start, OVERHEAD[rows.tokens.device.type] if overhead is None else overhead)
    if states is None:
        return PromptCache(batch, reft.sites, "nothing is reused: a block has no keys and values of its own")
    blocks_below = f"blocks 0 to {first - 1} and " if first else ""
    alike = "" if states.distinct is None else f"; {states.distinct} of {int(rows.real.sum())} tokens were distinct"
    computation = f"{blocks_below}{start} of {last + 1} prompt tokens are reused{alike}"
    return PromptCache(batch, reft.sites, computation, states, weights_state(model))


def encoded(model: Bridge, prompts: Prompts, *, chat: bool, system: str | None) -> Batch:
    """The prompts as a batch.

    Raises:
        ValueError: where `chat` or `system` is given for prompts that are encoded already.
    """
    if not isinstance(prompts, Batch | PromptCache):
        return encode_prompts(model, prompts, chat=chat, system=system)
    if chat or system is not None:
        raise ValueError(f"a {type(prompts).__name__} comes with the template of its prompts: drop chat and system")
    batch = prompts if isinstance(prompts, Batch) else prompts.prompts
    check_vocabulary(model, batch, "prompts")
    return batch
