"""`ReFT`: which intervention acts at which site, and the one stateful moment in which they act."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge, check_model, parameter_total, resolve_hook
from reftlens.editing.engine import Edit, Part, attached, check_fired
from reftlens.editing.site import Site, Where
from reftlens.editing.sources import Donor, Place, check_sources, places_of, read_donors
from reftlens.interventions.base import Intervention, Strength
from reftlens.interventions.fixed import SteeringVector
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions
from reftlens.text.positions.spelling import as_positions
from reftlens.text.view import Mask, TokenView


@dataclass(frozen=True)
class Variant:
    """How an intervention is applied: how strongly, at which of its tokens, at which of its sites.

    Args:
        strength: 1 is the edit as trained, 0 the unedited model, negative its opposite; a sequence gives one
            strength per direction of the basis.
        among: of the positions that the sites choose, edit only these as well chosen by `among`.
        sites: indices of the sites that act; None means all.
    """

    strength: float | tuple[float, ...]
    among: Positions | None
    sites: tuple[int, ...] | None

    def __init__(
        self,
        strength: SupportsFloat | Sequence[float] = 1.0,
        among: Where | None = None,
        sites: Sequence[int] | None = None,
    ) -> None:
        given: Any = strength
        if isinstance(strength, str):
            raise TypeError(f"strength={strength!r} is text, expected a number, or one per direction")
        if isinstance(sites, int) or any(not isinstance(i, int) for i in sites or ()):
            raise TypeError(f"sites={sites!r}, expected a list of indices of the ReFT's sites, such as [0, 2]")
        many = isinstance(strength, Sequence) or getattr(given, "ndim", 0) > 0  # else a number, of any library
        object.__setattr__(self, "strength", tuple(map(float, given)) if many else float(given))
        values = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"strength={strength!r}, expected finite numbers")
        object.__setattr__(self, "among", None if among is None else as_positions(among))
        object.__setattr__(self, "sites", None if sites is None else tuple(sites))

    def __str__(self) -> str:
        among = f" among {self.among}" if self.among is not None else ""
        sites = f" at sites {list(self.sites)}" if self.sites is not None else ""
        strength = self.strength if isinstance(self.strength, tuple) else f"{self.strength:g}"
        return "unedited" if self.strength == 0.0 else f"strength {strength}{among}{sites}"

    def mask(self, site: Site, view: TokenView) -> Mask:
        """The tokens edited at `site`."""
        chosen = site.positions.mask(view)
        return chosen & self.among.mask(view) if self.among is not None else chosen

    def reaches_response(self, site: Site) -> bool:
        """Whether a token after the prompt can be edited at `site`."""
        among = self.among is None or self.among.reaches_response
        return among and site.positions.reaches_response


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of an intervention: stored, free (`degrees_of_freedom`), and as a share of the model."""

    stored: int
    degrees_of_freedom: int
    model: int

    @property
    def percent(self) -> float:
        return 100 * self.stored / self.model

    def __str__(self) -> str:
        return (
            f"{self.stored:,} stored parameters, {self.degrees_of_freedom:,} degrees of freedom, "
            f"{self.percent:.2g} % of the model's {self.model:,}"
        )


