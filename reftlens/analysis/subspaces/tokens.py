"""Which tokens a learned direction promotes and which it suppresses, read through the final norm and unembedding."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis.interchange import random_basis
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens
from transformer_lens.tools.analysis.logit_lens import logit_readout

from reftlens import figures
from reftlens.analysis.subspaces.frame import PrincipalFrame, directions_of, site_frame
from reftlens.analysis.subspaces.geometry import columns_of, site_index
from reftlens.analysis.subspaces.weights import into_stream
from reftlens.bridge.protocol import Bridge, device_of, resolve_hook
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame
from reftlens.text.batch import Batch
from reftlens.text.view import token_text

Effect = Literal["promotes", "suppresses"]


@dataclass(frozen=True)
class DirectionToken:
    """One token along one direction."""

    direction: int
    effect: Effect
    place: int
    """1 for the token that is promoted, or suppressed, most."""
    token: str
    id: int
    logit: float


@dataclass(frozen=True, eq=False)
class DirectionTokens:
    """The most promoted and most suppressed tokens of each direction of a site."""

    site: Site
    basis: Float[Tensor, "d directions"]
    """The directions that were read, of unit length."""
    principal: bool
    """Whether they are principal axes of the edit; else columns of the basis as it was trained."""
    rows: tuple[DirectionToken, ...]
    random: Float[Tensor, " draws"]
    """The largest logit, up or down, of each of some random directions."""
    lens: str

    @property
    def chance(self) -> float:
        """95 % of random directions have no token with a larger logit."""
        return torch.quantile(self.random, 0.95).item()

    def top(self, direction: int = 0, effect: Effect = "promotes") -> list[str]:
        """The tokens, the strongest first."""
        return [r.token for r in self.rows if (r.direction, r.effect) == (direction, effect)]

    def p(self, direction: int) -> float:
        """Share of random directions whose strongest token is as strong, `(1 + #) / (1 + draws)`."""
        most = max(abs(r.logit) for r in self.rows if r.direction == direction)
        return (1 + int((self.random >= most).sum())) / (1 + len(self.random))

    def to_frame(self) -> DataFrame:
        """One row per direction, effect and token; `chance` and `p` are of the strongest token of a direction."""
        site, chance = {"site": str(self.site)}, {"chance": self.chance}
        return figures.table([site | asdict(row) | chance | {"p": self.p(row.direction)} for row in self.rows])

    def plot(self, ax: Axes | None = None, *, direction: int = 0) -> Axes:
        """Bars of one direction's tokens; dashed: what 95 % of random directions stay within."""
        rows = [r for r in self.rows if r.direction == direction]
        if not rows:
            raise ValueError(f"no direction {direction}, there are: {sorted({r.direction for r in self.rows})}")
        rows.sort(key=lambda r: r.logit, reverse=True)
        ax = figures.axes(ax, width=5.6, height=0.24 * len(rows) + 1.2)
        colours = [figures.BLUE if r.effect == "promotes" else figures.ORANGE for r in rows]
        ax.barh(range(len(rows)), [r.logit for r in rows], color=colours)
        for side in (-1, 1):
            figures.level(ax, side * self.chance, horizontal=False)
        ax.set_yticks(range(len(rows)), [figures.plain(repr(r.token)) for r in rows])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(xlabel=f"logit, {self.lens} (dashed: 95 % of random directions)", title=f"direction {direction}")
        return ax

    def __repr__(self) -> str:
        lines = [f"{self.site}, {self.lens}; 95 % of random directions stay within ±{self.chance:.2f}"]
        for i in sorted({r.direction for r in self.rows}):
            for effect in ("promotes", "suppresses"):
                lines.append(f"direction {i} {effect} {', '.join(map(repr, self.top(i, effect)))}")
        return "\n".join(lines)


