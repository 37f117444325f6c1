"""Which weights read a site downstream, and which directions there they see.

A direction that no reader sees can be set to anything: it acts on nothing but the scale of the norms. Exchanging it
may still look like an effect where it decides how far another direction moves (Makelov et al. 2023, 2311.17030).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from reftlens import figures
from reftlens.bridge.offload import numbers_of
from reftlens.bridge.protocol import Bridge, resolve_hook
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame

_STREAM = {
    "hook_resid_pre": (0, True),
    "hook_resid_mid": (0, False),
    "hook_attn_out": (0, False),
    "hook_mlp_out": (1, True),
    "hook_resid_post": (1, True),
}
"""Hooks of the residual stream: the first block that reads them, counted from their own, and if its attention does."""


@dataclass(frozen=True, eq=False)
class SeenSplit:
    """The `d` dimensions of a site, split into those that its readers see and the rest."""

    site: Site
    readers: tuple[str, ...]
    """Names of the weights that read."""
    seen: Float[Tensor, "d seen"]
    """Orthonormal, the most strongly read direction first; float64 on the CPU."""
    share: float
    """Share of the trace of the readers' Gram matrix that `seen` carries."""

    def norm_share(self, basis: Float[Tensor, "d rank"]) -> float:
        """`‖seenᵀ B‖² / ‖B‖²`; that of a random direction is `seen / d` on average."""
        columns = basis.detach().cpu().double()
        return ((self.seen.T @ columns).square().sum() / columns.square().sum()).item()

    def parts(self, basis: Float[Tensor, "d rank"]) -> tuple[Float[Tensor, "d _"], Float[Tensor, "d _"]]:
        """Orthonormal bases of `P B` and `(1 - P) B`, `P = seen seenᵀ`; without the columns that vanish (< 1e-5)."""
        columns = basis.detach().cpu().double()
        visible = self.seen @ (self.seen.T @ columns)
        return _span(visible), _span(columns - visible)

    def to_frame(self) -> DataFrame:
        """One row per dimension of the site: the share of it that is seen."""
        seen = self.seen.square().sum(dim=1)
        return figures.table({"site": str(self.site), "seen": seen.tolist()}, "dimension")

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str | None = None) -> Axes:
        """The share of each dimension that is seen; dashed: that of a random direction."""
        ax = figures.axes(ax)
        d, k = self.seen.shape
        name = figures.entry(ax, label or figures.short(self.site))
        ax.plot(self.seen.square().sum(dim=1).tolist(), ".", color=color, label=name)
        figures.level(ax, k / d)
        ax.set(xlabel=f"dimension of {self.site.hook}", ylabel="share seen", ylim=(-0.02, 1.02))
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        d, k = self.seen.shape
        named = self.readers[0] if len(self.readers) == 1 else f"{len(self.readers)} weights"
        return f"{self.site}: {named} see {k} of {d} dimensions ({100 * self.share:.0f} % of what they read)"


def seen_split(model: Bridge, site: Site, *, readers: str = "*", share: float | None = None) -> SeenSplit:
    """The directions at `site` that downstream weights see.

    `seen` are the fewest top eigenvectors of `G = Σ W Wᵀ / ‖W‖²` over the readers `W` `[d, out]` that carry `share` of
    its trace; `share=1` is the row space to numerical rank. Readers: at neurons and at z the output projection; at the
    residual stream and what is added to it q, k, v, MLP in (gate and up) of all later blocks and the unembedding, each
    with the gain (and centring) of its norm folded in. A norm's division by the length is left out: it is not linear.

    At the residual stream all readers together see every direction, some of them hardly, and whether what they read
    matters plays no part: the split tells little there until `readers` names those that do.

    Args:
        readers: only those whose name matches the pattern: `"unembed"`, `"blocks.9.mlp.*"`, `"blocks.9.attn.q.6"` for
            the queries of head 6 (keys and values count key/value heads).
        share: None stands for 1 where the row space leaves out two dimensions or more (one is what a norm centres
            away), and for 0.9 where it does not.

    Raises:
        ValueError: for a site that no weight reads directly (q, k, v, pre-activations), readers that do not match,
            or blocks whose weights are not known.
    """
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share={share}, expected above 0 and at most 1")
    names, strength, directions = _spectrum(model, site, readers)
    d = len(directions)
    rank = int((strength > strength[0] * (d * torch.finfo(torch.float32).eps) ** 2).sum())  # float32 rounds the rest
    wanted = (1.0 if rank < d - 1 else 0.9) if share is None else share
    reached = strength.clamp_min(0).cumsum(dim=0) / strength.clamp_min(0).sum()
    count = rank if wanted == 1 else min(rank, 1 + int((reached < wanted).sum()))
    return SeenSplit(site, names, directions[:, :count].contiguous(), min(1.0, reached[count - 1].item()))


def stream_readers(model: Bridge, site: Site) -> Iterator[tuple[str, Float[Tensor, "d out"]]]:
    """What reads the residual stream from `site` on, as `W / ‖W‖`, norms folded in, attention head by head.

    The heads of one q, k or v are divided by their common norm. float64 on the CPU.
    """
    bridge: Any = model
    layer, attention = first_reader(model, site)
    for i in range(layer, model.cfg.n_layers):
        block, name = bridge.blocks[i], f"blocks.{i}"
        if attention or i > layer:
            for part in "qkv":
                weight = weight_of(block, f"{name}.attn", f"W_{part.upper()}")
                joined = _through(block, "ln1", rearrange(weight, "head d out -> d (head out)"))
                for head, matrix in enumerate(joined.split(weight.shape[2], dim=1)):
                    yield f"{name}.attn.{part}.{head}", matrix
        norm = "ln2" if hasattr(block, "ln2") else "ln1"  # one norm for both, where they run in parallel
        yield f"{name}.mlp.in", _through(block, norm, weight_of(block, f"{name}.mlp", "W_in"))
        if getattr(block.mlp, "W_gate", None) is not None:
            yield f"{name}.mlp.gate", _through(block, norm, weight_of(block, f"{name}.mlp", "W_gate"))
    yield "unembed", _through(bridge, "ln_final", numbers_of(bridge.W_U))


