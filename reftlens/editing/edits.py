"""An edit: interventions at one hook, on chosen tokens of one forward pass."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, vmap
from torch.func import functional_call
from transformer_lens.hook_points import HookPoint

from reftlens.interventions.base import Intervention, Origin, Strength
from reftlens.text.view import Mask


class TokenIndex(NamedTuple):
    """Tokens of a `[batch, seq]` forward pass, each by its row and column."""

    rows: Int[Tensor, " tokens"]
    columns: Int[Tensor, " tokens"]
    shape: tuple[int, int]

    @staticmethod
    def of(mask: Mask) -> "TokenIndex":
        """The tokens where `mask` is true."""
        rows, columns = mask.nonzero().unbind(dim=1)
        return TokenIndex(rows, columns, (mask.shape[0], mask.shape[1]))


@dataclass(frozen=True)
class Part:
    """One intervention's share of an edit: it takes the next `count` of the edit's tokens."""

    intervention: Intervention
    count: int
    strength: Strength = 1.0
    basis: Tensor | None = None
    """Computed before, where nothing trains; None computes it in each forward pass, inside the graph."""
    source: Float[Tensor, "tokens variables d"] | None = None
    """What the intervention's variables are exchanged for, where it has any."""
    origin: Origin | None = None
    """Of each token, for an intervention that depends on where it stands."""

    @property
    def idle(self) -> bool:
        return isinstance(self.strength, float) and self.strength == 0.0

    def __call__(self, h: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        return self.intervention(h, self.strength, self.basis, self.source, self.origin)

    @property
    def stack_key(self) -> Hashable | None:
        """Equal for parts that can be computed as one stack; None for a part that has to be computed alone."""
        module = self.intervention
        random = module.training and module.dropout.p > 0
        if self.idle or random or self.basis is not None or isinstance(self.strength, Tensor) or not module.stacks:
            return None
        return type(module), repr(module.settings()), self.count, self.strength


Observer = Callable[[Part, Float[Tensor, "tokens d"]], None]


@dataclass(eq=False, repr=False)
class Edit:
    """Interventions at one hook on tokens of one forward pass, each part on its own tokens."""

    point: HookPoint
    parts: list[Part]
    tokens: TokenIndex
    heads: tuple[int, ...] | None = None
    carry: HookPoint | None = None
    """Where the change is added once more: the skip connection, for a hook that only the MLP branch reads."""
    observer: Observer | None = None
    """Called with the first part and the hidden states that it edits."""
    fired: int = field(default=0, init=False)
    change: Tensor | None = field(default=None, init=False)

    def __repr__(self) -> str:
        """Short: TransformerLens asks for it whenever a hook is added."""
        return f"Edit({self.point.name}, {', '.join(part.intervention.kind for part in self.parts)})"

    def __call__(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        """The edited activation: `h` itself outside the chosen tokens."""
        if tuple(h.shape[:2]) != self.tokens.shape:
            raise ValueError(
                f"{self.point.name} saw hidden states for {tuple(h.shape[:2])} tokens, but the positions were chosen "
                f"for {self.tokens.shape}: run the model on the batch that was given to on(…)"
            )
        self.fired += 1
        if all(part.idle for part in self.parts):
            return None
        before = self._vectors(h)
        if self.observer is not None:
            self.observer(self.parts[0], before)
        after = _edited(self.parts, before)
        self.change = after - before if self.carry is not None else None
        return self._with(h, after)

    def pass_on(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        """`h` with the change that was made at `point` added to it."""
        if self.change is None:
            return None
        rows, columns, _ = self.tokens
        out = h.clone()
        out[rows, columns] = h[rows, columns] + self.change
        self.change = None
        return out

    def _vectors(self, h: Tensor) -> Float[Tensor, "tokens d"]:
        """What is edited of `h`."""
        vectors = token_vectors(h, self.heads, self.point.name)
        for part in self.parts:
            if vectors.shape[-1] != part.intervention.d:
                raise ValueError(
                    f"{self.point.name} has vectors of width {vectors.shape[-1]}, and {part.intervention.kind} was "
                    f"made for d={part.intervention.d}"
                )
        return vectors[self.tokens.rows, self.tokens.columns]

    def _with(self, h: Tensor, after: Float[Tensor, "tokens d"]) -> Tensor:
        """`h` with the edited vectors in their place."""
        rows, columns, _ = self.tokens
        out = h.clone()
        if self.heads is None:
            out[rows, columns] = after.reshape(-1, *h.shape[2:])
        else:
            heads = torch.tensor(self.heads, device=h.device)
            out[rows[:, None], columns[:, None], heads] = after.reshape(-1, len(heads), h.shape[3])
        return out


def joined(edits: Sequence[Edit]) -> Edit:
    """Edits at one hook as one, so that parts that differ in their numbers only are computed together."""
    if len(edits) == 1:
        return edits[0]
    rows, columns = (torch.cat(indices) for indices in zip(*(edit.tokens[:2] for edit in edits), strict=True))
    parts = [part for edit in edits for part in edit.parts]
    return replace(edits[0], parts=parts, tokens=TokenIndex(rows, columns, edits[0].tokens.shape))


def used_points(edits: Sequence[Edit]) -> frozenset[int]:
    """Ids of the hook points that edits act at."""
    return frozenset(id(point) for edit in edits for point in (edit.point, edit.carry) if point is not None)


def _edited(parts: Sequence[Part], h: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """Each part's own tokens, edited; parts that differ in their numbers only are computed as one stack."""
    if len(parts) == 1:
        return parts[0](h)
    pieces = h.split([part.count for part in parts])
    stacks: dict[Hashable, list[int]] = {}
    for i, part in enumerate(parts):
        stacks.setdefault(part.stack_key or i, []).append(i)
    results: dict[int, Tensor] = {}
    for members in stacks.values():
        if len(members) == 1:
            results[members[0]] = parts[members[0]](pieces[members[0]])
        else:
            stacked = _stacked([parts[i] for i in members], torch.stack([pieces[i] for i in members]))
            results |= dict(zip(members, stacked, strict=True))
    return torch.cat([results[i] for i in range(len(parts))])


def _stacked(parts: Sequence[Part], h: Float[Tensor, "parts tokens d"]) -> Float[Tensor, "parts tokens d"]:
    """All parts at once, their parameters side by side; gradients reach each part's own."""
    first = parts[0]
    states = [dict(part.intervention.named_parameters()) | dict(part.intervention.named_buffers()) for part in parts]
    stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    sources = [part.source for part in parts if part.source is not None]

    def edited(state: dict[str, Tensor], piece: Tensor, source: Tensor | None = None) -> Tensor:
        return functional_call(first.intervention, state, (piece, first.strength, None, source))

    return vmap(edited)(stack, h, torch.stack(sources)) if sources else vmap(edited)(stack, h)


def token_width(shape: Sequence[int], heads: Sequence[int] | None, name: str | None) -> int:
    """How wide one vector per token is, of hidden states of this shape: all heads, or the chosen ones, are joined.

    Raises:
        ValueError: for heads that the hook `name` has not.
    """
    if heads is not None and len(shape) != 4:
        raise ValueError(f"{name} has no heads (shape {list(shape)}): drop heads={list(heads)}")
    if heads is not None and max(heads) >= shape[2]:
        raise ValueError(f"{name} has heads 0 to {shape[2] - 1}, got heads={list(heads)}")
    return math.prod(shape[2:]) if heads is None else shape[3] * len(heads)


def token_vectors(h: Tensor, heads: Sequence[int] | None, name: str | None) -> Float[Tensor, "batch seq d"]:
    """One vector per token: `h` itself, or its (chosen) heads joined."""
    width = token_width(h.shape, heads, name)
    chosen = h if heads is None else h[:, :, list(heads)]
    return chosen.reshape(*h.shape[:2], width)