class ReFT(nn.Module):
    """Interventions at sites of a model: an ordered mapping from `Site` to `Intervention`.

    The same intervention at two sites is tied: its weights are trained, counted and stored once. Sites at one
    hook act in the order given, each on what the one before it left.
    """

    def __init__(self, interventions: Mapping[Site, Intervention]) -> None:
        super().__init__()
        if not interventions:
            raise ValueError("a ReFT needs at least one site: ReFT({resid_post(8, 'last'): LoReFT(d, rank=4)})")
        for site, module in interventions.items():
            if not isinstance(site, Site):
                raise TypeError(f"{site!r} is no site: write Site({site!r}, 'last'), or resid_post(8, 'last')")
            if isinstance(module, type):
                raise TypeError(
                    f"{module.__name__} at {site} is a class: make one, such as {module.__name__}(d, rank=4)"
                )
            if not isinstance(module, Intervention):
                raise TypeError(f"{site} is mapped to a {type(module).__name__}, expected an Intervention")
        self.sites: tuple[Site, ...] = tuple(interventions)
        unique = list({id(m): m for m in interventions.values()}.values())
        self.interventions = nn.ModuleList(unique)
        self.which: tuple[int, ...] = tuple(
            next(i for i, m in enumerate(unique) if m is module) for module in interventions.values()
        )
        """For each site the index of its intervention in `interventions`."""
        self.seed: int | None = None
        """Of a copy that `seeds` made."""

    def __getitem__(self, site: Site | int) -> Intervention:
        """The intervention at a site, given itself or by its index."""
        if not isinstance(site, int) and site not in self.sites:
            raise KeyError(f"no site {site}, there are: {'; '.join(map(str, self.sites))}")
        index = site if isinstance(site, int) else self.sites.index(site)
        module = self.interventions[self.which[index]]
        assert isinstance(module, Intervention)
        return module

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def keys(self) -> tuple[Site, ...]:
        return self.sites

    def __repr__(self) -> str:
        lines = [f"  {site}: {module.kind}({module.extra_repr()})" for site, module in self.items()]
        return "\n".join(["ReFT", *lines])

    def items(self) -> list[tuple[Site, Intervention]]:
        return [(site, self[i]) for i, site in enumerate(self.sites)]

    def parameter_count(self, model: Bridge | nn.Module | int) -> ParameterCount:
        """Honest size: tied interventions once, constraints of orthonormal frames taken off."""
        modules = [m for m in self.interventions if isinstance(m, Intervention)]
        return ParameterCount(
            stored=sum(m.stored_parameters for m in modules),
            degrees_of_freedom=sum(m.degrees_of_freedom for m in modules),
            model=model if isinstance(model, int) else parameter_total(model),
        )

    def settle(self) -> None:
        """Store each orthonormal basis itself in place of the parameter that stood for it."""
        for module in self.interventions:
            assert isinstance(module, Intervention)
            for frame in module.frames():
                frame.settle()

    def reset(self, seed: int) -> None:
        """Initialise every intervention anew from a seed, each kind in its own way."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.interventions:
            assert isinstance(module, Intervention)
            module.reset(generator)

    def clone(self) -> "ReFT":
        """An independent copy with the same sites and the same values."""
        return deepcopy(self)

    def seeds(self, seeds: Sequence[int]) -> "dict[str, ReFT]":
        """Copies with weights drawn from each seed, `{"seed 0": …}`; `fit_many` gives each run the same seed."""
        if isinstance(seeds, int):
            raise TypeError(f"seeds={seeds}, expected a list of seeds, such as [0, 1, 2]")
        copies = {f"seed {seed}": self.clone() for seed in seeds}
        for seed in seeds:
            copy = copies[f"seed {seed}"]
            copy.reset(seed)
            copy.seed = seed
        return copies

    def __or__(self, other: "ReFT") -> "ReFT":
        """All sites of both in one; at one hook those of `other` act on what those of `self` left.

        The interventions are the same objects: `.clone()` makes the result independent. A site that is there already
        gets its positions written as `p | p`, which choose the same tokens, so that both act.
        """
        joined = dict(self.items())
        for site, module in other.items():
            while site in joined:
                site = Site(site.hook, site.positions | site.positions, site.heads)
            joined[site] = module
        return ReFT(joined)

    def __add__(self, other: "ReFT") -> "ReFT":
        """Steering vectors added site by site; a site that one of them lacks counts as zero.

        Raises:
            ValueError: for another kind of intervention, which is not one vector; also where one is weighted, negated
                or taken off. (`Variant(strength=…)` weights any kind.)
        """
        vectors, more = self._vectors(), other._vectors()
        return _steering(vectors | {site: vectors[site] + v if site in vectors else v for site, v in more.items()})

    def __mul__(self, weight: float) -> "ReFT":
        """Steering vectors, each times `weight`."""
        return _steering({site: weight * vector for site, vector in self._vectors().items()})

    __rmul__ = __mul__

    def __neg__(self) -> "ReFT":
        return -1.0 * self

    def __sub__(self, other: "ReFT") -> "ReFT":
        return self + -other

    def _vectors(self) -> dict[Site, Tensor]:
        vectors = {site: m.vector.detach() for site, m in self.items() if isinstance(m, SteeringVector)}
        for site, module in self.items():
            if site not in vectors:
                raise ValueError(f"{module.kind} at {site} is not one vector: only a SteeringVector can be added up")
        return vectors

    def active(self, variant: Variant) -> list[int]:
        """Indices of the sites that `variant` lets act."""
        count = len(self)
        chosen = tuple(range(count)) if variant.sites is None else variant.sites
        if not chosen or any(not 0 <= i < count for i in chosen) or len(set(chosen)) < len(chosen):
            raise ValueError(f"sites={list(chosen)}, expected one or more of 0 to {count - 1}, each of them once")
        return sorted(chosen)

    def strength(self, variant: Variant, i: int) -> Strength:
        """The variant's strength at site `i`: a float, or a `[rank]` vector."""
        if not isinstance(variant.strength, tuple):
            return variant.strength
        module = self[i]
        if len(variant.strength) != module.rank:
            raise ValueError(
                f"strength has {len(variant.strength)} values, and {module.kind} at {self.sites[i]} has "
                f"rank {module.rank}"
            )
        return torch.tensor(variant.strength)

    def require(self, view: TokenView, variant: Variant = Variant()) -> None:
        """Raise if an active site chooses no token in any row of `view`."""
        for i in self.active(variant):
            if not variant.mask(self.sites[i], view).any():
                among = f" among {variant.among}" if variant.among is not None else ""
                raise ValueError(f"{self.sites[i]}{among} chooses no token in any of {len(view.ids)} row(s)")

    def bind(self, model: Bridge) -> "Bound":
        """Find the hooks of this model once, for many forward passes."""
        for site, module in self.items():
            if module.pools and site.positions.reaches_response:
                raise ValueError(f"{module.kind} pools over a prompt, and {site} chooses tokens after it: use Prompt()")
        hooks = model.hook_dict
        points = [resolve_hook(model, site.hook, hooks) for site in self.sites]
        carries = [skip_of(s.hook, p, hooks) for p, s in zip(points, self.sites, strict=True)]
        places = [
            (p.name, c is None, s.positions, s.heads) for p, c, s in zip(points, carries, self.sites, strict=True)
        ]
        for i, place in enumerate(places):
            if place in places[:i]:
                raise ValueError(
                    f"two sites are one and the same place: {self.sites[places.index(place)]} and {self.sites[i]}"
                )
        return Bound(self, points, carries)

    @contextmanager
    def on(self, model: Bridge, batch: Batch, variant: Variant = Variant()) -> Iterator[None]:
        """Inside the block the model's forward passes on `batch` are edited, and gradients flow to the edits.

        Adds its own hooks and removes only them. Keep the backward pass inside the block if the model uses
        gradient checkpointing.

        Raises:
            SiteNeverFired: at the end, if nothing passed through one of the sites.
            ValueError: if a site chooses no token in any row.
        """
        self.require(batch.view, variant)
        bound = self.bind(model)
        edits = bound.edits(batch.view, variant, bound.donors(model, batch, variant))
        with attached(edits):
            yield
        check_fired(edits)


