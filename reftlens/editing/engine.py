"""The one place that runs the model: attach edits to hooks, call the bridge once, detach.

Everything that computes with a model goes through `forward`, so that the computation no edit can touch can be
reused here and nowhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, vmap
from torch.func import functional_call
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge
from reftlens.errors import SiteNeverFired
from reftlens.interventions.base import Intervention, Strength


class Stop(Exception):
    """Ends a forward pass from inside once what it was run for is known."""


@dataclass
class Part:
    """One intervention's share of an edit: it takes the next `tokens` of the edit's tokens."""

    intervention: Intervention
    tokens: int
    strength: Strength = 1.0
    basis: Tensor | None = None
    """Kept over several forward passes where nothing trains; None computes it anew, inside the graph."""
    source: Float[Tensor, "tokens variables d"] | None = None
    """What the intervention's variables are exchanged for, where it has any."""
    rows: Int[Tensor, " tokens"] | None = None
    """Of each token, for an intervention that pools over a row."""

    @property
    def idle(self) -> bool:
        return isinstance(self.strength, float) and self.strength == 0.0

    def likeness(self) -> Any:
        """Equal for parts that can be computed as one stack; None for a part that has to be computed alone."""
        module = self.intervention
        random = module.training and module.dropout.p > 0
        if self.idle or random or self.basis is not None or isinstance(self.strength, Tensor) or not module.stacks:
            return None
        return type(module), repr(module.settings()), self.tokens, self.strength


