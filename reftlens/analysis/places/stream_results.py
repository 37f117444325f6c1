"""What an edit changes in the residual stream of one text, at each token and layer; with a view to click in."""

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unicodedata import bidirectional

from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlens import figures
from reftlens.figures import Axes, DataFrame
from reftlens.files import templates
from reftlens.text.view import token_text

_FOLDER = Path(__file__).parent
SCRIPT, STYLE = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("token_view.js", "token_view.css"))
_MEASURES = {"change": "change of the residual stream ‖h' - h‖ / ‖h‖", "kl": "KL of what is read there (nats)"}
_WIDEST = 14.0
"""Of a figure, in inches."""
_SHOWN = {code: 0x2400 + code for code in range(32)} | dict(zip(map(ord, "\n\t\x7f"), "⏎⇥␡", strict=True))
"""What stands for a character that has no shape."""


class Read(NamedTuple):
    """What is predicted at a layer and token: texts of the likeliest tokens, with their probabilities."""

    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class StreamEffects:
    """An edit's effect on one text, at each layer and token; shown in a notebook, a view in which tokens are clicked.

    Layers are the stream that the first block reads (`embed`), and what each block leaves. What is read at a layer is
    what the final norm and the unembedding make of the stream there (the logit lens of nostalgebraist 2020); at the
    last one it is the model's own prediction of the next token.
    """

    tokens: tuple[str, ...]
    layers: tuple[str, ...]
    acts: Bool[Tensor, "layer position"]
    """Whether a site chooses the token there: of an edit inside a block, in the row of that block."""
    change: Float[Tensor, "layer position"]
    """`‖h' - h‖ / ‖h‖`, `h` the unedited stream; exactly 0 where the edit does not reach."""
    divergence: Float[Tensor, "layer position"]
    """`KL(p' ‖ p)` of what is read, in nats; exactly 0 where the edit does not reach."""
    top: Int[Tensor, "run layer position rank"]
    """Ids of the likeliest tokens that are read: in the unedited run, then in the edited one."""
    probability: Float[Tensor, "run layer position rank"]
    """Of these tokens."""
    tokenizer: Any = field(default=None, repr=False)

    def read(self, run: Literal["unedited", "edited"], layer: int, position: int) -> Read:
        """What is read at a layer (by its row) and a token, the likeliest first."""
        at = ("unedited", "edited").index(run), layer, position
        texts = (self._text(token) for token in self.top[at].tolist())
        return Read(tuple(texts), tuple(self.probability[at].tolist()))

    def to_frame(self) -> DataFrame:
        """One row per token and layer."""
        records = []
        for position, token in enumerate(self.tokens):
            for layer, name in enumerate(self.layers):
                before, after = (self.read(run, layer, position) for run in ("unedited", "edited"))
                record = {"position": position, "token": token, "layer": name}
                record["acts"] = bool(self.acts[layer, position])
                record["change"], record["kl"] = (x[layer, position].item() for x in (self.change, self.divergence))
                record |= {"unedited": before.tokens[0], "p_unedited": before.probabilities[0]}
                records.append(record | {"edited": after.tokens[0], "p_edited": after.probabilities[0]})
        return figures.table(records)

    def plot(self, ax: Axes | None = None, *, measure: str = "change") -> Axes:
        """Heat map of layers over tokens; a dot: a site chooses the token there.

        Args:
            measure: `"change"` of the stream, or `"kl"` of what is read.
        """
        if measure not in _MEASURES:
            raise ValueError(f"measure={measure!r}, expected one of {', '.join(_MEASURES)}")
        width, height = min(_WIDEST, 2.6 + 0.28 * len(self.tokens)), 1.8 + 0.16 * len(self.layers)
        ax = figures.axes(ax, width=width, height=height)
        values = self.change if measure == "change" else self.divergence
        image = ax.imshow(values.tolist(), origin="lower", aspect="auto", cmap="viridis", vmin=0)
        figures.colour_bar(ax, image, _MEASURES[measure])
        for layer, position in self.acts.nonzero().tolist():
            ax.plot(position, layer, ".", color="white", markeredgecolor="black", markersize=7)
        ax.set_xticks(range(len(self.tokens)), [figures.plain(_shown(t)) for t in self.tokens], rotation=90)
        every = max(1, len(self.layers) // 8)
        ax.set_yticks(range(0, len(self.layers), every), self.layers[::every])
        ax.set(xlabel="token", ylabel="layer")
        ax.grid(visible=False)
        return ax

    def __repr__(self) -> str:
        """The tokens whose next token is moved most."""
        reached = int(((self.change > 0) | (self.divergence > 0)).any(dim=0).sum())
        lines = [f"{reached} of {len(self.tokens)} tokens are changed; most, by the KL of the next token:"]
        for position in self.divergence[-1].argsort(descending=True, stable=True)[:8].tolist():
            lines.append(f"{position:>4} {_quoted(self.tokens[position])}: {self._sentence(position)}")
        return figures.screenful(lines)

    def html(self) -> str:
        """The view without style and script; with them one token is shown at a time, and without them every one."""
        most, chosen = _largest(self.change) or 1.0, int(self.divergence[-1].argmax())
        tokens = [
            {
                "text": _shown(token),
                "name": f"{position}: {_shown(token)}, {self._sentence(position)}",
                "layers": [round(min(1.0, x / most), 2) for x in self.change[:, position].tolist()],
                "acts": bool(self.acts[:, position].any()),
                "sentence": self._sentence(position),
                "rows": self._rows(position, most),
            }
            for position, token in enumerate(self.tokens)
        ]
        return templates(_FOLDER).get_template("token_view.html.j2").render(tokens=tokens, chosen=chosen)

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.html()}<script>{SCRIPT}</script>"

    def _rows(self, position: int, most: float) -> list[dict[str, Any]]:
        """The layers that the edit reaches at a token, the last first."""
        reached = (self.change[:, position] > 0) | (self.divergence[:, position] > 0) | self.acts[:, position]
        return [
            {
                "layer": self.layers[layer] + " (next token)" * (layer == len(self.layers) - 1),
                "acts": bool(self.acts[layer, position]),
                "change": _percent(self.change[layer, position].item()),
                "bar": round(min(100.0, 100 * self.change[layer, position].item() / most), 1),
                "kl": f"{self.divergence[layer, position].item():.3g}",
                "reads": [self._listed(self.read(run, layer, position)) for run in ("unedited", "edited")],
            }
            for layer in reversed(reached.nonzero()[:, 0].tolist())
        ]

    def _listed(self, read: Read) -> list[tuple[str, str]]:
        return [(_shown(token), f"{p:.0%}") for token, p in zip(*read, strict=True)]

    def _sentence(self, position: int) -> str:
        """What the edit does at a token, in words."""
        largest = self.change[:, position].max().item()
        if not largest and not self.divergence[-1, position]:
            return "unchanged at every layer"
        before, after = (_quoted(self.read(run, -1, position).tokens[0]) for run in ("unedited", "edited"))
        moved = f"{before} stays likeliest" if before == after else f"likeliest {before} → {after}"
        at = self.layers[int(self.change[:, position].argmax())]
        stream = f"changed by up to {_percent(largest)}, at layer {at}" if largest else "unchanged"
        return f"next token's KL {self.divergence[-1, position].item():.3g} nats, {moved}; stream {stream}"

    def _text(self, token: int) -> str:
        return f"#{token}" if self.tokenizer is None else token_text(self.tokenizer, token)


def _shown(token: str) -> str:
    """A token's text on one line."""
    return token.translate(_SHOWN)


def _quoted(token: str) -> str:
    """A token's text in a sentence, whose order it leaves alone where it is read from right to left."""
    text = repr(_shown(token))
    return f"\u2068{text}\u2069" if any(bidirectional(c) in ("R", "AL") for c in token) else text


def _largest(change: Float[Tensor, "layer position"]) -> float:
    """Of the changes that are finite."""
    return max((x for x in change.flatten().tolist() if isfinite(x)), default=0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