def _steering(vectors: Mapping[Site, Tensor]) -> ReFT:
    return ReFT({site: SteeringVector(len(vector), vector) for site, vector in vectors.items()})


@contextmanager
def mode(reft: ReFT, *, training: bool) -> Iterator[None]:
    """`reft` in train or eval mode (dropout on or off) inside the block, and as it was after it."""
    before = [(module, module.training) for module in reft.modules()]
    try:
        reft.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


def skip_of(hook: str, point: HookPoint, hooks: Mapping[str, HookPoint]) -> HookPoint | None:
    """Where an edit of the residual stream in mid-block has to be added again, None for any other hook.

    The bridge's `hook_resid_mid` is the input of the norm before the MLP. The skip connection around the MLP has
    left the stream by then, so the change made there is added once more where the block ends.
    """
    if not hook.endswith(".hook_resid_mid") or (point.name or "").endswith(".hook_resid_mid"):
        return None
    return hooks[hook.removesuffix("hook_resid_mid") + "hook_resid_post"]


@dataclass(frozen=True)
class Bound:
    """A `ReFT` whose hooks were found on a model."""

    reft: ReFT
    points: list[HookPoint]
    carries: list[HookPoint | None]

    def exchanged(self, variant: Variant) -> dict[int, Place]:
        """The active sites that exchange something."""
        return {
            i: (self.reft.sites[i], self.points[i], self.reft[i].variables)
            for i in self.reft.active(variant)
            if self.reft[i].variables
        }

    def donors(
        self, model: Bridge, data: Batch, variant: Variant = Variant(), *, nested: bool = False
    ) -> dict[int, Donor]:
        """What the sources of `data` hold at the active sites that exchange something.

        A source may have sources itself: they are exchanged in it, at full strength, before it is read.
        """
        return read_donors(
            model, data, self.exchanged(variant), lambda source: self._editing(model, source, variant), nested=nested
        )

    def _editing(
        self, model: Bridge, source: Batch, variant: Variant
    ) -> Callable[[Batch, Sequence[int]], AbstractContextManager[None]]:
        """Exchanges what the sources of a source say, for each batch of its rows."""
        donors = self.donors(model, source, variant, nested=True)
        inner = Variant(sites=tuple(donors))
        return lambda batch, rows: attached(self.edits(batch.view, inner, donors, rows))

    def edits(
        self,
        view: TokenView,
        variant: Variant = Variant(),
        donors: Mapping[int, Donor] = MappingProxyType({}),
        rows: Sequence[int] | None = None,
    ) -> list[Edit]:
        """What to attach for one forward pass over `view`: the sites that choose a token there.

        `donors` count rows in the data that `view` was taken from; `rows` are those it holds, None for all.
        """
        found = []
        for i in self.reft.active(variant):
            mask = variant.mask(self.reft.sites[i], view)
            if not mask.any():
                continue
            edit = self.edit(i, mask, variant)
            if i in donors:
                which = edit.rows if rows is None else torch.tensor(rows, device=mask.device)[edit.rows]
                places = places_of(self.reft.sites[i].positions.mask(view))[edit.rows, edit.columns]
                edit.parts[0].source = donors[i].of(which, places)
            found.append(edit)
        return found

    def edit(self, i: int, mask: Mask, variant: Variant) -> Edit:
        """The edit of site `i` on the tokens of `mask`."""
        rows, columns = mask.nonzero().unbind(dim=1)
        return Edit(
            point=self.points[i],
            parts=[
                Part(self.reft[i], len(rows), self.reft.strength(variant, i), rows=rows if self.reft[i].pools else None)
            ],
            rows=rows,
            columns=columns,
            shape=(mask.shape[0], mask.shape[1]),
            heads=self.reft.sites[i].heads,
            carry=self.carries[i],
        )


