"""What an edit changes in the residual stream where targets are predicted, and in what is added to it."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge, resolve_hook
from reftlens.cone.spans import first_block
from reftlens.editing.engine import Edit, attached, forward, hooked
from reftlens.editing.reft import Bound, Variant
from reftlens.text.batch import Batch

_STREAM = re.compile(r"blocks\.\d+\.(hook_in|hook_out|hook_resid_(pre|mid|post))|ln_final\.hook_in")
_OUTPUTS: tuple[tuple[Literal["attention", "MLP"], str], ...] = (
    ("attention", "hook_attn_out"),
    ("MLP", "hook_mlp_out"),
)


@dataclass(frozen=True)
class Component:
    """What adds to the stream (an edit of it, an attention or MLP output); or the final norm, which rescales it."""

    kind: Literal["edit", "attention", "MLP", "norm"]
    layer: int | None
    hook: str

    def __str__(self) -> str:
        short = self.hook.removeprefix("blocks.").replace(".hook_", " ")
        return (
            f"edit {short}"
            if self.kind == "edit"
            else f"{self.kind} {'' if self.layer is None else self.layer}".strip()
        )


@dataclass(eq=False, repr=False)
class _AtTargets:
    """Records what passes through a hook where targets are predicted, in float64 on the CPU."""

    at: tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]
    passed: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, hook: HookPoint) -> None:
        self.passed.append(h[self.at].cpu().double())


@dataclass(frozen=True)
class Layout:
    """The components from the first edit on, and the hooks that tell them."""

    components: tuple[Component, ...]
    """In the order of `stream`, `embedded`, `outputs`; then the norm."""
    stream: list[HookPoint]
    """Edited hooks of the residual stream."""
    embedded: list[HookPoint]
    """Where the stream begins, if embeddings are edited."""
    outputs: list[HookPoint]
    final: list[HookPoint]
    """The stream before the final norm, and what that divides by."""


def layout_of(model: Bridge, bound: Bound, variant: Variant) -> Layout:
    hooks, depth, sites = model.hook_dict, int(model.cfg.n_layers), bound.reft.sites
    stream: dict[int, tuple[HookPoint, Component]] = {}
    embedded: list[Component] = []
    first = depth
    for i in bound.reft.active(variant):
        point, name = bound.points[i], bound.points[i].name or ""
        place, block = first_block(name, depth), re.match(r"blocks\.(\d+)\.", name)
        component = Component("edit", int(block[1]) if block else None, sites[i].hook)
        in_stream = bound.carries[i] is not None or _STREAM.fullmatch(name)
        if place is None or (place == depth and not in_stream):
            raise ValueError(f"{sites[i]} has no way through the residual stream to the final norm")
        first = min(first, place)
        if in_stream:
            stream.setdefault(id(point), (point, component))
        elif block is None and not embedded:
            embedded.append(component)
    added = [
        Component(kind, layer, f"blocks.{layer}.{hook}") for layer in range(first, depth) for kind, hook in _OUTPUTS
    ]
    edited = [component for _, component in stream.values()]
    return Layout(
        (*edited, *embedded, *added, Component("norm", None, "ln_final.hook_scale")),
        [point for point, _ in stream.values()],
        [resolve_hook(model, "blocks.0.hook_in", hooks) for _ in embedded],
        [resolve_hook(model, component.hook, hooks) for component in added],
        [resolve_hook(model, f"ln_final.{name}", hooks) for name in ("hook_in", "hook_scale")],
    )


@torch.no_grad()
def changes_of(
    model: Bridge, batch: Batch, other: Int[Tensor, " targets"] | None, edits: list[Edit], layout: Layout
) -> tuple[list[Float[Tensor, " targets"]], Float[Tensor, " targets"]]:
    """Each component's share of the change of each target's logit, and that change."""
    start, end, logits = _states(model, batch, layout, [])
    start_edited, end_edited, logits_edited = _states(model, batch, layout, edits)
    count, outputs = len(layout.stream), len(layout.outputs)
    changed = [end_edited[i] - start_edited[i] for i in range(count)]
    changed += [b - a for a, b in zip(start[count:], start_edited[count:], strict=True)]
    changed += [end_edited[i] - end[i] for i in range(count, count + outputs)]
    (x, length), (_, length_edited) = end[-2:], end_edited[-2:]
    ids = batch.target_ids
    u = _directions(model, ids)
    gained = (logits_edited - logits).cpu().double()
    total = gained.gather(1, ids.cpu()[:, None])[:, 0]
    if other is not None:
        u = u - _directions(model, other)
        total = total - gained.gather(1, other.cpu()[:, None])[:, 0]
    shares = [((u * change).sum(dim=1) / length_edited[:, 0]) for change in changed]
    rescaled = (u * x).sum(dim=1) * (1 / length_edited - 1 / length)[:, 0]
    return [*shares, rescaled], total


def _states(
    model: Bridge, batch: Batch, layout: Layout, edits: list[Edit]
) -> tuple[list[Tensor], list[Tensor], Float[Tensor, "targets vocab"]]:
    """At the predicting positions: edited hooks before their edits, all hooks after them, and the logits."""
    start = [(point, _AtTargets(batch.predicting)) for point in [*layout.stream, *layout.embedded]]
    end = [(point, _AtTargets(batch.predicting)) for point in [*layout.stream, *layout.outputs, *layout.final]]
    with hooked(start), attached(edits), hooked(end):  # hooks are called in the order they were added
        logits = forward(model, batch.tokens, batch.attention_mask).logits[batch.predicting]
    for point, reader in [*start, *end]:
        if len(reader.passed) != 1:
            raise ValueError(f"{point.name} fired {len(reader.passed)} times in one forward pass, expected once")
    return [r.passed[0] for _, r in start], [r.passed[0] for _, r in end], logits


def _directions(model: Bridge, ids: Int[Tensor, " targets"]) -> Float[Tensor, "targets d"]:
    """The column of the unembedding of each token, the gain of the final norm (and its centring) folded in."""
    bridge: Any = model
    norm = bridge.ln_final
    columns = bridge.W_U.detach()[:, ids].T.cpu().double()
    folded = columns * (norm.weight.detach().cpu().double() + float(norm.uses_weight_offset))
    return folded if norm.uses_rms_norm else folded - folded.mean(dim=1, keepdim=True)
