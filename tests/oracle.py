"""What an edited model computes, told plainly: transformers alone, one row at a time, a hook per edit, no cache."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHOSEN = {
    "first": lambda prompt, length: {0},
    "last": lambda prompt, length: {prompt - 1},
    "f1+l2": lambda prompt, length: {0, prompt - 1, max(0, prompt - 2)},
    "prompt": lambda prompt, length: set(range(prompt)),
    "response": lambda prompt, length: set(range(prompt, length)),
    "all": lambda prompt, length: set(range(length)),
}
"""The places that positions mean, of a row with so many tokens of prompt and so many in all."""
PARTS = {"attn_out": ("attn", "attention", "self_attn"), "mlp_out": ("mlp",)}


class Edit(NamedTuple):
    layer: int
    site: str
    """`resid_pre`, `resid_post`, `attn_out` or `mlp_out`."""
    positions: str
    module: Any


def _module(model: Any, edit: Edit) -> Any:
    """The module of transformers whose output (of `resid_pre`: input) is edited."""
    body = next(getattr(model, name) for name in ("transformer", "gpt_neox", "model") if hasattr(model, name))
    block = (body.h if hasattr(body, "h") else body.layers)[edit.layer]
    return next((getattr(block, name) for name in PARTS.get(edit.site, ()) if hasattr(block, name)), block)


def logits(model: Any, edits: list[Edit], strength: float, ids: list[int], prompt: int) -> Tensor:
    """`[tokens, vocab]` of one row."""

    def edited(edit: Edit, h: Tensor) -> Tensor:
        at = sorted(CHOSEN[edit.positions](prompt, len(ids)))
        if not at:
            return h
        basis, h = edit.module.basis(), h.clone()
        code = edit.module.code(h[0, at], basis)
        h[0, at] = h[0, at] + strength * (code if basis is None else code @ basis.T)
        return h

    def before(edit: Edit) -> Any:
        return lambda block, args: (edited(edit, args[0]), *args[1:])

    def after(edit: Edit) -> Any:
        return lambda block, args, out: (
            (edited(edit, out[0]), *out[1:]) if isinstance(out, tuple) else edited(edit, out)
        )

    handles = []
    for edit in edits:
        module = _module(model, edit)
        add = module.register_forward_pre_hook if edit.site == "resid_pre" else module.register_forward_hook
        handles.append(add((before if edit.site == "resid_pre" else after)(edit)))
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def step(model: Any, edits: list[Edit], strength: float, rows: list[Any], parameters: list[Tensor]) -> list[Tensor]:
    """Logits at the targets of all rows, the mean of their losses, and its gradients."""
    scored, answers = [], []
    for ids, prompt, targets in rows:
        scored.append(logits(model, edits, strength, ids, prompt)[[t - 1 for t in targets]])
        answers += [ids[t] for t in targets]
    loss = F.cross_entropy(torch.cat(scored), torch.tensor(answers))
    grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return [torch.cat(scored).detach(), loss.detach(), *filled]


@torch.no_grad()
def greedy(model: Any, edits: list[Edit], strength: float, prompt: list[int], count: int, stop: int) -> list[Tensor]:
    """The logits that the next tokens are chosen from."""
    ids, steps = list(prompt), []
    while len(steps) < count and not (steps and ids[-1] == stop):
        steps.append(logits(model, edits, strength, ids, len(prompt))[-1])
        ids.append(int(steps[-1].argmax()))
    return steps
