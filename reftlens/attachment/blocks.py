"""The residual stream of a plain transformers model, and the hooks that torch calls on the way through it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftlens.editing.site import Site

_BODIES = (
    "",
    "decoder.",
    "encoder.",
    "transformer.",
    "language_model.",
    "language_model.model.",
    "text_model.",
    "model.text_model.",
)
_STACKS = ("layers", "h", "blocks", "layer")
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out|hook_resid_pre|hook_in)")
_RECORDER = "transformers.utils.output_capturing"
_TRANSPOSED = ("xlnet", "transfo-xl")
"""Hidden states are `[seq, batch, d]` there."""


def blocks_of(hf_model: nn.Module) -> nn.ModuleList:
    """The stack of blocks that reads text.

    Raises:
        ValueError: for an encoder with a decoder, or a model whose blocks are not where others have them.
    """
    config: Any = getattr(hf_model, "config", None)
    name = type(hf_model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder and a decoder, and sites are of one stack of blocks")
    if getattr(config, "model_type", "") in _TRANSPOSED:
        raise ValueError(f"{name} holds its hidden states as [seq, batch, d], and edits are of [batch, seq, d]")
    body = getattr(hf_model, "base_model", hf_model)
    for root in (body, hf_model):
        modules = dict(root.named_modules())
        for path in (f"{inside}{stack}" for inside in _BODIES for stack in _STACKS):
            if isinstance(found := modules.get(path), nn.ModuleList):
                return found
    raise ValueError(
        f"cannot find the blocks of {name}: looked in its base model for {', '.join(_STACKS)}, also inside "
        f"{', '.join(inside.rstrip('.') for inside in _BODIES if inside)}"
    )


class Stream:
    """The residual stream of a site: what enters or leaves a block.

    Raises:
        ValueError: for any other site, heads, or a block that the model has not.
    """

    def __init__(self, site: Site, blocks: nn.ModuleList) -> None:
        found = _RESIDUAL.fullmatch(site.hook)
        if found is None:
            raise ValueError(
                f"{site} is not the residual stream that enters or leaves a block (resid_pre, resid_post), all that "
                "is edited without a bridge: load the model as a TransformerBridge and use reft.on(bridge, batch)"
            )
        if site.heads is not None:
            raise ValueError(f"{site.hook} has no heads: drop heads={list(site.heads)}")
        if int(found[1]) >= len(blocks):
            raise ValueError(f"{site.hook}: this model has blocks 0 to {len(blocks) - 1}")
        self.block, self.leaves = blocks[int(found[1])], found[2] in ("hook_resid_post", "hook_out")
        self.name = f"blocks.{found[1]}.{'hook_resid_post' if self.leaves else 'hook_resid_pre'}"

    def register(self, act: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Put what `act` makes of it in its place, until the handle is removed."""
        if self.leaves:
            handle = self.block.register_forward_hook(partial(_after, act))
            _records_last(self.block)
            return handle
        return self.block.register_forward_pre_hook(partial(_before, act), with_kwargs=True)


def _records_last(block: nn.Module) -> None:
    """Put the newest hook before those with which transformers records `hidden_states`: these are then the edited ones.

    The others keep their order. They are put there when hidden states are first asked for, and stay.
    """
    *others, _ = hooks = list(block._forward_hooks.items())
    recorders = [i for i, (_, hook) in enumerate(others) if getattr(hook, "__module__", "") == _RECORDER]
    for key, _ in hooks[recorders[0] : -1] if recorders else ():
        block._forward_hooks[key] = block._forward_hooks.pop(key)


def _after(act: Callable[[Tensor], Tensor], block: nn.Module, args: Any, output: Any) -> Any:
    return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)


def _before(
    act: Callable[[Tensor], Tensor], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (act(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": act(kwargs["hidden_states"])}


def watch(
    module: nn.Module,
    before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[nn.Module, Any, Any], None],
) -> list[RemovableHandle]:
    """`before` is told of each call of a module, `after` of its end, also where it raised, until they are removed."""
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
