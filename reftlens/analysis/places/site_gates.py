"""Which of many sites and heads to edit: gates learned with the edit, and what is left when they are taken off.

An edit of its own at each site stands behind a `HardConcrete` gate, whose price in nats is paid for each open site
(L0, Louizos et al. 2018; over heads as in JoLA, arXiv 2502.01179).
"""

from collections.abc import Callable, Sequence
from typing import Any

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site, Where, attn_k, attn_v, attn_z
from reftlens.interventions.base import Intervention
from reftlens.interventions.gates import Gated
from reftlens.interventions.hard_concrete import HardConcrete


def every_head(
    model: Bridge, positions: Where, layers: Sequence[int] | None = None, at: Callable[..., Site] = attn_z
) -> list[Site]:
    """A site for each head of each layer; at `attn_k` and `attn_v` those are key/value heads."""
    config: Any = model.cfg
    grouped = at in (attn_k, attn_v) and getattr(config, "n_key_value_heads", None)
    heads = config.n_key_value_heads if grouped else config.n_heads
    chosen = range(config.n_layers) if layers is None else layers
    return [at(layer, positions, heads=[head]) for layer in chosen for head in range(heads)]


def gated_sites(sites: Sequence[Site], make: Callable[[], Intervention], sparsity: float = 0.5) -> ReFT:
    """An edit of its own at each site, each behind a gate that is trained with it.

    `rl.fit` trains both, `pruned` gives the edits of the open sites.

    Args:
        make: makes the edit of one site, such as `lambda: DAS(d_head, rank=1)`.
        sparsity: price of an open site, in nats; `docs/site_gates.md` has what other prices find.
    """
    return ReFT({site: Gated(make(), HardConcrete(sparsity)) for site in sites})


def pruned(reft: ReFT, tolerance: float = 0.1) -> ReFT:
    """The edits of the sites whose gates are open, without gates; those whose gates are shut are left out.

    A gate that is exactly 1 is folded in exactly, one within `tolerance` of 1 counts as 1, one within `tolerance` of 0
    as 0. What stands behind no such gate stays as it is. The interventions are the same objects.

    Raises:
        ValueError: for a gate in between, or where every gate is shut.
    """
    left: dict[Site, Intervention] = {}
    for site, module in reft.items():
        gate = site_gate(module)
        if gate is None or not isinstance(module, Gated):
            left[site] = module
            continue
        value = openness(gate)
        if tolerance < value < 1 - tolerance:
            raise ValueError(
                f"the gate at {site} is {value:.2f}, neither open nor shut to {tolerance:g}: train longer or at a "
                "larger rate, or pass tolerance=0.5, which rounds"
            )
        if value >= 0.5:
            left[site] = module.inner
    if not left:
        raise ValueError(f"every gate of {len(reft)} sites is shut: no edit is left, lower sparsity")
    return ReFT(left)


def site_gate(module: Intervention) -> HardConcrete | None:
    """The gate over a whole site, where it stands behind one."""
    return module.gate if isinstance(module, Gated) and isinstance(module.gate, HardConcrete) else None


def openness(gate: HardConcrete) -> float:
    """What a gate has learned, without noise."""
    return gate.learned().item()


def open_sites(reft: ReFT) -> tuple[Site, ...]:
    """The sites whose gates are more open than shut, and those without a gate over the site."""
    gates = {site: site_gate(module) for site, module in reft.items()}
    return tuple(site for site, gate in gates.items() if gate is None or openness(gate) > 0.5)
