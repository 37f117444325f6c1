"""The way an edit takes to the logits: what it changed in each attention and MLP output, read by the unembedding."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from reftlens import figures
from reftlens.analysis.subspaces.readers import folded_in
from reftlens.bridge.offload import numbers_of
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of, resolve_hook
from reftlens.cone.spans import first_block
from reftlens.editing.bound import Place
from reftlens.editing.edits import Edit
from reftlens.editing.engine import attached, forward, hooked
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.variant import Variant
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.comparison import per_example, pieces
from reftlens.scoring.statistics import Estimate, mean_of
from reftlens.text.batch import Batch

_STREAM = re.compile(r"blocks\.\d+\.(hook_in|hook_out|hook_resid_(pre|mid|post))|ln_final\.hook_in")
_OUTPUTS: dict[Literal["attention", "MLP"], str] = {"attention": "hook_attn_out", "MLP": "hook_mlp_out"}


@dataclass(frozen=True)
class Component:
    """What adds to the stream (an edit of it, an attention or MLP output); or the final norm, which rescales it."""

    kind: Literal["edit", "attention", "MLP", "norm"]
    layer: int | None
    hook: str

    def __str__(self) -> str:
        if self.kind == "edit":
            return "edit " + self.hook.removeprefix("blocks.").replace(".hook_", " ")
        return self.kind if self.layer is None else f"{self.kind} {self.layer}"


@dataclass(frozen=True, eq=False)
class EditPath:
    """The change of the targets' logits (edited less unedited), component by component; mean over the targets."""

    components: tuple[Component, ...]
    attributed: Float[Tensor, "component example"]
    """Logits."""
    total: Float[Tensor, " example"]
    """The change of the model's own logits."""

    @property
    def rest(self) -> Float[Tensor, " example"]:
        """Not attributed: a soft-cap or scale after the unembedding, rounding, what blocks add besides these two."""
        return self.total - self.attributed.sum(dim=0)

    def contribution(self, component: Component | str) -> Estimate:
        """Of one component, given itself or as it prints ("attention 3"), in logits."""
        return mean_of(self.attributed[index_of([str(c) for c in self.components], str(component), "component")])

    def to_frame(self) -> DataFrame:
        """One row per component, then what is not attributed, and the total; in logits."""
        records = [{"component": c.kind, "layer": c.layer, "hook": c.hook} for c in self.components]
        records += [{"component": name, "layer": None, "hook": ""} for name in ("not attributed", "total")]
        values = [mean_of(v).as_columns("logit_change") for v in (*self.attributed, self.rest, self.total)]
        rows = [record | value for record, value in zip(records, values, strict=True)]
        return figures.table(rows).astype({"layer": "Int64"})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attention and MLP outputs over the layers, between the edits and what is left, with 95 % intervals."""
        edits = [str(c) for c in self.components if c.kind == "edit"]
        layers = sorted({str(c.layer) for c in self.components if c.kind in ("attention", "MLP")}, key=int)
        names = [*edits, *layers, "norm", "not attributed"]
        ax = figures.axes(ax, width=2.5 + 0.35 * len(names))
        ax.axhline(0, color="black", linewidth=0.8)
        colours = {"edit": figures.GREEN, "attention": figures.BLUE, "MLP": figures.ORANGE, "norm": figures.GREY}
        shift, labels = {"attention": -0.12, "MLP": 0.12}, {kind: kind for kind in ("edit", "attention", "MLP")}
        rows = [(c.kind, str(c.layer) if c.kind in shift else str(c), self.contribution(c)) for c in self.components]
        for kind, name, share in [*rows, ("norm", "not attributed", mean_of(self.rest))]:
            x = names.index(name) + shift.get(kind, 0.0)
            figures.interval(ax, x, share, color=colours[kind], label=labels.pop(kind, None))
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set(xlabel="layer", ylabel="change of the target's logit")
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        shares = zip(self.components, map(mean_of, self.attributed), strict=True)
        largest = [f"{c!s:<14} {share}" for c, share in sorted(shares, key=lambda pair: -abs(pair[1].value))[:8]]
        first = f"the targets' logits change by {mean_of(self.total)}, {len(self.total)} examples; most of it:"
        return "\n".join([first, *largest, f"not attributed {mean_of(self.rest)}"])


def edit_path(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    *,
    against: Batch | None = None,
    variant: Variant = Variant(),
    batch_size: int = 16,
    progress: bool = True,
) -> EditPath:
    """Direct logit attribution of what an edit changes, at the positions that predict the targets.

    With `x`, `x'` the stream before the final norm, `s`, `s'` what the norm divides by and `u` the target's column of
    the unembedding with the norm's gain (and centring) folded in, the logit changes by

        u·(x' - x) / s' + u·x (1/s' - 1/s),        x' - x = sum of what edits, attention and MLPs add

    The first term is read component by component, the norm's length held at that of the edited run; the second is the
    component "norm". Nothing else is linearised: what comes after the unembedding is in `rest`. Attention and MLP
    outputs hold all that the edit changed in them, at whatever position it acted (nostalgebraist 2020; Wang et al.
    2022, arXiv 2211.00593). TransformerLens' `direct_logit_attribution` gives the same in its compatibility mode.

    `against` are the same rows with other targets in the same places: their logits are taken off the targets'.

    Raises:
        ValueError: if an edit acts after the final norm, a row has no target, a site chooses no token in any row, or
            `against` has its targets elsewhere.
    """
    check_deterministic(model)
    data.require_targets()
    if against is not None and not torch.equal(against.target_mask, data.target_mask):
        raise ValueError("against has its targets in other places than the data: give the same rows, other answers")
    bound = reft.bound_to(model, data, variant)
    layout = _layout_of(model, [bound.places[i] for i in bound.active])
    attributed, total = [], []
    with training_mode(reft, training=False):
        for rows in tqdm(pieces(len(data), batch_size), desc="path", unit="batch", disable=not progress):
            here = data[list(rows)].to("cpu")
            batch, other = here.to(device_of(model)), None if against is None else _targets(against[list(rows)])
            changes, change = _changes_of(model, batch, other, bound.edits(batch.view, rows), layout)
            attributed.append(torch.stack([per_example(share, here) for share in changes]))
            total.append(per_example(change, here))
    return EditPath(layout.components, torch.cat(attributed, dim=1), torch.cat(total))


@dataclass(eq=False, repr=False)
class _AtTargets:
    """Records what passes through a hook where targets are predicted, in float64 on the CPU."""

    at: tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]
    passed: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, hook: HookPoint) -> None:
        self.passed.append(h[self.at].cpu().double())


@dataclass(frozen=True)
class _Layout:
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


def _layout_of(model: Bridge, places: Sequence[Place]) -> _Layout:
    hooks, depth = model.hook_dict, int(model.cfg.n_layers)
    stream: dict[int, tuple[HookPoint, Component]] = {}
    embedded: list[Component] = []
    first = depth
    for place in places:
        name = place.point.name or ""
        changed, block = first_block(name, depth), re.match(r"blocks\.(\d+)\.", name)
        component = Component("edit", int(block[1]) if block else None, place.site.hook)
        in_stream = place.carry is not None or _STREAM.fullmatch(name)
        if changed is None or (changed == depth and not in_stream):
            raise ValueError(f"{place.site} has no way through the residual stream to the final norm")
        first = min(first, changed)
        if in_stream:
            stream.setdefault(id(place.point), (place.point, component))
        elif block is None and not embedded:
            embedded.append(component)
    blocks = range(first, depth)
    outputs = [Component(kind, layer, f"blocks.{layer}.{hook}") for layer in blocks for kind, hook in _OUTPUTS.items()]
    edited = [component for _, component in stream.values()]
    return _Layout(
        (*edited, *embedded, *outputs, Component("norm", None, "ln_final.hook_scale")),
        [point for point, _ in stream.values()],
        [resolve_hook(model, "blocks.0.hook_in", hooks) for _ in embedded],
        [resolve_hook(model, component.hook, hooks) for component in outputs],
        [resolve_hook(model, f"ln_final.{name}", hooks) for name in ("hook_in", "hook_scale")],
    )


def _targets(batch: Batch) -> Int[Tensor, " targets"]:
    """Their tokens: the change of a logit is the same among whatever answers."""
    return batch.tokens[batch.target_mask]


@torch.no_grad()
def _changes_of(
    model: Bridge, batch: Batch, other: Int[Tensor, " targets"] | None, edits: list[Edit], layout: _Layout
) -> tuple[list[Float[Tensor, " targets"]], Float[Tensor, " targets"]]:
    """Each component's share of the change of each target's logit, and that change."""
    start, end, logits = _states(model, batch, layout, [])
    start_edited, end_edited, logits_edited = _states(model, batch, layout, edits)
    count, outputs = len(layout.stream), len(layout.outputs)
    changed = [end_edited[i] - start_edited[i] for i in range(count)]
    changed += [b - a for a, b in zip(start[count:], start_edited[count:], strict=True)]
    changed += [end_edited[i] - end[i] for i in range(count, count + outputs)]
    (x, length), (_, length_edited) = end[-2:], end_edited[-2:]
    ids = _targets(batch)
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
    model: Bridge, batch: Batch, layout: _Layout, edits: list[Edit]
) -> tuple[list[Tensor], list[Tensor], Float[Tensor, "targets vocab"]]:
    """At the predicting positions: edited hooks before their edits, all hooks after them, and the logits."""
    start = [(point, _AtTargets(batch.predicting)) for point in [*layout.stream, *layout.embedded]]
    end = [(point, _AtTargets(batch.predicting)) for point in [*layout.stream, *layout.outputs, *layout.final]]
    with hooked(model, start), attached(model, edits), hooked(model, end):  # hooks are called in the order they came
        logits = forward(model, batch.tokens, batch.attention_mask)[batch.predicting]
    for point, reader in [*start, *end]:
        if len(reader.passed) != 1:
            raise ValueError(f"{point.name} fired {len(reader.passed)} times in one forward pass, expected once")
    return [r.passed[0] for _, r in start], [r.passed[0] for _, r in end], logits


def _directions(model: Bridge, ids: Int[Tensor, " targets"]) -> Float[Tensor, "targets d"]:
    """The column of the unembedding of each token, the gain of the final norm (and its centring) folded in."""
    bridge: Any = model
    return folded_in(bridge.ln_final, numbers_of(bridge.W_U[:, ids])).T