def _edited(parts: Sequence[Part], h: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """Each part's own tokens, edited; parts that differ in their numbers only are computed as one stack."""
    pieces = h.split([part.tokens for part in parts])
    alike: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(part.likeness() or i, []).append(i)
    results: dict[int, Tensor] = {}
    for members in alike.values():
        if len(members) == 1:
            part, piece = parts[members[0]], pieces[members[0]]
            results[members[0]] = part.intervention(piece, part.strength, part.basis, part.source, part.rows)
        else:
            stacked = _stacked([parts[i] for i in members], torch.stack([pieces[i] for i in members]))
            results |= dict(zip(members, stacked, strict=True))
    return results[0] if len(parts) == 1 else torch.cat([results[i] for i in range(len(parts))])


def _stacked(parts: Sequence[Part], h: Float[Tensor, "parts tokens d"]) -> Float[Tensor, "parts tokens d"]:
    """All parts at once, their parameters side by side; gradients reach each part's own."""
    first = parts[0]
    states = [dict(part.intervention.named_parameters()) | dict(part.intervention.named_buffers()) for part in parts]
    stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    sources = [part.source for part in parts if part.source is not None]

    def one(state: dict[str, Tensor], piece: Tensor, source: Tensor | None = None) -> Tensor:
        return functional_call(first.intervention, state, (piece, first.strength, None, source))

    return vmap(one)(stack, h, torch.stack(sources)) if sources else vmap(one)(stack, h)


@dataclass(eq=False, repr=False)
class Edit:
    """Interventions at one hook on the tokens `(rows, columns)` of a `[batch, seq]` forward pass, each on its own."""

    point: HookPoint
    parts: list[Part]
    rows: Int[Tensor, " tokens"]
    columns: Int[Tensor, " tokens"]
    shape: tuple[int, int]
    heads: tuple[int, ...] | None = None
    carry: HookPoint | None = None
    """Where the change is added once more: the skip connection, for a hook that only the MLP branch reads."""
    fired: int = field(default=0, init=False)
    change: Tensor | None = field(default=None, init=False)

    def __repr__(self) -> str:
        """Short: TransformerLens asks for it whenever a hook is added."""
        return f"Edit({self.point.name}, {', '.join(part.intervention.kind for part in self.parts)})"

    def __call__(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        """The edited activation: `h` itself outside the chosen tokens."""
        if tuple(h.shape[:2]) != self.shape:
            raise ValueError(
                f"{self.point.name} saw hidden states for {tuple(h.shape[:2])} tokens, but the positions were chosen "
                f"for {self.shape}: run the model on the batch that was given to on(…)"
            )
        self.fired += 1
        if all(part.idle for part in self.parts):
            return None
        before = self._read(h)
        after = _edited(self.parts, before)
        self.change = after - before if self.carry is not None else None
        return self._write(h, after)

    def pass_on(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        """`h` with the change that was made at `point` added to it."""
        if self.change is None:
            return None
        out = h.clone()
        out[self.rows, self.columns] = h[self.rows, self.columns] + self.change
        self.change = None
        return out

    def _read(self, h: Tensor) -> Tensor:
        vectors = token_vectors(h, self.heads, self.point.name)
        for part in self.parts:
            if vectors.shape[-1] != part.intervention.d:
                raise ValueError(
                    f"{self.point.name} has vectors of width {vectors.shape[-1]}, and {part.intervention.kind} was "
                    f"made for d={part.intervention.d}"
                )
        return vectors[self.rows, self.columns]

    def _write(self, h: Tensor, after: Tensor) -> Tensor:
        out = h.clone()
        if h.ndim == 3:
            out[self.rows, self.columns] = after
        elif self.heads is None:
            out[self.rows, self.columns] = rearrange(after, "n (head d_head) -> n head d_head", head=h.shape[2])
        else:
            parts = rearrange(after, "n (head d_head) -> n head d_head", head=len(self.heads))
            heads = torch.tensor(self.heads, device=h.device)
            out[self.rows[:, None], self.columns[:, None], heads] = parts
        return out


def token_vectors(h: Tensor, heads: Sequence[int] | None, name: str | None) -> Float[Tensor, "batch seq d"]:
    """One vector per token: `h` itself, or its (chosen) heads joined."""
    if h.ndim != 4:
        if heads is not None:
            raise ValueError(f"{name} has no heads (shape {list(h.shape)}): drop heads={list(heads)}")
        return h
    if heads is not None:
        if max(heads) >= h.shape[2]:
            raise ValueError(f"{name} has heads 0 to {h.shape[2] - 1}, got heads={list(heads)}")
        h = h[:, :, list(heads)]
    return rearrange(h, "batch seq head d_head -> batch seq (head d_head)")


def attached(edits: Sequence[Edit]) -> AbstractContextManager[None]:
    """Edits act inside the block, backward included."""
    carried = [(edit.carry, edit.pass_on) for edit in edits if edit.carry is not None]
    return hooked([(edit.point, edit) for edit in edits], first=carried)


@contextmanager
def hooked(
    hooks: Sequence[tuple[HookPoint, Callable[..., Any]]], first: Sequence[tuple[HookPoint, Callable[..., Any]]] = ()
) -> Iterator[None]:
    """Hook functions are called inside the block; only these hooks are added, and only they are removed.

    Those in `first` are called before any others at their hook.
    """
    handles = []
    try:
        for prepend, group in ((True, first), (False, hooks)):
            for point, function in group:
                handles.append((point, point.add_hook(function, prepend=prepend)))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


def check_fired(edits: Sequence[Edit]) -> None:
    """Raise if nothing passed through one of the sites."""
    for edit in edits:
        if edit.fired == 0:
            raise SiteNeverFired(
                f"no hidden state passed through {edit.point.name} inside this block, so nothing was edited there"
            )


@dataclass(frozen=True)
class Output:
    """What one forward pass gives: logits, and the key/value cache where one was asked for."""

    logits: Float[Tensor, "batch seq vocab"]
    cache: Any = None


def forward(
    model: Bridge,
    tokens: Int[Tensor, "batch seq"],
    attention_mask: Bool[Tensor, "batch keys"],
    *,
    cache: Any = None,
    use_cache: bool = False,
) -> Output:
    """Run the model once, with whatever edits are attached.

    `attention_mask` covers the cached tokens too. Position ids follow from it, so padding on either side, and
    a cache, leave every token at its own absolute position.
    """
    mask = attention_mask.long()
    if use_cache or cache is not None:
        kwargs = {} if cache is None else {"past_key_values": cache}
        logits, cache = model(tokens, attention_mask=mask, return_type="logits_and_cache", use_cache=True, **kwargs)
        return Output(logits, cache)
    return Output(model(tokens, attention_mask=mask, return_type="logits", use_cache=False))


def forward_inside(
    model: Bridge,
    tokens: Int[Tensor, "batch seq"],
    attention_mask: Bool[Tensor, "batch keys"],
    position_ids: Int[Tensor, "batch seq"],
    cache: Any = None,
) -> Output:
    """`forward` for a model whose parts were rearranged: run the transformers model inside the bridge once."""
    out = model.original_model(
        input_ids=tokens,
        attention_mask=attention_mask.long(),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return Output(out.logits, cache)
