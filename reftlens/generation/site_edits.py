"""Which tokens of a generation in progress are edited, and how strongly in each row."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.editing.edits import Edit, Part, TokenIndex
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.variant import Variant
from reftlens.generation.rows import Rows
from reftlens.interventions.gates import Gated, undecided
from reftlens.text.view import Mask


def check_writes(reft: ReFT) -> None:
    """Raise for an intervention that exchanges: generation has no source to take from."""
    for site, module in reft.items():
        if module.variables:
            raise ValueError(f"{module.kind} at {site} copies from a source, and generation has none to copy from")


class SiteEdits:
    """The edits of one `ReFT` in one generation: rows come in equal parts, one for each of `variants`.

    Args:
        variants: that differ in strength only.

    Raises:
        ValueError: for an intervention that exchanges, or a site that can act on prompts only and chooses none of
            their tokens.
    """

    def __init__(self, reft: ReFT, model: Bridge, variants: Sequence[Variant], prompts: Rows) -> None:
        check_writes(reft)
        self.reft, self.variant = reft, variants[0]
        self.places = reft.to(prompts.tokens.device).bind(model)
        self.sites = self.variant.active(self.places)
        self.unused, self.prompt_width = set(self.sites), prompts.tokens.shape[1]
        on_prompts = [i for i in self.sites if not self.variant.reaches_response(reft.sites[i])]
        if on_prompts:
            replace(self.variant, sites=on_prompts).require(reft.sites, prompts.view)
        with torch.no_grad():
            self.bases = {i: reft[i].basis() for i in self.sites}
        each = len(prompts) // len(variants)
        self.strengths = {i: self._strengths(i, variants).repeat_interleave(each, dim=0) for i in self.sites}
        self.decided = {i: torch.full((len(prompts),), torch.nan) for i in self.sites if reft[i].remembers}
        """Of each row, at sites where the prompt decides how far the edit acts; NaN where it has not."""

    def _strengths(self, i: int, variants: Sequence[Variant]) -> Float[Tensor, "variant _"]:
        """At one site, for each variant: one for all directions of the basis, or one for each; on the CPU."""
        strengths = [torch.as_tensor(self.places[i].strength(v), dtype=torch.float64) for v in variants]
        width = max(strength.numel() for strength in strengths)
        return torch.stack([strength.expand(width) for strength in strengths])

    def take(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with the rows of these numbers, some of them left out or there several times."""
        self.strengths = {i: strengths[rows.cpu()] for i, strengths in self.strengths.items()}
        self.decided = {i: decided[rows.to(decided.device)] for i, decided in self.decided.items()}

    def of(self, rows: Int[Tensor, " rows"]) -> "SiteEdits":
        """The edits of some rows alone."""
        edits = copy(self)
        edits.take(rows)
        return edits

    def at(self, rows: Rows, start: int, stop: int) -> list[Edit]:
        """The edits of the columns `start` to `stop`; none at strength 0, so that the model computes bit for bit.

        Where they act is marked in `rows`; behind a gate once they have run, as it is open there.
        """
        edits, steps = [], rows.view.steps[:, start:stop] if any(p.looks_around for p in self.places) else None
        for i, mask in self._masks(rows, start, stop).items():
            if mask.any():
                tokens, observer = TokenIndex.of(mask), None
                where = {} if steps is None else {"steps": steps[tokens.rows, tokens.columns]}
                if i in self.decided and start >= self.prompt_width:
                    where["decided"] = self._decision(i, tokens)
                if isinstance(self.reft[i], Gated):
                    observer = partial(self._look, i, rows.edited[:, start:stop], tokens)
                else:
                    rows.edited[:, start:stop] |= mask
                strengths = self.strengths[i][tokens.rows.cpu()]
                edits.append(self.places[i].edit(tokens, strengths, basis=self.bases[i], observer=observer, **where))
        return edits

    def _decision(self, i: int, tokens: TokenIndex) -> Float[Tensor, " tokens"]:
        """What the prompts of the rows have decided; `ValueError` where one had no token to decide by."""
        decided, module = self.decided[i][tokens.rows], self.reft[i]
        if isinstance(module, Gated) and bool(decided.isnan().any()):
            raise undecided(module.gate)
        return decided

    def _look(self, i: int, edited: Mask, tokens: TokenIndex, part: Part, h: Float[Tensor, "tokens d"]) -> None:
        """Mark the tokens at which a gate is open, and take down what the prompts of the rows decide there."""
        module, origin = part.intervention, part.origin
        assert isinstance(module, Gated)
        openness = module.openness(h, origin)[:, 0]
        edited[tokens.rows, tokens.columns] |= openness > 0
        if i in self.decided and origin is not None and origin.decided is None:
            self.decided[i] = self.decided[i].to(openness).index_put((origin.rows,), openness)

    def act_before(self, rows: Rows, stop: int) -> bool:
        """Whether any acts in the columns before this one."""
        return stop > 0 and any(bool(mask.any()) for mask in self._masks(rows, 0, stop).values())

    def computations(self, prompts: Rows) -> tuple[Int[Tensor, "row column"], int]:
        """Of each token a number, equal for tokens that are the same and edited alike.

        And the first column that is edited together with later ones of its row, or the number of columns.
        """
        numbers, pooled = [prompts.tokens], prompts.tokens.shape[1]
        for i, mask in self._masks(prompts, 0, pooled).items():
            strengths = torch.unique(self.strengths[i], dim=0, return_inverse=True)[1].to(mask.device)
            number = torch.where(mask, 1 + strengths[:, None], 0)
            numbers += [] if any(torch.equal(number, other) for other in numbers) else [number]
            if self.places[i].intervention.pools and mask.any():
                pooled = min(pooled, int(mask.any(dim=0).nonzero()[0]))
        every = torch.stack(numbers, dim=2).flatten(0, 1)
        return torch.unique(every, dim=0, return_inverse=True)[1].view(prompts.tokens.shape), pooled

    def _masks(self, rows: Rows, start: int, stop: int) -> dict[int, Mask]:
        """Of the sites that choose some of these columns, what is edited there."""
        masks, view = {}, rows.view
        for i in self.sites:
            site = self.reft.sites[i]
            if start >= self.prompt_width and not self.variant.reaches_response(site):
                continue
            mask = self.variant.mask(site, view)[:, start:stop].clone()
            mask[rows.done, -1] = False  # a row's stop token goes in only because others go on
            if not mask.any():
                continue
            self.unused.discard(i)
            mask &= (self.strengths[i] != 0).any(dim=1).to(mask.device)[:, None]
            masks[i] = mask
        return masks

    def unused_sites(self) -> list[Site]:
        """Sites that have chosen no token yet."""
        return [self.reft.sites[i] for i in self.unused]
