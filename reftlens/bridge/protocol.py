"""What reftlens uses of a `TransformerBridge`, and nothing more; the bridge stays the user's own."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.classes import check_reads_text
from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.offload import runs_on
from reftlens.errors import HookNotFound


@runtime_checkable
class Bridge(Protocol):
    """The part of `transformer_lens.model_bridge.TransformerBridge` that reftlens calls."""

    cfg: Any
    training: bool
    tokenizer: Any

    @property
    def hook_dict(self) -> dict[str, HookPoint]: ...

    @property
    def original_model(self) -> nn.Module: ...

    def check_hooks_to_add(self, hook_point: HookPoint, hook_point_name: str, hook: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class Executor(Protocol):
    """What work is given to: any `concurrent.futures.Executor`, and all else with `submit(f, x)` that gives something
    with `.result()`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any: ...


def is_bridge(model: object) -> TypeGuard[Bridge]:
    """`isinstance(model, Bridge)`, which up to Python 3.11 reads every attribute, and `hook_dict` lists all hooks."""
    names = ("hook_dict", "original_model", "check_hooks_to_add")
    return all(hasattr(type(model), name) or name in getattr(model, "__dict__", ()) for name in names)


def loader_of(model: Bridge | Callable[[], Bridge], executor: object) -> Callable[[], Bridge]:
    """What loads a model where work is done: a function itself; of a model at hand, which no executor takes, itself."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"executor is a {type(executor).__name__}, expected one with submit(f, x), which gives something with "
            ".result(), such as a concurrent.futures.Executor"
        )
    if not isinstance(model, Bridge):
        return model
    if executor is not None:
        raise ValueError("an executor needs model=…, a function that loads the model there, e.g. rl.load_model")
    return lambda: model


def resolve_hook(model: Bridge, name: str, hooks: dict[str, HookPoint] | None = None) -> HookPoint:
    """The hook point behind a name or alias; `.name` of it is the canonical name.

    Raises:
        HookNotFound: no hook has that name on this model.
        ValueError: the hook needs a switch on the model (`set_use_…`) that is off, or is that of another site.
    """
    hooks = model.hook_dict if hooks is None else hooks
    point = hooks.get(name)
    if point is None:
        if name.endswith("hook_resid_mid") and getattr(model.cfg, "parallel_attn_mlp", False):
            raise HookNotFound(
                f"{model.cfg.model_name} has no {name}: its blocks compute attention and MLP in parallel from "
                "one residual stream; use hook_resid_pre or hook_resid_post"
            )
        depth, layer = model.cfg.n_layers, re.match(r"blocks\.(-?\d+)\.", name)
        if layer is not None and not 0 <= int(layer[1]) < depth:
            layers = f"it has {depth} layers, 0 to {depth - 1}"
            raise HookNotFound(f"{model.cfg.model_name} has no hook {name!r}: {layers}")
        near = difflib.get_close_matches(name, hooks, n=4, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else "; rl.hooks(model) lists the usable ones"
        raise HookNotFound(f"{model.cfg.model_name} has no hook {name!r}{hint}")
    other = other_site(name, point, hooks)
    if other:
        raise ValueError(
            f"{name} is the hook of {other} on {model.cfg.model_name}: the neurons of its experts have no hook, so "
            f"nothing but what the MLP adds to the residual stream can be edited; use mlp_out, or Site({other!r}, …)"
        )
    try:
        model.check_hooks_to_add(point, point.name or name, None)
    except ValueError as error:
        raise ValueError(f"nothing passes through {name} as the model is set: {error}") from None
    return point


def other_site(name: str, point: HookPoint, hooks: dict[str, HookPoint]) -> str:
    """The site whose hook `name` is an alias of though it means another place, or ""."""
    other = f"{name.removesuffix('mlp.hook_post')}hook_mlp_out"
    mistaken = name.endswith(".mlp.hook_post") and point.name != name and hooks.get(other) is point
    return other if mistaken else ""


def check_model(model: Any) -> None:
    """Raise where nothing right could come of `model`, as it is or as torch is set.

    Raises:
        TypeError: for anything else than a `TransformerBridge`.
        ValueError: for a bridge over a PeftModel; a model that does not read one text; weights loaded inside
            `torch.inference_mode()`, whose changes cannot be seen; a default device that is not the CPU.
    """
    if not is_bridge(model):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a TransformerBridge: load_model(…), or "
            "TransformerBridge.boot_transformers(name, hf_model=…)"
        )
    inside = model.original_model
    if hasattr(type(inside), "get_base_model"):
        raise ValueError(
            "this is a bridge over a PeftModel, whose hooks are not those of the model in it: make one of that model, "
            "with its adapters, load_model(peft_model)"
        )
    check_reads_text(getattr(inside, "config", None), type(inside), type(inside).__name__)
    if any(p.is_inference() for p in parameters_of(inside)):
        raise ValueError("the model was loaded inside torch.inference_mode(): load it outside")
    if torch.get_default_device().type != "cpu":
        raise ValueError(
            f"torch.set_default_device({str(torch.get_default_device())!r}) is on, and reftlens puts each tensor on "
            "the device of the model by itself: call torch.set_default_device('cpu')"
        )


def underlying(model: Bridge | nn.Module) -> nn.Module:
    """The transformers model inside a bridge, or the plain model itself."""
    inside: Any = model.original_model if is_bridge(model) else model
    return inside


def modules_of(root: nn.Module) -> list[nn.Module]:
    """`list(root.modules())` without its generators one inside another: a bridge has a thousand modules and more."""
    every = {root: None}

    def enter(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in every:
                every[child] = None
                if child._modules:
                    enter(child)

    enter(root)
    return list(every)


def parameters_of(root: nn.Module) -> list[nn.Parameter]:
    """`list(root.parameters())`, as fast."""
    every = (p for m in modules_of(root) if m._parameters for p in m._parameters.values() if p is not None)
    return list({id(p): p for p in every}.values())


def bos_of(tokenizer: Any) -> int | None:
    """The id of the BOS token, where this tokenizer puts it in front of text: a bridge's does, its original may not."""
    start = tokenizer.bos_token_id
    return start if start is not None and list(tokenizer("a").input_ids[:1]) == [start] else None


