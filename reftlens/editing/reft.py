"""`ReFT`: which intervention acts at which site, and the one stateful moment in which they act."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, SupportsIndex

from torch import Tensor, nn

from reftlens.bridge.protocol import Bridge, check_model, device_of, parameter_total, resolve_hook
from reftlens.editing.bound import Bound, Place, Places, bound_to, skip_of
from reftlens.editing.engine import Hook, attached, check_fired, hooked
from reftlens.editing.site import Site, check_site
from reftlens.editing.variant import Variant, check_variant
from reftlens.interventions.base import Intervention, check_reset
from reftlens.interventions.fixed import SteeringVector
from reftlens.numbers import Integers, is_one, seeded, whole, whole_numbers
from reftlens.text.batch import Batch
from reftlens.text.vocabulary import check_tokens, check_vocabulary


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
            check_site(site)
            if isinstance(module, type):
                raise TypeError(
                    f"{module.__name__} at {site} is a class: make one, such as {module.__name__}(d, rank=4)"
                )
            if not isinstance(module, Intervention):
                hint = f", such as {site}: direction.as_steering()" if hasattr(module, "as_steering") else ""
                raise TypeError(f"{site} is mapped to a {type(module).__name__}, expected an Intervention{hint}")
        self.sites: tuple[Site, ...] = tuple(interventions)
        unique = {id(m): m for m in interventions.values()}
        self.interventions = nn.ModuleList(unique.values())
        self.which: tuple[int, ...] = tuple(list(unique).index(id(m)) for m in interventions.values())
        """For each site the index of its intervention in `interventions`."""
        self.seed: int | None = None
        """Of a copy that `seeds` made."""
        self.chat: bool | None = None
        """Whether the prompts that it was last trained on stood in the chat template; None where that is not known."""

    def __getitem__(self, site: Site | SupportsIndex) -> Intervention:
        """The intervention at a site, given itself or by its index."""
        if not isinstance(site, SupportsIndex) and site not in self.sites:
            raise KeyError(f"no site {site}, there are: {'; '.join(map(str, self.sites))}")
        index = whole(site, "site") if isinstance(site, SupportsIndex) else self.sites.index(site)
        return self.distinct[self.which[index]]

    @property
    def distinct(self) -> list[Intervention]:
        """The interventions, one that acts at several sites once."""
        return [module for module in self.interventions if isinstance(module, Intervention)]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def keys(self) -> tuple[Site, ...]:
        return self.sites

    def __repr__(self) -> str:
        lines = [f"  {site}: {module.label}({module.extra_repr()})" for site, module in self.items()]
        return "\n".join(["ReFT", *lines])

    def items(self) -> list[tuple[Site, Intervention]]:
        return [(site, self[i]) for i, site in enumerate(self.sites)]

    def parameter_count(self, model: Bridge | nn.Module | int) -> ParameterCount:
        """Honest size: tied interventions once, constraints of orthonormal frames taken off."""
        return ParameterCount(
            stored=sum(m.stored_parameters for m in self.distinct),
            degrees_of_freedom=sum(m.degrees_of_freedom for m in self.distinct),
            model=model if isinstance(model, int) else parameter_total(model),
        )

    def settle(self) -> None:
        """Store each orthonormal basis itself in place of the parameter that stood for it."""
        for module in self.distinct:
            for frame in module.frames():
                frame.settle()

    def reset(self, seed: SupportsIndex) -> None:
        """Initialise every intervention anew from a seed; `ValueError` where a class of one's own does less."""
        generator = seeded(seed)
        for module in self.distinct:
            check_reset(module)
            module.reset(generator)
        self.chat = None

    def clone(self) -> "ReFT":
        """An independent copy with the same sites and the same values."""
        return deepcopy(self)

    def seeds(self, seeds: Integers) -> "dict[str, ReFT]":
        """Copies with weights drawn from each seed, `{"seed 0": …}`; `fit_many` gives each run the same seed."""
        if is_one(seeds):
            raise TypeError(f"seeds={seeds}, expected a list of seeds, such as [0, 1, 2]")
        copies: dict[str, ReFT] = {}
        for seed in whole_numbers(seeds, "seed"):
            copy = copies[f"seed {seed}"] = self.clone()
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

    def bind(self, model: Bridge) -> Places:
        """Find the hooks of this model once, for many forward passes: one place for each site."""
        hooks = model.hook_dict
        places: list[Place] = []
        for site, module in self.items():
            if module.pools and not module.remembers and site.positions.reaches_response:
                raise ValueError(f"{module.kind} pools over a prompt, and {site} chooses tokens after it: use Prompt()")
            point = resolve_hook(model, site.hook, hooks)
            place = Place(site, module, point, skip_of(site.hook, point, hooks))
            for other in places:
                if place.spot == other.spot:
                    raise ValueError(f"two sites are one and the same place: {other.site} and {site}")
            places.append(place)
        return tuple(places)

    def bound_to(self, model: Bridge, data: Batch, variant: Variant = Variant()) -> Bound:
        """The hooks of this model, and what the sources of `data` hold, for passes over rows of `data`.

        Raises:
            ValueError: if a site chooses no token in any row, or what a site exchanges has no source.
        """
        check_vocabulary(model, data)
        check_variant(variant)
        variant.require(self.sites, data.view)
        return bound_to(model, data, [(self.to(device_of(model)).bind(model), variant)])[0]

    @contextmanager
    def on(self, model: Bridge, batch: Batch, variant: Variant = Variant()) -> Iterator[None]:
        """Inside the block the model's forward passes on `batch` are edited, and gradients flow to the edits.

        Adds its own hooks and removes only them: one that was there before the block sees the unedited value, one added
        inside it the edited. Keep the backward pass inside the block if the model uses gradient checkpointing.

        Raises:
            SiteNeverFired: at the end, if nothing passed through one of the sites.
            ValueError: if a site chooses no token in any row, or the model is run on other tokens than the batch's.
        """
        edits = self.bound_to(model, batch, variant).edits(batch.view)
        entry = model.hook_dict.get("embed.hook_in")
        checks: list[Hook] = [] if entry is None else [(entry, lambda ids, hook: check_tokens(batch, ids))]
        with hooked(model, checks), attached(model, edits):
            yield
        check_fired(edits)


def _steering(vectors: Mapping[Site, Tensor]) -> ReFT:
    return ReFT({site: SteeringVector(len(vector), vector) for site, vector in vectors.items()})


@contextmanager
def training_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """`module` in train or eval mode (dropout on or off) inside the block, and as it was after it."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, was in before:
            part.training = was


def check_types(reft: Any, model: Any, data: Any = None) -> None:
    """Raise where these are not a `ReFT`, a bridge and (where there is one) a `Batch` of its vocabulary."""
    if not isinstance(reft, ReFT):
        hint = ": put it at a site, ReFT({site: …})" if isinstance(reft, Intervention) else ""
        raise TypeError(f"expected a ReFT, got {type(reft).__name__}{hint}")
    check_model(model)
    if data is not None:
        check_vocabulary(model, data)