def check_asked(reft: Any, model: Any, data: Any = None) -> None:
    """Raise where what is asked for is not a `ReFT`, a bridge and, if given, a `Batch`.

    Raises:
        TypeError: saying what was given, and what makes the right thing of it.
    """
    if not isinstance(reft, ReFT):
        hint = ": put it at a site, ReFT({site: …})" if isinstance(reft, Intervention) else ""
        raise TypeError(f"expected a ReFT, got {type(reft).__name__}{hint}")
    check_model(model)
    if data is not None and not isinstance(data, Batch):
        raise TypeError(f"data is a {type(data).__name__}, expected a Batch: encode(model, examples) makes one")


def shared_donors(model: Bridge, data: Batch, plans: Sequence[tuple[Bound, Variant]]) -> list[dict[int, Donor]]:
    """`donors` of each plan; sources without sources of their own are read in one pass for all of them.

    Each plan takes those sources of `data` that its sites exchange.

    Raises:
        ValueError: where a plan exchanges what the data has no source for, or the data has one that no plan exchanges.
    """
    wanted = [bound.exchanged(variant) for bound, variant in plans]
    every = list(dict.fromkeys(place for places in wanted for place in places.values()))
    if not every:
        return [{} for _ in plans]
    named = check_sources(data, every)
    if any(data.sources[name].batch.sources for name in named):
        taken = [{name for _, _, names in places.values() for name in names} for places in wanted]
        own = [replace(data, sources={k: v for k, v in data.sources.items() if k in names}) for names in taken]
        return [bound.donors(model, some, variant) for some, (bound, variant) in zip(own, plans, strict=True)]
    read = read_donors(model, data, dict(enumerate(every)))
    found = {place: read[i] for i, place in enumerate(every) if i in read}
    return [{i: found[place] for i, place in places.items()} for places in wanted]