def device_of(model: Bridge | nn.Module) -> torch.device:
    """The device that a model's first weight computes on, which is where its inputs go."""
    return next(iter(_devices(underlying(model).modules())))


def devices_of(root: nn.Module) -> set[torch.device]:
    """The devices that a model computes on; a weight that accelerate keeps elsewhere is fetched to one of them."""
    return set(_devices(modules_of(root)))


def _devices(modules: Iterable[nn.Module]) -> Iterator[torch.device]:
    return (runs_on(m, p) for m in modules if m._parameters for p in m._parameters.values() if p is not None)


def check_deterministic(model: Bridge) -> None:
    """Raise where dropout of the model itself is active: results and reuse would both be wrong.

    Train mode is accepted where every dropout is 0 (gradient checkpointing needs train mode).
    """
    root = model.original_model
    if not any(m.training for m in modules_of(root)):
        return
    active = [
        f"{name} (p={m.p})"
        for name, m in root.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
    config = vars(getattr(root, "config", object())) if hasattr(root, "config") else {}
    active += [
        f"config.{key} = {value}"
        for key, value in config.items()
        if ("dropout" in key or key.endswith("pdrop"))
        and isinstance(value, float)
        and value > 0
        and not key.startswith(("classifier", "summary"))  # of heads that a language model does not have
    ]
    if active:
        raise ValueError(
            f"the model is in train mode with active dropout: {', '.join(active[:4])}"
            f"{' …' if len(active) > 4 else ''}; call model.eval(), or set every dropout to 0"
        )


def parameter_total(model: Bridge | nn.Module) -> int:
    """Parameters of the model, shared ones counted once."""
    return sum(p.numel() for p in parameters_of(underlying(model)))


@contextmanager
def gradients_on() -> Iterator[None]:
    """Inside the block gradients are computed, whatever was switched off around it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def frozen(model: Bridge) -> Iterator[None]:
    """The model's parameters take no gradient inside the block; their flags are put back after it.

    They are known by their places: accelerate puts others there whenever it fetches weights that it keeps elsewhere.
    """
    tables = [m._parameters for m in modules_of(model.original_model) if m._parameters]
    places = [(table, name, p) for table in tables for name, p in table.items() if p is not None]
    with exclusive(model):
        flags = [p.requires_grad for _, _, p in places]
        try:
            for _, _, p in places:
                p.requires_grad_(False)
            yield
        finally:
            for (table, name, before), flag in zip(places, flags, strict=True):
                now = table[name] if before.is_meta else before
                if now is not None:
                    now.requires_grad_(flag)
