"""The tokens that move most along a learned direction, shown in their text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.analysis.subspaces.frame import PrincipalFrame, directions_of, site_frame
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame
from reftlens.text.batch import Batch
from reftlens.text.view import token_spans

End = Literal["largest", "smallest"]


@dataclass(frozen=True)
class DirectionExample:
    """One token of the data."""

    direction: int
    end: End
    place: int
    """1 for the token whose code is the largest, or the smallest."""
    code: float
    """How far the edit moves it along the direction, in units of the hidden state."""
    row: int
    position: int
    """Of the token in its row, from 0, padding not counted."""
    before: str
    token: str
    after: str


@dataclass(frozen=True, eq=False, repr=False)
class DirectionExamples:
    """The tokens at both ends of each direction; directions are principal axes of the edit over the data."""

    site: Site
    rows: tuple[DirectionExample, ...]
    codes: Float[Tensor, "tokens directions"]
    """Of all edited tokens, in the order of the data."""
    directions: tuple[int, ...]

    def to_frame(self) -> DataFrame:
        """One row per direction, end and token; `rms` is over all edited tokens."""
        scale = dict(zip(self.directions, self.codes.square().mean(dim=0).sqrt().tolist(), strict=True))
        site = {"site": str(self.site)}
        return figures.table([site | asdict(row) | {"rms": scale[row.direction]} for row in self.rows])

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """Histogram of the code of all edited tokens, one line per direction; dashed: no edit."""
        ax = figures.axes(ax)
        low, high = self.codes.min().item(), self.codes.max().item()
        bins = [low + i * (high - low) / 40 for i in range(41)] if high > low else [low - 0.5, low + 0.5]
        for i, (direction, codes) in enumerate(zip(self.directions, self.codes.T, strict=True)):
            style = ("solid", "dotted", "dashdot")[i // len(figures.CYCLE) % 3]
            name = figures.entry(ax, label, f"direction {direction}")
            line = {"color": color, "linestyle": style, "linewidth": 1.5, "label": name}
            ax.hist(codes.tolist(), bins=bins, histtype="step", **line)
        figures.level(ax, 0.0, horizontal=False)
        ax.set(xlabel="edit along the direction (units of the hidden state)", ylabel="tokens")
        ax.legend(frameon=False)
        return ax

    def _repr_html_(self) -> str:
        """A table, the token marked in its text."""
        style = "text-align:left;white-space:pre-wrap;font-family:monospace"
        lines = [
            f"<tr><td>{r.direction}</td><td>{r.end}</td><td>{r.code:+.3f}</td><td>{r.row}</td>"
            f'<td style="{style}">{escape(r.before)}<mark><b>{escape(r.token)}</b></mark>{escape(r.after)}</td></tr>'
            for r in self.rows
        ]
        head = "".join(f'<th scope="col">{c}</th>' for c in ("direction", "end", "edit", "row", "text"))
        caption = f"<caption>Tokens that are moved most at {escape(str(self.site))}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def __repr__(self) -> str:
        return "\n".join(
            f"direction {r.direction} {r.end} {r.code:+.3f}  {r.before!r} [{r.token!r}] {r.after!r}" for r in self.rows
        )


def direction_examples(
    reft: ReFT,
    model: Bridge,
    data: Batch | PrincipalFrame,
    *,
    site: Site | int | None = None,
    directions: Sequence[int] | None = None,
    top: int = 10,
    context: int = 12,
    batch_size: int = 16,
    progress: bool = True,
) -> DirectionExamples:
    """The edited tokens that move farthest along each direction, and farthest against it.

    Args:
        data: a batch, or what `principal_frame` gave for one, so that nothing is read again.
        directions: of the principal frame; None shows all, 16 at most.
        context: tokens of text shown before and after.

    Raises:
        ValueError: if the data has no tokenizer, or as `principal_frame`.
    """
    batch = data if isinstance(data, Batch) else data.data
    if batch.tokenizer is None:
        raise ValueError("showing tokens in their text needs a tokenizer, and this data has none: make it with encode")
    axes = site_frame(reft, model, data, site, batch_size=batch_size, progress=progress)
    edits, indices = axes.edits, directions_of(axes.basis.shape[1], directions)
    codes = edits.edits @ (edits.span.T @ axes.basis[:, indices])
    count = min(top, len(codes))
    examples = []
    for column, direction in enumerate(indices):
        order = codes[:, column].argsort(stable=True)
        ends: tuple[tuple[End, Tensor], ...] = (("largest", order.flip(0)[:count]), ("smallest", order[:count]))
        for end, tokens in ends:
            for place, i in enumerate(tokens.tolist(), start=1):
                row, code = int(edits.rows[i]), codes[i, column].item()
                text = _in_text(batch, row, int(edits.columns[i]), context)
                examples.append(DirectionExample(direction, end, place, code, row, *text))
    return DirectionExamples(axes.site, tuple(examples), codes, tuple(indices))


def _in_text(data: Batch, row: int, column: int, context: int) -> tuple[int, str, str, str]:
    """Its place in the row, and the text before, of and after a token."""
    real = data.attention_mask[row]
    ids, place = data.tokens[row][real].tolist(), int(real[:column].sum())
    first, last = max(0, place - context), min(len(ids), place + context + 1)
    text, spans = token_spans(data.tokenizer, ids[:last])
    start, end = spans[place]
    return place, text[spans[first][0] : start], text[start:end], text[end:]