def _direct(model: Bridge, site: Site) -> Iterator[tuple[str, Float[Tensor, "d out"]]]:
    """The one weight that reads a site which is not part of the residual stream; nothing for one that is."""
    bridge: Any = model
    if resolve_hook(model, site.hook).name == "ln_final.hook_out":
        yield "unembed", numbers_of(bridge.W_U)
    elif (projection := projection_at(model, site)) is not None:
        yield projection


def projection_at(model: Bridge, site: Site) -> tuple[str, Float[Tensor, "width d"]] | None:
    """The output projection that reads neurons (`blocks.3.mlp.out`) or z (`blocks.3.attn.o`); None at other sites.

    With the rows of the site's heads only. float64 on the CPU.
    """
    bridge: Any = model
    name = resolve_hook(model, site.hook).name or site.hook
    output = re.fullmatch(r"blocks\.(\d+)\.(mlp\.out|attn\.o)\.hook_in", name)
    if output is None:
        return None
    reader = name.removesuffix(".hook_in")
    weight = weight_of(bridge.blocks[int(output[1])], reader, "W_out" if output[2] == "mlp.out" else "W_O")
    if weight.ndim == 3:
        heads = weight if site.heads is None else weight[list(site.heads)]
        weight = rearrange(heads, "head d_head d -> (head d_head) d")
    return reader, weight


def first_reader(model: Bridge, site: Site) -> tuple[int, bool]:
    """The first block that reads the residual stream after `site` (their number, for none), and if its attention does.

    Raises:
        ValueError: for a site that is not part of the stream.
    """
    hooks = model.hook_dict
    point = resolve_hook(model, site.hook, hooks)
    block = re.match(r"blocks\.(\d+)\.", point.name or "")
    for alias, (later, attention) in _STREAM.items() if block else ():
        assert block is not None
        branch = alias == "hook_resid_mid" and not site.hook.endswith(alias)  # ln2's input: the MLP alone reads it
        if hooks.get(block[0] + alias) is point and not branch:
            parallel = alias == "hook_attn_out" and getattr(model.cfg, "parallel_attn_mlp", False)
            return int(block[1]) + (1 if parallel else later), parallel or attention
    raise ValueError(
        f"{site.hook} is not part of the residual stream, and no weight is known that reads it alone: use resid_pre, "
        "resid_mid, resid_post, attn_out or mlp_out"
    )


def _spectrum(
    model: Bridge, site: Site, pattern: str
) -> tuple[tuple[str, ...], Float[Tensor, " n"], Float[Tensor, "d n"]]:
    """Names of the readers that match; eigenvalues of their Gram matrix, falling, and its eigenvectors."""
    direct = list(_direct(model, site))
    names, others, gram = [], [], None
    for name, weight in direct or stream_readers(model, site):
        if not fnmatch(name, pattern):
            others.append(name)
        elif direct and weight.shape[1] < weight.shape[0]:  # many neurons: their Gram matrix would be large
            left, size, _ = torch.linalg.svd(weight, full_matrices=False)
            return (name,), size.square(), left
        else:
            names.append(name)
            gram = weight @ weight.T if gram is None else gram.addmm_(weight, weight.T)
    if gram is None:
        raise ValueError(
            f"readers={pattern!r} matches none of the weights that read {site}: {', '.join(others[:8])}, …"
        )
    values, vectors = torch.linalg.eigh(gram)
    return tuple(names), values.flip(-1), vectors.flip(-1)


def _through(parent: Any, name: str, weight: Float[Tensor, "d out"]) -> Float[Tensor, "d out"]:
    """What a weight behind a norm sees of the norm's input, up to that input's length, over its own norm."""
    norm = getattr(parent, name, None)
    if norm is None or getattr(norm, "weight", None) is None:
        raise ValueError(f"there is no norm {name} with a gain where the readers of this model expect one")
    folded = folded_in(norm, weight)
    return folded / folded.norm().clamp_min(1e-30)


def gain_of(norm: Any) -> Float[Tensor, " d"]:
    """What a norm multiplies each dimension with; float64 on the CPU."""
    return numbers_of(norm.weight) + float(norm.uses_weight_offset)


def folded_in(norm: Any, weight: Float[Tensor, "d out"]) -> Float[Tensor, "d out"]:
    """A weight behind a norm with its gain (and centring) folded in."""
    folded = gain_of(norm)[:, None] * weight
    return folded if norm.uses_rms_norm else folded - folded.mean(dim=0)


def weight_of(block: Any, where: str, name: str) -> Tensor:
    """A weight of the attention or the MLP of a block, float64 on the CPU; `where` is what it is called."""
    weight = getattr(getattr(block, "mlp" if ".mlp" in where else "attn", None), name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{where} has no single {name} (a mixture of experts, or no attention): what it does is not known"
        )
    return numbers_of(weight)


def _span(columns: Float[Tensor, "d rank"]) -> Float[Tensor, "d _"]:
    left, size, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, size > 1e-5]
