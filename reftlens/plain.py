"""Run an intervention on a plain transformers model, without the bridge: residual-stream sites only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reftlens.data import Batch
from reftlens.reft import ReFT, Variant

_BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "layers", "h")
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out|hook_resid_pre|hook_in)")


@contextmanager
def on_transformers(reft: ReFT, hf_model: nn.Module, batch: Batch, variant: Variant = Variant()) -> Iterator[None]:  # noqa: B008
    """Inside the block, forward passes of `hf_model` on the tokens of `batch` are edited.

    `hf_model.generate` on the batch's prompts works as well, for edits on the prompt: later steps, on one token
    each, pass unedited.

    Raises:
        ValueError: for a site that is not the residual stream before or after a block, positions that reach
            generated tokens while generating, or a site that chooses no token.
        RuntimeError: at the end, if nothing passed through a site.
    """
    blocks = _blocks(hf_model)
    handles, edits = [], []
    try:
        for i, (site, module) in enumerate(reft.items()):
            if variant.sites is not None and i not in variant.sites:
                continue
            edit = _PlainEdit(reft, i, batch, variant)
            edits.append(edit)
            found = _RESIDUAL.fullmatch(site.hook)
            if found is None:
                raise ValueError(
                    f"{site.hook} is not the residual stream before or after a block: run {module.kind} on a "
                    "TransformerBridge"
                )
            block = blocks[int(found[1])]
            if found[2] in ("hook_resid_post", "hook_out"):
                handles.append(block.register_forward_hook(edit.after))
            else:
                handles.append(block.register_forward_pre_hook(edit.before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for edit in edits:
        if not edit.fired:
            raise RuntimeError(f"no hidden state passed through {edit.site.hook} inside this block")


def _blocks(hf_model: nn.Module) -> nn.ModuleList:
    for path in _BLOCKS:
        try:
            found = hf_model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(f"cannot find the blocks of {type(hf_model).__name__}; looked at {', '.join(_BLOCKS)}")


class _PlainEdit:
    """One intervention on the hidden states that enter or leave a block."""

    def __init__(self, reft: ReFT, i: int, batch: Batch, variant: Variant) -> None:
        self.site, self.module, self.fired = reft.sites[i], reft[i], False
        self.reaches_response = variant.reaches_response(self.site)
        self.mask = variant.mask(self.site, batch.view)
        if not self.mask.any():
            raise ValueError(f"{self.site} chooses no token in any of {len(batch)} row(s)")
        self.strength = variant.strength if isinstance(variant.strength, float) else torch.tensor(variant.strength)

    def edited(self, h: Tensor) -> Tensor:
        if self.fired and h.shape[1] == 1 and self.mask.shape[1] > 1:
            if self.reaches_response:
                raise ValueError(f"{self.site} reaches generated tokens: generate with reftlens.generate on a bridge")
            return h
        if h.shape[:2] != self.mask.shape:
            raise ValueError(
                f"{self.site.hook} saw {list(h.shape[:2])} tokens, and the batch has {list(self.mask.shape)}"
            )
        self.fired = True
        strength = self.strength.to(h.device) if isinstance(self.strength, Tensor) else self.strength
        out = h.clone()
        mask = self.mask.to(h.device)
        out[mask] = self.module(h[mask], strength=strength)
        return out

    def after(self, block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.edited(output[0]), *output[1:])
        return self.edited(output)

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.edited(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.edited(kwargs["hidden_states"])}
