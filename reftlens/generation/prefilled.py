"""Prompts read once for many generations: an edit at one strength or another changes only what lies in its cone.

A slider over strengths asks for the same prompts again and again. `prefill` keeps their keys and values, and the
residual stream at the first edited token and block; `generate` then starts from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of, weights_state
from reftlens.cone.body import Body, Entry, Exit, Gather, Observe, Skip, Slot
from reftlens.cone.prefix import NO_HOOK, Stub, cache_of
from reftlens.cone.spans import first_block
from reftlens.editing.engine import Edit, Stop, attached, forward, forward_inside
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt
from reftlens.text.view import Role, TokenView


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts, and what of them no edit at the sites of one `ReFT` can change. Made by `prefill`."""

    prompts: Batch
    chat: bool
    sites: tuple[Site, ...]
    said: str
    """What is reused, or why nothing is."""
    stream: Float[Tensor, "batch cone d"] | None = field(default=None, repr=False)
    """Residual stream entering block `first`, from column `start` of the left-padded prompts on."""
    first: int = 0
    start: int = 0
    as_tuple: bool = False
    keys: tuple[Tensor, ...] = field(default=(), repr=False)
    values: tuple[Tensor, ...] = field(default=(), repr=False)
    state: tuple[int, ...] = field(default=(), repr=False)

    def repeated(self, times: int) -> "Prefilled":
        """All prompts so many times over."""
        stream = None if self.stream is None else self.stream.repeat(times, 1, 1)
        keys, values = (tuple(x.repeat(times, 1, 1, 1) for x in some) for some in (self.keys, self.values))
        prompts = self.prompts[list(range(len(self.prompts))) * times]
        return replace(self, prompts=prompts, stream=stream, keys=keys, values=values)

    def check(self, reft: ReFT, model: Bridge) -> None:
        """Raise if these are not the sites, or this is not the model, that the prompts were read for."""
        if reft.sites != self.sites:
            raise ValueError(f"the prompts were read for edits at {_listed(self.sites)}, not {_listed(reft.sites)}")
        if self.keys and weights_state(model) != self.state:
            raise ValueError("the model or its weights changed since the prompts were read: call prefill again")


@torch.no_grad()
def prefill(
    reft: ReFT, model: Bridge, prompts: Sequence[Prompt] | Batch, *, chat: bool = False, system: str | None = None
) -> Prefilled:
    """Read prompts once, for `generate(reft, model, prefilled, variant=…)` at any strength and with any weights."""
    check_deterministic(model)
    batch = prompts if isinstance(prompts, Batch) else encode_prompts(model, prompts, chat=chat, system=system)
    tokens, role = left_padded(batch, device_of(model))
    points = reft.bind(model).points
    try:
        body = Body(model)
    except ValueError as error:
        return Prefilled(batch, chat, reft.sites, f"nothing is reused: {error}")
    places = [first_block(point.name or "", body.depth) for point in points]
    known = [place for place in places if place is not None]
    obstacle = body.obstacle() if len(known) == len(places) else "a site has no known place among the blocks"
    if obstacle:
        return Prefilled(batch, chat, reft.sites, f"nothing is reused: {obstacle}")
    view = TokenView(tokens, role, batch.tokenizer)
    edited = torch.stack([site.positions.mask(view) for site in reft.sites]).any(dim=0).any(dim=0)
    last = tokens.shape[1] - 1
    start, first = min([*edited.nonzero().flatten().tolist(), last]), min(known)
    runner = Runner(model, body)
    stream, as_tuple, cache = runner.read(tokens, role, first)
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    keys, values = zip(*((layer.keys, layer.values) for layer in layers), strict=True)
    said = f"blocks 0 to {first - 1} and {start} of {last + 1} prompt tokens are reused" if first else (
        f"{start} of {last + 1} prompt tokens are reused"
    )  # fmt: skip
    return Prefilled(
        batch, chat, reft.sites, said, None if stream is None else stream[:, start:], first, start, as_tuple,
        keys, values, weights_state(model),
    )  # fmt: skip


