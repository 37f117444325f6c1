"""Units of a mask in the order of their gates: neurons, heads, latents, directions or whole sites."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reftlens import figures
from reftlens.analysis.places.site_gates import openness, site_gate
from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.figures import Axes, DataFrame
from reftlens.interventions.base import Intervention
from reftlens.interventions.gates import Gated
from reftlens.interventions.masks import GatedExchange, SAEMask

_LABELLED = 8


@dataclass(frozen=True)
class Unit:
    """A gate: what it stands before, and how far it is open."""

    site: Site
    kind: str
    """`"neuron"` (one coordinate of a vector), `"direction"`, `"latent"`, or `"site"` as a whole."""
    head: int | None
    """The head that the unit is of; None where there is none, or the site has several."""
    unit: int | None
    """Its number, within its head where that is known; None for a whole site."""
    logit: float
    """What is trained of the gate: units are in its order, also where the gates themselves are all but 0 or 1."""
    gate: float
    """How far it is open, 0 to 1."""

    @property
    def open(self) -> bool:
        return self.gate > 0.5

    @property
    def label(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.site.hook}{head}" + ("" if self.unit is None else f" {self.kind} {self.unit}")


@dataclass(frozen=True)
class RankedUnits:
    """The gates of a mask, the most open first."""

    units: tuple[Unit, ...]

    @property
    def open(self) -> tuple[Unit, ...]:
        """Those more open than shut."""
        return tuple(unit for unit in self.units if unit.open)

    def to_frame(self) -> DataFrame:
        """One row per unit, by falling logit."""
        names = ("kind", "head", "unit", "logit", "gate", "open")
        records = [
            {"hook": u.site.hook, "at": str(u.site.positions), **{n: getattr(u, n) for n in names}} for u in self.units
        ]
        return figures.table(records).astype({"head": "Int64", "unit": "Int64"})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Logit of each unit in their order; the open ones are orange, and the first of them are named."""
        ax = figures.axes(ax)
        for state, colour in ((True, figures.ORANGE), (False, figures.GREY)):
            some = [(x, u.logit) for x, u in enumerate(self.units) if u.open is state]
            if some:
                ax.scatter(
                    *zip(*some, strict=True), s=14, color=colour, label=f"{'open' if state else 'shut'} ({len(some)})"
                )
        for x, unit in enumerate(self.open[:_LABELLED]):
            ax.annotate(unit.label, (x, unit.logit), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center")
        figures.level(ax, 0.0)
        ax.set(xlabel="units, the most open first", ylabel="logit of the gate")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        lines = [f"{len(self.open)} of {len(self.units)} units are open"]
        lines += [f"{u.label} at {u.site.positions}: logit {u.logit:.3g}, gate {u.gate:.2f}" for u in self.units]
        return figures.screenful(lines)

    __repr__ = __str__


def ranked_units(reft: ReFT, model: Bridge | None = None) -> RankedUnits:
    """The gates of all sites in one order: by what is trained of them, the logit, which never saturates.

    Of a `SigmoidMask` the units are neurons (or the directions of its basis), of a `SAEMask` latents, of `MaskedDAS`
    and `BoundlessDAS` directions, and of an edit behind a `HardConcrete` gate the site, such as a head.

    Args:
        model: says, for a mask over all heads of a hook, how wide a head is.

    Raises:
        ValueError: where no site has such a gate.
    """
    units = [unit for site, module in reft.items() for unit in _units(site, module, _width(site, module, model))]
    if not units:
        kinds = ", ".join(sorted({module.kind for _, module in reft.items()}))
        raise ValueError(f"{kinds} has no gates to rank: give a mask, MaskedDAS, or places.gated_sites(…)")
    return RankedUnits(tuple(sorted(units, key=lambda unit: -unit.logit)))


def _units(site: Site, module: Intervention, width: int | None) -> Iterator[Unit]:
    gate = site_gate(module)
    if gate is not None:
        head = site.heads[0] if site.heads is not None and len(site.heads) == 1 else None
        yield Unit(site, "site", head, None, gate.log_alpha.item(), openness(gate))
    if isinstance(module, Gated):
        yield from _units(site, module.inner, width)
    if isinstance(module, GatedExchange):
        kind = "latent" if isinstance(module, SAEMask) else "neuron" if module.basis() is None else "direction"
        gates = zip(module.gate_logits().tolist(), module.gate().tolist(), strict=True)
        for number, (logit, value) in enumerate(gates):
            head, unit = _head(site, number, width) if kind == "neuron" else (None, number)
            yield Unit(site, kind, head, unit, logit, value)


def _head(site: Site, number: int, width: int | None) -> tuple[int | None, int]:
    """The head that a coordinate is of, and its place there."""
    if width is None:
        return None, number
    place, unit = divmod(number, width)
    return (place if site.heads is None else site.heads[place]), unit


def _width(site: Site, module: Intervention, model: Bridge | None) -> int | None:
    """Of one head, where the site has heads and that is known."""
    if site.heads is not None:
        return module.d // len(site.heads)
    config: Any = None if model is None else model.cfg
    has_heads = site.hook.endswith(tuple(f"attn.hook_{x}" for x in "qkvz"))
    return int(config.d_head) if config is not None and has_heads else None
