"""Hooks that somebody else has put on a model: what they do cannot be known, so nothing is reused beside them."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge, modules_of

Named = tuple[str, nn.Module]


def hook_points(model: Bridge) -> list[Named]:
    """Every hook point of the bridge, once, under one of its names."""
    points = {id(p): p for p in model.hook_dict.values()}.values()
    return [(p.name or "a hook point", p) for p in points if isinstance(p, HookPoint)]


def modules(model: Bridge) -> list[nn.Module]:
    """Every other module of the transformers model, which is the first."""
    return [m for m in modules_of(model.original_model) if not isinstance(m, HookPoint)]


def foreign_hook(points: Sequence[Named], others: Sequence[nn.Module]) -> str:
    """The name of a hook point or module with a hook that neither TransformerLens nor transformers put there, or ""."""
    for name, module in (*points, *(("", m) for m in others)):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            if any(_is_foreign(hook) for table in tables for hook in table.values()):
                names = (name,) if name else (n for n, m in others[0].named_modules() if m is module)
                return next(iter(names), "") or type(module).__name__
    return ""


@contextmanager
def muted(model: Bridge) -> Iterator[None]:
    """Inside the block somebody else's hooks are not called."""
    tables = [
        (module, name, getattr(module, name))
        for module in (*(point for _, point in hook_points(model)), *modules(model))
        for name in ("_forward_hooks", "_forward_pre_hooks")
        if any(map(_is_foreign, getattr(module, name).values()))
    ]
    try:
        for module, name, table in tables:
            setattr(module, name, OrderedDict((k, hook) for k, hook in table.items() if not _is_foreign(hook)))
        yield
    finally:
        for module, name, table in tables:
            setattr(module, name, table)


def _is_foreign(hook: Any) -> bool:
    """Of a hook point it is asked of the function that it was given, inside the one that it gave to torch."""
    if _home(hook).startswith("transformer_lens"):
        names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
        cells = getattr(hook, "__closure__", None) or ()
        inside: dict[str, Any] = {name: cell.cell_contents for name, cell in zip(names, cells, strict=False)}
        hook = inside.get("hook", hook)
    return not _home(hook).startswith(("transformer_lens", "transformers."))


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", ""))
