"""One intervention on the residual stream of a plain transformers model, call after call."""

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.attachment.blocks import Stream
from reftlens.attachment.calls import Call
from reftlens.attachment.generating import Uncopied
from reftlens.attachment.reading import Texts
from reftlens.editing.bound import Place
from reftlens.editing.edits import Part, TokenIndex
from reftlens.editing.reft import training_mode
from reftlens.editing.site import Site
from reftlens.editing.sources import Donor
from reftlens.editing.variant import Variant
from reftlens.interventions.base import Intervention
from reftlens.interventions.gates import Gated, undecided
from reftlens.text.view import Mask, TokenView


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass that is going on: its rows, with what was read of them before, from column `start` on."""

    texts: Texts
    start: int
    decided: dict[int, Float[Tensor, " row"]] = field(default_factory=dict)
    """See `History.decided`."""
    masks: dict[int, Mask] = field(default_factory=dict)
    """Of each site, the tokens from `start` on that are edited."""
    training: bool = False
    """Whether the model is in train mode."""
    fired: set[int] = field(default_factory=set)
    """Sites that hidden states have passed through."""


class Current(threading.local):
    """What goes on in a thread."""

    call: tuple[Call, Pass] | None = None
    """The pass that is going on."""
    outer: Any = None
    """The model that it began with."""
    lengths: tuple[int, ...] | None = None
    """See `Attachment.prompts`."""


class Acting(Uncopied):
    """One intervention on the hidden states that enter or leave a block."""

    def __init__(
        self, i: int, site: Site, module: Intervention, stream: Stream, variant: Variant, current: Current
    ) -> None:
        point = HookPoint()
        point.name = stream.name
        self.i, self.site, self.stream, self.variant, self.current = i, site, stream, variant, current
        self.place = Place(site, module, point)
        self.strength = self.place.strength(variant)
        self.reaches_response = variant.reaches_response(site)
        self.donor: Donor | None = None
        self.chosen = False

    @property
    def idle(self) -> bool:
        return isinstance(self.strength, float) and self.strength == 0.0

    def mask(self, view: TokenView, start: int) -> Mask:
        """The tokens of a pass that are edited; of the prompt alone where none after it can be."""
        mask = torch.zeros_like(view.real)[:, start:]
        if start == 0 or self.reaches_response:
            mask = self.variant.mask(self.site, view)[:, start:]
        self.chosen |= bool(mask.any())
        return mask

    def edited(self, h: Tensor) -> Tensor:
        """The hidden states of the pass that is going on, edited."""
        if self.current.call is None:
            raise ValueError(
                f"the block of {self.stream.name} runs, and the model that rl.attach was given was not called: call "
                "that one, whole (blocks that gradient checkpointing runs again in the backward pass cannot be edited)"
            )
        here = self.current.call[1]
        mask = here.masks[self.i]
        if tuple(h.shape[:2]) != tuple(mask.shape):
            raise ValueError(
                f"{self.stream.name} saw hidden states {list(h.shape)}, and the model was called on {list(mask.shape)} "
                "tokens: this model does not hold one vector for each token there"
            )
        here.fired.add(self.i)
        if self.idle or not bool(mask.any()):
            return h
        module, tokens = self.place.intervention, TokenIndex.of(mask.to(h.device))
        if any(x.device != h.device for x in (*module.parameters(), *module.buffers())):
            module.to(h.device)
        edit = self.place.edit(tokens, self.strength, **self._where(here, tokens))
        with training_mode(module, training=here.training):
            out = edit(h, self.place.point)
        return h if out is None else out

    def _where(self, here: Pass, tokens: TokenIndex) -> dict[str, Any]:
        """What the edit of some tokens depends on, beside their hidden states."""
        at = tokens.rows.to(here.texts.view.ids.device), tokens.columns.to(here.texts.view.ids.device) + here.start
        where: dict[str, Any] = {"steps": here.texts.view.steps[at].to(tokens.rows.device)}
        if self.donor is not None:
            assert here.texts.owners is not None
            where["source"] = self.donor.of(here.texts.owners[at[0].cpu()], here.texts.view.index[at])
        if self.i in here.decided and here.start > 0:
            where["decided"] = self._decision(here.decided[self.i], tokens)
        elif self.i in here.decided:
            where["observer"] = partial(self._look, here.decided)
        return where

    def _decision(self, decided: Tensor, tokens: TokenIndex) -> Float[Tensor, " tokens"]:
        """What the prompts of the rows have decided; `ValueError` where one had no token to decide by."""
        values, module = decided.to(tokens.rows.device)[tokens.rows], self.place.intervention
        if isinstance(module, Gated) and bool(values.isnan().any()):
            raise undecided(module.gate)
        return values

    def _look(self, decided: dict[int, Tensor], part: Part, h: Float[Tensor, "tokens d"]) -> None:
        """Take down what the prompts of the rows decide."""
        module, origin = part.intervention, part.origin
        if isinstance(module, Gated) and origin is not None:
            openness = module.openness(h, origin)[:, 0].detach()
            decided[self.i] = decided[self.i].to(openness).index_put((origin.rows,), openness)
