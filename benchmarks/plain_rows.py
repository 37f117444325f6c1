"""A transformers model read row by row, edited by forward hooks: what numbers of reftlens are compared with.

Nothing of reftlens or TransformerLens is used here. One row at a time, without padding.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class Edit(NamedTuple):
    """What becomes of the tensor `[seq, width]` that enters or leaves a module."""

    module: str
    enters: bool
    change: Callable[[Tensor], Tensor]


class PlainRows:
    """The model in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.modules = dict(self.model.named_modules())
        self._states: dict[tuple[tuple[int, ...], str, bool], Tensor] = {}
        self._last: dict[tuple[int, ...], Tensor] = {}

    def ids(self, text: str, *, bos: bool = True) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [self.tokenizer.bos_token_id, *ids] if bos else ids

    @torch.no_grad()
    def logits(self, ids: Sequence[int], edits: Iterable[Edit] = ()) -> Tensor:
        """`[seq, vocab]`, float64."""
        with ExitStack() as handles:
            for edit in edits:
                module = self.modules[edit.module]
                if edit.enters:
                    handle = module.register_forward_pre_hook(lambda _, args, e=edit: (_changed(e, args[0]), *args[1:]))
                else:
                    handle = module.register_forward_hook(lambda _, args, out, e=edit: _changed_output(e, out))
                handles.callback(handle.remove)
            return self.model(torch.tensor([list(ids)])).logits[0].double()

    def states(self, ids: Sequence[int], module: str, *, enters: bool) -> Tensor:
        """What enters or leaves a module in the unedited model, `[seq, width]`."""
        key = tuple(ids), module, enters
        if key not in self._states:

            def keep(x: Tensor) -> Tensor:
                self._states[key] = x.clone()
                return x

            self.logits(ids, [Edit(module, enters, keep)])
        return self._states[key]

    def log_probs(self, ids: Sequence[int], edits: Sequence[Edit] = (), among: Sequence[int] | None = None) -> Tensor:
        """Of the token after the last one; among some tokens only, in their order."""
        last = self.logits(ids, edits)[-1] if edits else self._unedited(ids)
        return (last if among is None else last[list(among)]).log_softmax(dim=0)

    def _unedited(self, ids: Sequence[int]) -> Tensor:
        key = tuple(ids)
        if key not in self._last:
            self._last[key] = self.logits(ids)[-1]
        return self._last[key]


def _changed(edit: Edit, x: Tensor) -> Tensor:
    return edit.change(x[0])[None]


def _changed_output(edit: Edit, out: Any) -> Any:
    return (_changed(edit, out[0]), *out[1:]) if isinstance(out, tuple) else _changed(edit, out)


def at(
    index: slice | int, change: Callable[[Tensor], Tensor], columns: slice = slice(None)
) -> Callable[[Tensor], Tensor]:
    """`change` of some rows of a tensor alone, and of some of its columns."""

    def changed(x: Tensor) -> Tensor:
        rows = slice(index, index + 1 or None) if isinstance(index, int) else index
        x = x.clone()
        x[rows, columns] = change(x[rows, columns])
        return x

    return changed
