"""Modules that stand in the place of a block, the final norm or the unembedding for one forward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, pad

from reftlens.editing.engine import Stop


def _returned(out: Tensor, count: int) -> Any:
    """`out` as a block returns it: first of `count` values, the others of which nobody reads; by itself for 0."""
    return (out, *[None] * (count - 1)) if count else out


class StandIn(nn.Module):
    """Stands in the place of `block`, and has its attributes: some models ask a block of which kind it is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class Skip(StandIn):
    """A block that passes its input on."""

    def __init__(self, block: nn.Module, returns: int) -> None:
        super().__init__(block)
        self.returns = returns

    def forward(self, hidden_states: Tensor, *args: Any, **_: Any) -> Any:
        return _returned(hidden_states, self.returns)


class Entry(StandIn):
    """A block that is not run: its stored output, through the hook that an edit may be attached to."""

    def __init__(self, block: nn.Module, stored: Tensor, hook_out: Callable[[Tensor], Tensor], returns: int) -> None:
        super().__init__(block)
        self.stored, self.hook_out, self.returns = stored, hook_out, returns

    def forward(self, hidden_states: Tensor, *args: Any, **_: Any) -> Any:
        return _returned(self.hook_out(self.stored), self.returns)


class Observe(StandIn):
    """A block, noted for what enters and leaves it and how many values it returns.

    The pass ends before it unless it `runs`, and after it where it `ends`: a final norm that comes next may also be
    the norm of the embeddings.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.runs, self.ends, self.returns = True, False, 0
        self.entered: Tensor | None = None
        self.left: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.entered = hidden_states
        if not self.runs:
            raise Stop
        out: Any = self.block(hidden_states, *args, **kwargs)
        self.returns = len(out) if isinstance(out, tuple) else 0
        self.left = out[0] if isinstance(out, tuple) else out
        if self.ends:
            raise Stop
        return out


class _Unembedding(nn.Module):
    """Stands around an unembedding."""

    def __init__(self, unembed: nn.Module) -> None:
        super().__init__()
        self.unembed = unembed

    @property
    def weight(self) -> Any:
        """Of the unembedding: some models read its dtype."""
        return self.unembed.weight


class Gather(_Unembedding):
    """In place of the unembedding, which gets only what stands `at` the targets, with rows of zeros up to a multiple of
    `multiple`."""

    def __init__(self, at: tuple[Tensor, Tensor], multiple: int = 1) -> None:
        super().__init__(nn.Identity())
        self.at, self.multiple = at, multiple

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states[self.at]
        return self.unembed(pad(rows, (0, 0, 0, -len(rows) % self.multiple))[None])


class Columns(_Unembedding):
    """An unembedding that gives the logits of a few tokens only, `cut` to their rows where it can be."""

    def __init__(self, unembed: nn.Module, tokens: Tensor, cut: nn.Linear | None) -> None:
        super().__init__(unembed)
        self.tokens, self.cut = tokens, cut

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.cut is None:
            return self.unembed(hidden_states)[..., self.tokens]
        bias = None if self.cut.bias is None else self.cut.bias[self.tokens]
        return linear(hidden_states, self.cut.weight[self.tokens], bias)
