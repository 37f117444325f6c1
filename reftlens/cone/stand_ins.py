"""Modules that stand in the place of a block, the final norm or the unembedding for one forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from reftlens.editing.engine import Stop


class Skip(nn.Module):
    """A block that passes its input on."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **_: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


class Entry(nn.Module):
    """A block that is not run: its stored output, through the hook that an edit may be attached to."""

    def __init__(self, stored: Tensor, hook_out: Callable[[Tensor], Tensor], as_tuple: bool) -> None:
        super().__init__()
        self.stored, self.hook_out, self.as_tuple = stored, hook_out, as_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **_: Any) -> Any:
        out = self.hook_out(self.stored)
        return (out,) if self.as_tuple else out


class Observe(nn.Module):
    """A block (or None, to end the pass here), noted for what enters it and whether it returns a tuple."""

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.block, self.as_tuple = block, False
        self.entered: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.entered = hidden_states
        if self.block is None:
            raise Stop
        out = self.block(hidden_states, *args, **kwargs)
        self.as_tuple = isinstance(out, tuple)
        return out


class Gather(nn.Module):
    """In place of the unembedding: collects what the targets are predicted from, over several passes.

    The last pass unembeds it all, in the given order, with rows of zeros up to a multiple of `multiple`.
    """

    def __init__(self, order: Tensor | None, multiple: int = 1) -> None:
        super().__init__()
        self.order, self.multiple = order, multiple
        self.unembed: nn.Module = nn.Identity()
        self.at: tuple[Tensor, Tensor] | None = None
        self.last = False
        self.collected: list[Tensor] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.collected.append(hidden_states[self.at])
        if not self.last:
            return hidden_states[:, :0]
        rows = torch.cat(self.collected) if len(self.collected) > 1 else self.collected[0]
        rows = rows if self.order is None else rows[self.order]
        return self.unembed(pad(rows, (0, 0, 0, -len(rows) % self.multiple))[None])
