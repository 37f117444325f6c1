"""Run an intervention on a plain transformers model, without the bridge: residual-stream sites only."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import is_bridge
from reftlens.editing.bound import Place, exchanges_of
from reftlens.editing.edits import TokenIndex
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.editing.sources import Donor, Exchanged, donors_of
from reftlens.editing.variant import Variant
from reftlens.interventions.base import Intervention
from reftlens.text.batch import Batch

_BODIES = ("model.", "model.decoder.", "model.language_model.", "gpt_neox.", "")
_BLOCKS = (*(f"{body}layers" for body in _BODIES), "transformer.h", "h")
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out|hook_resid_pre|hook_in)")


@contextmanager
def on_transformers(reft: ReFT, hf_model: nn.Module, batch: Batch, variant: Variant = Variant()) -> Iterator[None]:
    """Inside the block, forward passes of `hf_model` on the tokens of `batch` are edited.

    `batch` is right-padded; the model may be given the same rows padded on the left, with their attention mask.
    `hf_model.generate` on the batch's prompts works as well, for edits on the prompt: later steps pass unedited.
    What is exchanged is read from the batch's sources first, in a pass of `hf_model` over each of them.

    Raises:
        ValueError: for a site that is not the residual stream before or after a block, positions that reach
            generated tokens while generating, other tokens than those of the batch, or a site that chooses no token;
            for an exchange without its source in the batch, or with one that has sources itself.
        RuntimeError: at the end, if nothing passed through a site.
    """
    if is_bridge(hf_model):
        raise ValueError("this is a TransformerBridge: use reft.on(model, batch)")
    variant.require(reft.sites, batch.view)
    call, blocks = _Call(hf_model, batch), _blocks(hf_model)
    edits = [_PlainEdit(reft.sites[i], reft[i], batch, variant, call) for i in variant.active(reft.sites)]
    for edit, donor in _donors(hf_model, blocks, batch, edits, variant).items():
        edits[edit].donor = donor
    with ExitStack() as handles:
        handles.callback(hf_model.register_forward_pre_hook(call, with_kwargs=True).remove)
        for edit in edits:
            handles.callback(edit.stream.register(blocks, edit.edited).remove)
        yield
    for edit in edits:
        if not edit.fired:
            raise RuntimeError(f"no hidden state passed through {edit.site.hook} inside this block")


def _blocks(hf_model: nn.Module) -> nn.ModuleList:
    modules = dict(hf_model.named_modules())
    for path in _BLOCKS:
        if isinstance(stack := modules.get(path), nn.ModuleList):
            return stack
    raise ValueError(f"cannot find the blocks of {type(hf_model).__name__}; looked at {', '.join(_BLOCKS)}")


class _Stream:
    """The residual stream of a site: what enters or leaves a block."""

    def __init__(self, site: Site) -> None:
        found = _RESIDUAL.fullmatch(site.hook)
        if found is None:
            raise ValueError(
                f"{site} is not the residual stream that enters or leaves a block (resid_pre, resid_post), all that "
                "on_transformers edits: load the model as a TransformerBridge and use reft.on(bridge, batch)"
            )
        if site.heads is not None:
            raise ValueError(f"{site.hook} has no heads: drop heads={list(site.heads)}")
        self.hook, self.block, self.leaves = site.hook, int(found[1]), found[2] in ("hook_resid_post", "hook_out")

    def register(self, blocks: nn.ModuleList, act: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Put what `act` makes of it in its place, until the handle is removed."""
        if self.block >= len(blocks):
            raise ValueError(f"{self.hook}: this model has blocks 0 to {len(blocks) - 1}")

        def after(block: nn.Module, args: Any, output: Any) -> Any:
            return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (act(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": act(kwargs["hidden_states"])}

        if self.leaves:
            return blocks[self.block].register_forward_hook(after)
        return blocks[self.block].register_forward_pre_hook(before, with_kwargs=True)


class _Call:
    """What the current forward pass of the model was called with: how much is cached, and where the tokens lie."""

    def __init__(self, hf_model: nn.Module, batch: Batch) -> None:
        self.signature = inspect.signature(hf_model.forward)
        self.batch, self.real = batch, batch.attention_mask
        self.continues, self.mask, self.tokens = False, None, None

    def __call__(self, hf_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        cache, self.mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        self.tokens = arguments.get("input_ids")
        self.continues = cache is not None and cache.get_seq_length() > 0

    def placed(self, values: Tensor, shape: torch.Size) -> Tensor:
        """`values` of the tokens of the right-padded batch, moved to where the tokens lie in this call; 0 elsewhere."""
        real = self.real if self.mask is None else self.mask
        if not isinstance(real, Tensor) or real.ndim != 2:
            raise ValueError(
                "the model was called with an attention mask that does not show the padding: pass [batch, seq]"
            )
        real = real.bool().to(values.device)
        times, rest = divmod(shape[0], len(self.batch))
        if times > 1 and not rest:
            raise ValueError(
                f"the model was called on {shape[0]} rows, and the batch has {len(self.batch)}: beams and several "
                "texts for a prompt repeat rows, so give the batch as often: "
                f"batch[[i for i in range(len(batch)) for _ in range({times})]]"
            )
        if real.shape != shape or not torch.equal(real.sum(dim=1), self.real.sum(dim=1).to(values.device)):
            raise ValueError(
                f"the model was called on {real.sum(dim=1).tolist()} tokens per row (in {list(shape)}), and the batch "
                f"has {self.real.sum(dim=1).tolist()}"
            )
        own = self.batch.tokens[self.real].to(values.device)
        if self.tokens is not None and not torch.equal(self.tokens[real], own):
            raise ValueError(
                "the model was called on other tokens than those of the batch: it has "
                f"{self.tokens[real].tolist()[:12]} …, and the batch {own.tolist()[:12]} …"
            )
        moved = torch.zeros_like(real, dtype=values.dtype)
        moved[real] = values[self.real.to(values.device)]
        return moved


class _PlainEdit:
    """One intervention on the hidden states that enter or leave a block."""

    def __init__(self, site: Site, module: Intervention, batch: Batch, variant: Variant, call: _Call) -> None:
        self.site, self.stream, self.call, self.fired = site, _Stream(site), call, False
        self.reaches_response = variant.reaches_response(site)
        self.mask = variant.mask(site, batch.view)
        point = HookPoint()
        point.name = site.hook
        self.place = Place(site, module, point)
        self.strength = self.place.strength(variant)
        self.donor: Donor | None = None

    def edited(self, h: Tensor) -> Tensor:
        if self.call.continues:
            if self.reaches_response:
                raise ValueError(f"{self.site} reaches generated tokens: generate with reftlens.generate on a bridge")
            return h
        self.fired = True
        tokens = TokenIndex.of(self.call.placed(self.mask.to(h.device), h.shape[:2]))
        view = self.call.batch.view
        at = tokens.rows, tokens.columns
        steps, numbers = (self.call.placed(x.to(h.device), h.shape[:2])[at] for x in (view.steps, view.index))
        source = None if self.donor is None else self.donor.of(tokens.rows, numbers)
        edit = self.place.edit(tokens, self.strength, steps=steps, source=source)
        out = edit(h, self.place.point)
        return h if out is None else out


def _donors(
    hf_model: nn.Module, blocks: nn.ModuleList, batch: Batch, edits: Sequence[_PlainEdit], variant: Variant
) -> dict[int, Donor]:
    """What the sources of the batch hold, by the number of the edit that takes it."""
    exchanges = exchanges_of(tuple(edit.place for edit in edits), replace(variant, sites=None))
    streams = {exchange: edits[i].stream for i, exchange in exchanges.items()}
    device = next(hf_model.parameters()).device

    def read(source: Batch, here: Sequence[Exchanged], rows: Sequence[int]) -> list[Tensor]:
        if source.sources:
            raise ValueError("a source has sources itself: load the model as a TransformerBridge for such an exchange")
        some, seen = source[list(rows)].to(device), dict[int, Tensor]()
        with torch.no_grad(), ExitStack() as handles:
            for i, exchange in enumerate(here):
                keep = partial(_kept, seen, i)
                handles.callback(streams[exchange].register(blocks, keep).remove)
            hf_model(some.tokens, attention_mask=some.attention_mask.long())
        return [seen[i][exchange.site.positions.mask(some.view)] for i, exchange in enumerate(here)]

    return donors_of(batch, exchanges, read)


def _kept(seen: dict[int, Tensor], i: int, h: Tensor) -> Tensor:
    seen[i] = h
    return h
