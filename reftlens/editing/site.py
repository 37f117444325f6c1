"""Where an intervention acts: a hook, the positions there and, at hooks with heads, which of them.

A hook is any name or alias that TransformerLens knows (`blocks.8.hook_resid_post`, `blocks.8.hook_out`,
`ln_final.hook_out`, …). Two sites with one intervention share its weights; two interventions do not.
"""

from dataclasses import dataclass
from typing import Any, SupportsIndex

from reftlens.numbers import Integers, whole, whole_numbers
from reftlens.text.positions import Positions
from reftlens.text.positions.spelling import as_positions, positions_from_dict

Where = Positions | str | SupportsIndex | Integers
Heads = SupportsIndex | Integers | None


@dataclass(frozen=True)
class Site:
    """A hook, the positions edited there and, at a hook with heads, the heads.

    At a hook with heads (`[batch, seq, heads, d_head]`) the chosen heads are edited together as one vector of
    width `len(heads) · d_head`; `heads=None` means all of them. At k and v the indices count key/value heads.
    """

    hook: str
    positions: Positions
    heads: tuple[int, ...] | None = None

    def __init__(self, hook: str, positions: Where, heads: Heads = None) -> None:
        object.__setattr__(self, "hook", hook)
        object.__setattr__(self, "positions", as_positions(positions))
        chosen = None if heads is None else whole_numbers(heads, f"heads at {hook}")
        if chosen is not None and (not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen)):
            raise ValueError(f"heads={heads!r} at {hook}: need distinct head indices from 0")
        object.__setattr__(self, "heads", chosen)

    def __str__(self) -> str:
        return f"{self.vectors} at {self.positions}"

    @property
    def vectors(self) -> str:
        """The hook, and its heads where they are chosen: what is edited of each token."""
        return self.hook if self.heads is None else f"{self.hook} heads {list(self.heads)}"

    def to_dict(self) -> dict[str, Any]:
        heads = None if self.heads is None else list(self.heads)
        return {"hook": self.hook, "positions": self.positions.to_dict(), "heads": heads}

    @staticmethod
    def from_dict(spec: dict[str, Any]) -> "Site":
        return Site(spec["hook"], positions_from_dict(spec["positions"]), spec["heads"])


def check_site(site: Any) -> None:
    """Raise `TypeError` for what is no site, and write the site that may be meant."""
    if not isinstance(site, Site):
        near = f"Site({site!r}, 'last')" if isinstance(site, str) else f"resid_post({site!r}, 'last')"
        meant = near if isinstance(site, str | SupportsIndex) else "resid_post(8, 'last')"
        raise TypeError(f"site={site!r}, expected a Site, such as {meant}")


def resid_pre(layer: SupportsIndex, positions: Where) -> Site:
    """The residual stream entering block `layer`."""
    return Site(f"blocks.{_layer(layer)}.hook_resid_pre", positions)


def resid_mid(layer: SupportsIndex, positions: Where) -> Site:
    """The residual stream between attention and MLP (blocks that compute both in parallel have none)."""
    return Site(f"blocks.{_layer(layer)}.hook_resid_mid", positions)


def resid_post(layer: SupportsIndex, positions: Where) -> Site:
    """The residual stream leaving block `layer`: the `block_output` of pyreft."""
    return Site(f"blocks.{_layer(layer)}.hook_resid_post", positions)


def attn_out(layer: SupportsIndex, positions: Where) -> Site:
    """What attention adds to the residual stream."""
    return Site(f"blocks.{_layer(layer)}.hook_attn_out", positions)


def mlp_out(layer: SupportsIndex, positions: Where) -> Site:
    """What the MLP adds to the residual stream."""
    return Site(f"blocks.{_layer(layer)}.hook_mlp_out", positions)


def mlp_post(layer: SupportsIndex, positions: Where) -> Site:
    """The MLP's neurons, after the nonlinearity (and the gate, where there is one)."""
    return Site(f"blocks.{_layer(layer)}.mlp.hook_post", positions)


def attn_q(layer: SupportsIndex, positions: Where, heads: Heads = None) -> Site:
    """Queries."""
    return Site(f"blocks.{_layer(layer)}.attn.hook_q", positions, heads)


def attn_k(layer: SupportsIndex, positions: Where, heads: Heads = None) -> Site:
    """Keys; heads are key/value heads."""
    return Site(f"blocks.{_layer(layer)}.attn.hook_k", positions, heads)


def attn_v(layer: SupportsIndex, positions: Where, heads: Heads = None) -> Site:
    """Values; heads are key/value heads."""
    return Site(f"blocks.{_layer(layer)}.attn.hook_v", positions, heads)


def attn_z(layer: SupportsIndex, positions: Where, heads: Heads = None) -> Site:
    """Per-head attention outputs, before the output projection."""
    return Site(f"blocks.{_layer(layer)}.attn.hook_z", positions, heads)


def embeddings(positions: Where) -> Site:
    """Token embeddings."""
    return Site("embed.hook_out", positions)


def final_norm(positions: Where) -> Site:
    """The output of the final norm, which the unembedding reads."""
    return Site("ln_final.hook_out", positions)


def _layer(layer: SupportsIndex) -> int:
    return whole(layer, "layer", 0, hint=", the number of a block, counted from 0 at the bottom")
