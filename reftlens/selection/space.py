"""What a search is over: places, kinds, ranks, learning rates and strengths, and the candidates that these make."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

import torch

from reftlens.bridge.protocol import Bridge
from reftlens.editing.preflight import Sites, hooks
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site, Where, check_site, resid_post
from reftlens.errors import check_each_once
from reftlens.interventions.base import Intervention
from reftlens.interventions.family import LoReFT
from reftlens.interventions.interchange import DAS
from reftlens.numbers import reals, seeded, whole_numbers
from reftlens.selection.suggested import positions_of
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions
from reftlens.text.positions.spelling import as_positions

Factory = Callable[[int, int], Intervention]
"""Makes an intervention of a width and a rank: a kind itself, or a function that calls one."""
_LAYERS, _STRENGTHS = 8, (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Candidate:
    """What is trained and scored: an intervention of its own at each of the sites, and how fast it learns."""

    sites: tuple[Site, ...]
    kind: str
    rank: int
    lr: float
    asked: int = field(compare=False, repr=False)
    """The rank that the factory was given: of a kind with several variables, say, that which came is another."""

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank} at {self.place}, lr {self.lr:g}"

    @property
    def place(self) -> str:
        """The sites, in words."""
        return "; ".join(map(str, self.sites))

    @property
    def axes(self) -> dict[str, Any]:
        """By the name of each axis."""
        first = self.sites[0]
        layers = [int(number[1]) if (number := re.match(r"blocks\.(\d+)\.", s.hook)) else -1 for s in self.sites]
        hook = re.sub(r"^blocks\.\d+\.", "", first.vectors)
        layer = layers[0] if len(layers) == 1 else "+".join(map(str, layers))
        place = {"layer": layer, "hook": hook, "positions": str(first.positions)}
        return place | {"kind": self.kind, "rank": self.rank, "lr": self.lr}


@dataclass(frozen=True)
class Space:
    """The axes of a search; what is None is derived from model and data when the search begins.

    Args:
        layers: each a number, or several that are edited together. By default all, or eight that lie evenly, and where
            nothing is exchanged three together.
        hooks: what makes a site of a layer and positions: `rl.resid_post`, `rl.attn_out`, …
        heads: for hooks with heads, each entry one head or several together.
        positions: by default those that the data suggests: each token where all prompts are of one length up to 16,
            else the last, the last three, the whole prompt, and up to three words that all prompts share.
        sites: places in the stead of layers, hooks, heads and positions, each a `Site` or several edited together.
        kinds: `{name: factory}`, a factory takes width and rank; by default LoReFT from the identity, or DAS where rows
            have sources.
        strengths: scored, not trained; by default both signs, or 1 alone where every kind exchanges.

    Raises:
        ValueError: for an axis without values, or with one that is there twice; heads of a hook that has none.
    """

    layers: tuple[int | tuple[int, ...], ...] | None = None
    hooks: tuple[Callable[..., Site], ...] = (resid_post,)
    heads: tuple[int | tuple[int, ...], ...] | None = None
    positions: tuple[Positions, ...] | None = None
    sites: tuple[tuple[Site, ...], ...] | None = None
    kinds: Mapping[str, Factory] | None = None
    ranks: tuple[int, ...] = (1, 4)
    lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    strengths: tuple[float, ...] | None = None

    def __init__(
        self,
        layers: Sequence[int | Sequence[int]] | None = None,
        hooks: Sequence[Callable[..., Site]] = (resid_post,),
        heads: Sequence[int | Sequence[int]] | None = None,
        positions: Sequence[Where] | None = None,
        sites: Sequence[Site | Sequence[Site]] | None = None,
        kinds: Mapping[str, Factory] | None = None,
        ranks: Sequence[int] = (1, 4),
        lrs: Sequence[float] = (3e-3, 1e-2, 3e-2),
        strengths: Sequence[float] | None = None,
    ) -> None:
        every: dict[str, Any] = {
            "layers": None if layers is None else tuple(_one_or_several(x, "layer") for x in layers),
            "hooks": tuple(hooks),
            "heads": None if heads is None else tuple(_one_or_several(x, "head") for x in heads),
            "positions": None if positions is None else tuple(map(as_positions, positions)),
            "sites": None if sites is None else tuple((s,) if isinstance(s, Site) else tuple(s) for s in sites),
            "kinds": None if kinds is None else dict(kinds),
            "ranks": whole_numbers(ranks, "rank"),
            "lrs": reals(lrs, "lr"),
            "strengths": None if strengths is None else reals(strengths, "strength"),
        }
        check_each_once(
            {name: [str(value) for value in values] for name, values in every.items() if values is not None}
        )
        if () in (every["sites"] or ()):
            raise ValueError("sites hold an entry without a site: each is a Site, or several edited together")
        for site in (site for together in every["sites"] or () for site in together):
            check_site(site)
        if headless := [hook for hook in every["hooks"] if heads and "heads" not in signature(hook).parameters]:
            name = getattr(headless[0], "__name__", repr(headless[0]))
            raise ValueError(
                f"heads={heads!r} with {name}, which has none: attn_q, attn_k, attn_v and attn_z have heads"
            )
        if 0.0 in (every["strengths"] or ()):
            raise ValueError("strengths hold 0, the unedited model: it is scored beside them anyway, leave it out")
        for name, values in every.items():
            object.__setattr__(self, name, values)

    def filled(self, model: Bridge, data: Batch) -> "Space":
        """The same with what was None derived from the model and the data."""
        depth, exchanges = int(model.cfg.n_layers), bool(data.sources)
        layers: list[int | tuple[int, ...]] = list(range(depth))
        if depth > _LAYERS:
            layers = [int((i + 0.5) * depth / _LAYERS) for i in range(_LAYERS)]
        if depth > _LAYERS and not exchanges:
            layers.append((depth // 4, depth // 2, 3 * depth // 4))
        kinds: dict[str, Factory] = {"DAS": DAS} if exchanges else {"LoReFT": partial(LoReFT, init="identity")}
        known = replace(
            self,
            layers=self.layers or layers,
            positions=self.positions or positions_of(data),
            kinds=self.kinds or kinds,
        )
        return replace(known, strengths=self.strengths or ((1.0,) if known._exchange(model) else _STRENGTHS))

    def _exchange(self, model: Bridge) -> bool:
        """Whether all kinds take what they write from a source."""
        width = hooks(model).width(self.places()[0][0])
        return all(factory(width, self.ranks[0]).variables for factory in (self.kinds or {}).values())

    def places(self) -> list[tuple[Site, ...]]:
        """Of a space that is `filled`: sites that are edited together, one place after the other."""
        if self.sites is not None:
            return list(self.sites)
        assert self.layers is not None and self.positions is not None
        places = []
        for layers, hook, positions in product(self.layers, self.hooks, self.positions):
            for heads in (None,) if self.heads is None else self.heads:
                more = {} if heads is None else {"heads": heads}
                together = layers if isinstance(layers, tuple) else (layers,)
                places.append(tuple(hook(layer, positions, **more) for layer in together))
        return places

    def candidates(self, hooks: Sites) -> list[Candidate]:
        """Of a space that is `filled`, each once: where a factory gives another rank than asked for, that counts."""
        assert self.kinds is not None
        every = []
        for place, (kind, factory), rank in product(self.places(), self.kinds.items(), self.ranks):
            real = factory(hooks.width(place[0]), rank).rank
            every += [Candidate(place, kind, real, lr, rank) for lr in self.lrs]
        return list(dict.fromkeys(every))

    def reft(self, candidate: Candidate, hooks: Sites, seed: int) -> ReFT:
        """What a candidate trains, with weights drawn from `seed`."""
        assert self.kinds is not None
        factory = self.kinds[candidate.kind]
        reft = ReFT({site: factory(hooks.width(site), candidate.asked) for site in candidate.sites})
        reft.reset(seed)
        return reft


def _one_or_several(value: Any, name: str) -> int | tuple[int, ...]:
    numbers = whole_numbers(value, name)
    return numbers if isinstance(value, Sequence) else numbers[0]


def drawn(candidates: Sequence[Candidate], count: int, seed: int) -> list[Candidate]:
    """So many of the candidates: every place as often as another, and there and in all every setting likewise."""
    if count >= len(candidates):
        return list(candidates)
    left: dict[tuple[Site, ...], list[Candidate]] = {}
    order = torch.randperm(len(candidates), generator=seeded(seed)).tolist()
    for i in order:
        left.setdefault(candidates[i].sites, []).append(candidates[i])
    used, chosen = Counter[Any](), list[Candidate]()
    while len(chosen) < count:
        for place, some in left.items():
            if some and len(chosen) < count:
                best = min(some, key=lambda c: _uses(c, place, used))
                some.remove(best)
                chosen.append(best)
                levels = (best.kind, best.rank, best.lr), ("rank", best.rank), ("lr", best.lr)
                used.update(levels)
                used.update((place, level) for level in levels)
    return chosen


def _uses(candidate: Candidate, place: tuple[Site, ...], used: Counter[Any]) -> tuple[int, int]:
    """How often the levels of a candidate were used at its place, then everywhere."""
    setting, levels = (candidate.kind, candidate.rank, candidate.lr), (("rank", candidate.rank), ("lr", candidate.lr))
    here = sum(used[place, level] for level in levels)
    return here, used[setting] * 100 + sum(used[level] for level in levels)
