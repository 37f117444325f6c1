"""The way an edit takes to the logits: what it changed in each attention and MLP output, read by the unembedding."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens import figures
from reftlens.analysis.places.stream import Component, changes_of, layout_of
from reftlens.analysis.statistics import Estimate, mean_of
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.reft import ReFT, Variant, mode
from reftlens.errors import index_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.comparison import per_example, pieces
from reftlens.text.batch import Batch


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

    def __str__(self) -> str:
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
    bound = reft.to(device_of(model)).bind(model)
    reft.require(data.view, variant)
    donors = bound.donors(model, data, variant)
    layout = layout_of(model, bound, variant)
    attributed, total = [], []
    with mode(reft, training=False):
        for rows in tqdm(pieces(len(data), batch_size), desc="path", unit="batch", disable=not progress):
            here = data[list(rows)].to("cpu")
            batch, other = here.to(device_of(model)), None if against is None else against[list(rows)].target_ids
            edits = bound.edits(batch.view, variant, donors, rows)
            changes, change = changes_of(model, batch, other, edits, layout)
            attributed.append(torch.tensor([per_example(share, here) for share in changes], dtype=torch.float64))
            total += per_example(change, here)
    return EditPath(layout.components, torch.cat(attributed, dim=1), torch.tensor(total, dtype=torch.float64))