def left_padded(batch: Batch, device: torch.device) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Tokens and roles of the prompts alone, padded on the left: generation goes on in the last column of all."""
    rows = [batch.tokens[i][batch.prompt_mask[i]].tolist() for i in range(len(batch))]
    if any(not row for row in rows):
        raise ValueError(f"row {[bool(r) for r in rows].index(False)} has no prompt token to continue")
    longest = max(map(len, rows))
    pad = getattr(batch.tokenizer, "pad_token_id", None) or 0
    tokens = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    role = torch.tensor([[int(Role.PAD)] * (longest - len(r)) + [int(Role.PROMPT)] * len(r) for r in rows])
    return tokens, role.to(device)


class Runner:
    """Runs a model on its key/value cache for the logits of the newest token, through as little as possible.

    Original components run wherever no edit needs the bridge's; where that is not possible, the bridge itself does.
    """

    def __init__(self, model: Bridge, body: Body | None = None) -> None:
        self.model = model
        try:
            self.body = Body(model) if body is None else body
        except ValueError:
            self.body = None

    def read(
        self, tokens: Int[Tensor, "batch seq"], role: Int[Tensor, "batch seq"], first: int
    ) -> tuple[Tensor | None, bool, DynamicCache]:
        """The unedited residual stream entering block `first` (None for 0), and all keys and values."""
        assert self.body is not None
        body, plain = self.body, self.body.may_be_plain
        lowest = Observe(body.piece(body.blocks[0], plain=plain, used=NO_HOOK))
        places: list[tuple[Slot, nn.Module]] = [(body.blocks[0], lowest)]
        end, tap = Exit(), None
        if 0 < first < body.depth:
            tap = Observe(body.piece(body.blocks[first], plain=plain, used=NO_HOOK))
            places.append((body.blocks[first], tap))
        cache = cache_of([DynamicLayer() for _ in body.blocks])
        self._inside(tokens, role != Role.PAD, cache, [*places, (body.norm, end)], NO_HOOK)
        stream = None if first == 0 else end.kept if tap is None else tap.seen
        return stream, lowest.as_tuple, cache

    def ready(self, prefilled: Prefilled | None) -> Prefilled | None:
        """What can be reused now: nothing where somebody's hook wants to see the whole prompt, for example."""
        stored = prefilled is not None and bool(prefilled.keys)
        return prefilled if stored and self.body is not None and not self.body.obstacle() else None

    def step(
        self,
        tokens: Int[Tensor, "batch new"],
        real: Bool[Tensor, "batch keys"],
        edits: Sequence[Edit],
        cache: Any,
        prefilled: Prefilled | None = None,
    ) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """Logits after the last of `tokens`, and the cache with all of them; `real` covers the cached ones too."""
        body = self.body
        if body is None or body.obstacle():
            with attached(edits):
                out = forward(self.model, tokens, real, cache=cache, use_cache=True)
            return out.logits[:, -1], out.cache
        used = frozenset(id(p) for e in edits for p in (e.point, e.carry) if p is not None)
        gather = Gather(None)
        gather.last, gather.unembed = True, body.piece(body.head, plain=body.may_be_plain, used=used)
        rows = torch.arange(len(tokens), device=tokens.device)
        gather.at = (rows, torch.full_like(rows, tokens.shape[1] - 1))
        places: list[tuple[Slot, nn.Module]] = [(body.head, gather)]
        if prefilled is not None:
            cache = self._stored(prefilled, places)
        elif cache is None:
            cache = cache_of([DynamicLayer() for _ in body.blocks])
        with attached(edits):
            logits = self._inside(tokens, real, cache, places, used)
        if prefilled is not None:
            cache.layers[: prefilled.first] = _filled(prefilled, range(prefilled.first), None)
        assert logits is not None
        return logits[0], cache

    def _stored(self, prefilled: Prefilled, places: list[tuple[Slot, nn.Module]]) -> DynamicCache:
        """A cache that ends where the cone begins; the stored stream goes into `places`."""
        assert self.body is not None
        first, start = prefilled.first, prefilled.start
        if prefilled.stream is not None:
            below: Any = self.body.blocks[first - 1]
            entry = Entry(prefilled.stream, below.component.hook_out, prefilled.as_tuple)
            places += [*((slot, Skip(prefilled.as_tuple)) for slot in self.body.blocks[: first - 1]), (below, entry)]
        stubs = [Stub(len(prefilled.prompts), start) for _ in range(first)]
        return cache_of([*stubs, *_filled(prefilled, range(first, self.body.depth), start)])

    def _inside(
        self, tokens: Tensor, real: Tensor, cache: DynamicCache, places: list[tuple[Slot, nn.Module]],
        used: frozenset[int],
    ) -> Tensor | None:  # fmt: skip
        assert self.body is not None
        place = (real.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with self.body.arranged(places, plain=self.body.may_be_plain, used=used):
            try:
                return forward_inside(self.model, tokens, real, place, cache).logits
            except Stop:
                return None


def _filled(prefilled: Prefilled, blocks: range, stop: int | None) -> list[DynamicLayer]:
    """Cache layers that hold the stored keys and values of columns before `stop`; what is stored stays as it is."""
    layers = []
    for i in blocks:
        layer = DynamicLayer()
        layer.lazy_initialization(prefilled.keys[i], prefilled.values[i])
        layer.keys, layer.values = prefilled.keys[i][:, :, :stop], prefilled.values[i][:, :, :stop]
        layers.append(layer)
    return layers


def _listed(sites: Sequence[Site]) -> str:
    return ", ".join(map(str, sites))
