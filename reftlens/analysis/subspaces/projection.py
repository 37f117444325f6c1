"""The examples scattered in the plane of two learned directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from reftlens import figures
from reftlens.analysis.subspaces.frame import PrincipalFrame, site_frame
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.errors import check_one_of
from reftlens.figures import Axes, DataFrame
from reftlens.text.batch import Batch

Point = Literal["before", "after", "edit"]
Label = str | int | float

_COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's palette; the markers differ too."""
_MARKERS = "os^DvPX*<>"


@dataclass(frozen=True, eq=False)
class Plane:
    """One point for each edited token."""

    site: Site
    directions: tuple[int, int]
    points: Float[Tensor, "tokens 2"]
    """In units of the hidden state."""
    of: Point
    rows: Int[Tensor, " tokens"]
    """The row of the data that each token is of."""
    labels: tuple[Label, ...]
    """Of each token; empty if there are none."""
    shares: tuple[float, float]
    """Of the mean squared edit, that each of the two directions carries."""

    def to_frame(self) -> DataFrame:
        """One row per edited token."""
        x, y = self.points.T.tolist()
        frame = figures.table({"row": self.rows.tolist(), "x": x, "y": y})
        if self.labels:
            frame["label"] = list(self.labels)
        return frame.rename_axis("token")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Scatter, coloured by label: numbers of more than 8 values by a scale, other labels by colour and marker."""
        ax = figures.axes(ax, width=4.8, height=4.4)
        kinds = list(dict.fromkeys(self.labels))
        if len(kinds) > 8 and all(isinstance(k, int | float) for k in kinds):
            dots = ax.scatter(*self.points.T.tolist(), c=[float(x) for x in self.labels], cmap="viridis", s=16)
            figures.colour_bar(ax, dots, "label")
        else:
            for i, kind in enumerate(kinds or [None]):
                mine = [j for j in range(len(self.points)) if kind is None or self.labels[j] == kind]
                style = {"color": _COLOURS[i % 8], "marker": _MARKERS[i % 10], "alpha": 0.8, "linewidth": 0}
                label = None if kind is None else str(kind)
                ax.scatter(*self.points[mine].T.tolist(), s=18, label=label, **style)
            if kinds:
                ax.legend(frameon=False)
        vector = {"before": "hidden state", "after": "edited hidden state", "edit": "edit"}[self.of]
        x, y = (f"{vector} along direction {axis}" for axis in self._axes)
        for horizontal in (True, False):
            figures.level(ax, 0.0, horizontal=horizontal)
        ax.set(xlabel=x, ylabel=y)
        return ax

    @property
    def _axes(self) -> list[str]:
        shares = zip(self.directions, self.shares, strict=True)
        return [f"{direction} ({100 * share:.0f} % of the squared edit)" for direction, share in shares]

    def __repr__(self) -> str:
        return f"{self.site}: {len(self.points)} tokens along directions {' and '.join(self._axes)}"


def plane(
    reft: ReFT,
    model: Bridge,
    data: Batch | PrincipalFrame,
    labels: Sequence[Any] | Tensor | None = None,
    *,
    site: Site | int | None = None,
    directions: tuple[int, int] = (0, 1),
    of: Point = "before",
    batch_size: int = 16,
    progress: bool = True,
) -> Plane:
    """Where the edited tokens of `data` lie along two directions of the principal frame.

    Args:
        data: a batch, or what `principal_frame` gave for one, so that nothing is read again.
        labels: one for each row of `data`.
        of: the hidden state before the edit, after it, or the edit alone.

    Raises:
        ValueError: for a subspace without these directions, or another number of labels than of rows.
    """
    check_one_of("of", of, ("before", "after", "edit"))
    label_of = labels.tolist() if isinstance(labels, Tensor) else list(labels) if labels is not None else []
    batch = data if isinstance(data, Batch) else data.data
    if labels is not None and len(label_of) != len(batch):
        raise ValueError(f"{len(label_of)} label(s) for {len(batch)} row(s)")
    frame = site_frame(reft, model, data, site, batch_size=batch_size, progress=progress)
    edits, width = frame.edits, frame.basis.shape[1]
    if len(directions) != 2 or not all(0 <= i < width for i in directions):
        raise ValueError(f"directions={directions}, expected two of 0 to {width - 1}: the subspace has {width}")
    axes = edits.span.T @ frame.basis[:, list(directions)]
    vectors = {"before": edits.hidden, "after": edits.hidden + edits.edits, "edit": edits.edits}[of]
    shown = tuple(label_of[row] for row in edits.rows.tolist()) if label_of else ()
    first, second = (frame.shares[i].item() for i in directions)
    return Plane(edits.site, directions, vectors @ axes, of, edits.rows, shown, (first, second))