@torch.no_grad()
def direction_tokens(
    reft: ReFT,
    model: Bridge,
    data: Batch | PrincipalFrame | None = None,
    *,
    site: Site | int | None = None,
    directions: Sequence[int] | None = None,
    top: int = 10,
    lens: Literal["logit"] | JacobianLens = "logit",
    draws: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> DirectionTokens:
    """Tokens that each direction at the residual stream, or written to it, promotes and suppresses.

    `(L(v) - L(-v)) / 2`, `L` the final norm, the unembedding and any soft-cap after it (`logit_readout` of
    TransformerLens): biases cancel. The norm gives `v` the length √d, so the logits have no scale of their own: they
    compare tokens, and a direction with random ones. Reading a middle layer so assumes that the blocks after it pass
    the direction on; a Jacobian lens puts `J v` in place of `v`, `J` the mean derivative of the last block's output
    (Gurnee et al. 2026, as TransformerLens fits it).

    A direction of neurons or of z is read as what the output projection makes of it, `W_outᵀ v` or `W_Oᵀ v` of the
    site's heads; so are the random directions that it is compared with.

    Args:
        data: read the principal frame over it (principal axes of the edit, each towards the mean edit), or the one
            that `principal_frame` gave; without it the columns of the basis, which in an orthonormal frame of rank 2
            or more are no more than any others in their span.
        directions: which; None reads all, 16 at most.
        lens: `"logit"`, or `JacobianLens.fit(model, texts, corpus="…")` for a resid_pre or resid_post site.
        draws: random directions for the chance level.

    Raises:
        ValueError: for a site whose vectors the unembedding cannot read, or a direction that is not there.
    """
    index = site_index(reft, site)
    place = reft.sites[index]
    reader = _lens(model, place, reft[index].d, lens)
    if data is None:
        columns = columns_of(reft[index]).cpu().double()
    else:
        columns = site_frame(reft, model, data, index, batch_size=batch_size, progress=progress).basis
    indices = directions_of(columns.shape[1], directions)
    lengths = columns[:, indices].norm(dim=0)
    if not bool((lengths > 0).all()):
        raise ValueError(f"{place}: a direction of the basis is zero and promotes nothing")
    basis = columns[:, indices] / lengths
    random = torch.cat([random_basis(len(basis), 1, seed + i) for i in range(draws)], dim=1).double()
    strongest = reader.logits(random).abs().amax(dim=1)
    logits = zip(indices, reader.logits(basis), strict=True)
    rows = [row for direction, values in logits for row in _top(model.tokenizer, direction, values, top)]
    name = "logit lens" if isinstance(lens, str) else "Jacobian lens"
    return DirectionTokens(place, basis, data is not None, tuple(rows), strongest, name)


@dataclass(frozen=True)
class _Lens:
    """How vectors at a site become logits."""

    model: Bridge
    jacobian: JacobianLens | None
    layer: int
    norm: bool
    projection: Float[Tensor, "width d"] | None = None
    """What takes directions of the site to the residual stream; None where they are there."""

    def logits(self, columns: Float[Tensor, "width n"]) -> Float[Tensor, "n vocab"]:
        """`(L(v) - L(-v)) / 2` of each column."""
        written = columns if self.projection is None else F.normalize(self.projection.T @ columns, dim=0)
        vectors = written.T.to(device_of(self.model), torch.float32)
        if self.jacobian is not None and self.layer in self.jacobian.jacobians:
            vectors = self.jacobian.transport(vectors, self.layer)
        up, down = (logit_readout(self.model, v, apply_ln=self.norm).values for v in (vectors, -vectors))
        return (up.float() - down.float()).cpu() / 2


def _lens(model: Bridge, site: Site, d: int, lens: Literal["logit"] | JacobianLens) -> _Lens:
    point = resolve_hook(model, site.hook)
    if point.name == "ln_final.hook_out":
        if isinstance(lens, JacobianLens):
            raise ValueError('the final norm is behind the last block: read it by lens="logit"')
        return _Lens(model, None, int(model.cfg.n_layers), False)
    _, projection = into_stream(model, site, d)
    if not isinstance(lens, JacobianLens):
        if lens != "logit":
            raise ValueError(f'lens={lens!r}, expected "logit" or JacobianLens.fit(model, texts, corpus="…")')
        return _Lens(model, None, -1, True, projection)
    lens.validate_model(model)
    hooks, last = model.hook_dict, int(model.cfg.n_layers) - 1
    for layer in range(last + 1):
        after = hooks.get(f"blocks.{layer + 1}.hook_resid_pre")
        if point in (hooks[f"blocks.{layer}.hook_resid_post"], after):
            if layer != last and layer not in lens.source_layers:
                raise ValueError(f"the lens was not fitted for layer {layer}, only for {lens.source_layers}")
            return _Lens(model, lens, layer, True)
    raise ValueError(f"a Jacobian lens reads the output of a block, and {site} is none: use resid_post or resid_pre")


def _top(tokenizer: Any, direction: int, logits: Float[Tensor, " vocab"], top: int) -> list[DirectionToken]:
    """The strongest tokens both ways."""
    rows = []
    effects: tuple[tuple[Effect, int], ...] = (("promotes", 1), ("suppresses", -1))
    for effect, sign in effects:
        for place, i in enumerate((sign * logits).topk(min(top, len(logits))).indices.tolist(), start=1):
            text = token_text(tokenizer, i) if tokenizer is not None else f"#{i}"
            rows.append(DirectionToken(direction, effect, place, text, i, logits[i].item()))
    return rows
