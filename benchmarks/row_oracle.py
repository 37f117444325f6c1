"""What an edited model computes, told as plainly as it can be: no bridge, no batch, no padding, no cache, no reuse.

A plain transformers model runs on one row at a time, with one forward hook on one decoder block. Of reftlens it uses
the intervention's own `code` and `basis`, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Row(NamedTuple):
    ids: list[int]
    prompt: int
    """Tokens of it."""
    targets: list[int]
    """Places of the tokens to predict."""


@dataclass
class Oracle:
    """`module` edits what leaves `block`, at the places that `chosen(prompt, length)` names."""

    model: Any
    block: Any
    module: Any
    chosen: Callable[[int, int], Sequence[int]]
    strength: float = 1.0

    def logits(self, ids: list[int], prompt: int) -> Tensor:
        """`[tokens, vocab]` of one row."""
        at = list(self.chosen(prompt, len(ids)))

        def edit(block: Any, given: Any, out: Any) -> Any:
            h = (out[0] if isinstance(out, tuple) else out).clone()
            basis, rows = self.module.basis(), h if h.ndim == 3 else h[None]  # OPT flattens batch and tokens
            rows[:, at] = rows[:, at] + self.strength * self.module.code(rows[:, at], basis) @ basis.T
            return (h, *out[1:]) if isinstance(out, tuple) else h

        handle = self.block.register_forward_hook(edit)
        try:
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            handle.remove()

    def scores(self, row: Row) -> tuple[Tensor, Tensor]:
        """The logits that the targets of a row are predicted from, and the loss of each."""
        logits = self.logits(row.ids, row.prompt)[[t - 1 for t in row.targets]]
        return logits, F.cross_entropy(logits, torch.tensor([row.ids[t] for t in row.targets]), reduction="none")

    def step(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits at all targets, the mean loss over them, and its gradient with respect to the module's parameters."""
        logits, losses = zip(*(self.scores(row) for row in rows), strict=True)
        loss = torch.cat(losses).mean()
        grads = torch.autograd.grad(loss, list(self.module.parameters()))
        return torch.cat(logits).detach(), loss.detach(), list(grads)

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int, stops: set[int]) -> tuple[list[int], list[float]]:
        """The next tokens, and the lead that each had over the second best."""
        ids, leads = list(prompt), []
        while len(leads) < count and not (leads and ids[-1] in stops):
            best = self.logits(ids, len(prompt))[-1].topk(2)
            leads.append((best.values[0] - best.values[1]).item())
            ids.append(int(best.indices[0]))
        return ids[len(prompt) :], leads
