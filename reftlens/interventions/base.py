"""The one formula behind every intervention: `h' = h + strength · code(h, source) @ basisᵀ`."""

import inspect
import json
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reftlens.interventions.subspace import Frame
from reftlens.numbers import whole

Hidden = Float[Tensor, "*units d"]
Strength = int | float | Float[Tensor, "*#units #rank"]


class Origin(NamedTuple):
    """Of each unit that is edited, where it stands in the text."""

    rows: Int[Tensor, " *units"]
    """The row it belongs to."""
    steps: Int[Tensor, " *units"] | None = None
    """How many tokens after the first one that follows the prompt: 0, 1, …; -1 for every token of the prompt."""
    decided: Float[Tensor, " *units"] | None = None
    """Where the prompt was read before: what was decided there for the row."""


class Kind(nn.Module, ABC):
    """What files name by its `kind` and make again from its settings: an intervention, or a gate. Abstract."""

    kind: ClassVar[str]
    """Name under which the store knows the class."""
    unsaved: ClassVar[str] = ""
    """Why one cannot be stored, and what to store in its place; empty where it can."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_") and not hasattr(cls, "kind"):
            raise TypeError(f'{cls.__name__} has no kind: give it one, kind = "{cls.__name__}", for the store')

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor arguments that make an equal one, up to its tensors; JSON values only.

        One that is an intervention or a gate itself stands there as `{"kind": …, "settings": …}`.
        """

    @abstractmethod
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters anew, as the constructor does."""

    def anneal(self, progress: float) -> None:
        """Called before each optimizer step with the share of steps that are done, 0 to 1; most kinds do nothing."""

    def penalty(self) -> Tensor | None:
        """Added to the loss of each optimizer step, in nats; None for most kinds."""
        return None

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings().items())


class Intervention(Kind):
    """An edit of hidden vectors `h` of width `d`: `h' = h + strength · dropout(code(h)) @ basisᵀ`.

    Abstract. A kind is final and gives `code`, `basis`, `settings` and `reset`. It knows no model, layer or
    token. Arithmetic is float32, or wider where the hidden state or the parameters are, even under autocast;
    the sum is cast back to the dtype of `h`, once, here. Dropout falls on the code, never on `h`.
    Strength 0 returns `h` itself.

    One of your own (`rl.load(…, kinds={"Push": Push})` reads it again):

        class Push(rl.Intervention):
            kind = "Push"

            def __init__(self, d: int) -> None:
                super().__init__(d, rank=1)
                self.towards = torch.nn.Parameter(torch.zeros(d, dtype=torch.float32))

            def code(self, h, basis):  # how far each token goes: here all of them equally
                return torch.ones_like(h[..., :1])

            def basis(self):
                return self.towards[:, None]

            def settings(self):
                return {"d": self.d}

            def reset(self, generator=None):
                torch.nn.init.zeros_(self.towards)
    """

    affine: bool = False
    """Whether the edit is an affine map of `h`, so that it can be merged into a linear layer."""
    variables: tuple[str, ...] = ()
    """What is exchanged for the value it has in a source row; nothing, for an intervention without a source."""
    stacks: bool = True
    """Whether several of one class and equal settings may be computed at once under `torch.vmap`."""
    pools: bool = False
    """Whether the edit of a token depends on other edited tokens of its prompt; such a kind edits prompts only."""
    remembers: bool = False
    """Whether a kind that pools decides once, at the prompt, and so may edit the tokens after it too."""
    counts: bool = False
    """Whether the edit of a token depends on how many tokens after the prompt it stands."""

    def __init__(self, d: SupportsIndex, rank: SupportsIndex, dropout: SupportsFloat = 0.0) -> None:
        super().__init__()
        if not 0.0 <= float(dropout) < 1.0:
            raise ValueError(f"dropout={dropout}, expected 0 <= dropout < 1")
        width = f": the width of the vectors comes first, as in {type(self).__name__}({_width_in(d)}, …)"
        self.d = whole(d, "d", 1, hint=width)
        self.rank = whole(rank, "rank")
        self.dropout = nn.Dropout(float(dropout))

    @abstractmethod
    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        """Coordinates of the edit in the basis, before strength; `h` comes in the working dtype."""

    @abstractmethod
    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"] | None:
        """Directions of the edit as columns; None stands for the standard basis (then `rank == d`)."""

    def forward(
        self,
        h: Float[Tensor, "*units {self.d}"],
        strength: Strength = 1.0,
        basis: Tensor | None = None,
        source: Float[Tensor, "*units variables {self.d}"] | None = None,
        origin: Origin | None = None,
    ) -> Float[Tensor, "*units {self.d}"]:
        """The edited `h`.

        Args:
            strength: a number, or one per direction (`[rank]`), or any shape that broadcasts with the code.
            basis: what `self.basis()` gave, where a caller keeps it over several calls.
            source: for an intervention that exchanges variables, where each is taken from; NaN leaves it.
            origin: for an intervention that pools or counts, where each token stands.
        """
        if isinstance(strength, int | float) and strength == 0:
            return h
        with torch.autocast(h.device.type, enabled=False):
            x = h.to(self.working_dtype(h.dtype))
            basis = self.basis() if basis is None else basis
            basis = None if basis is None else basis.to(x.dtype)
            scale = strength.to(x) if isinstance(strength, Tensor) else strength
            code = self.dropout(self.coded(x, basis, source, origin)) * scale
            edit = code if basis is None else code @ basis.T
            return (x + edit).to(h.dtype)

    def coded(self, h: Tensor, basis: Tensor | None, source: Tensor | None, origin: Origin | None) -> Tensor:
        """`code`, for a kind that may take a source, or looks at a row as a whole."""
        if source is not None:
            raise ValueError(f"{self.kind} exchanges nothing, and was given a source")
        return self.code(h, basis)

    def working_dtype(self, hidden: torch.dtype) -> torch.dtype:
        """float32, or wider where `hidden` or a parameter is."""
        dtype = torch.promote_types(hidden, torch.float32)
        for tensor in [*self.parameters(), *self.buffers()]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def frames(self) -> list[Frame]:
        return [m for m in self.modules() if isinstance(m, Frame)]

    @property
    def label(self) -> str:
        """The kind in words: of a wrapper, with what it wraps."""
        return self.kind

    @property
    def stored_parameters(self) -> int:
        """Numbers that are trained and stored."""
        return sum(p.numel() for p in self.parameters())

    @property
    def degrees_of_freedom(self) -> int:
        """Stored parameters less the constraints: an orthonormal frame has `d·rank - rank(rank+1)/2`."""
        return self.stored_parameters - sum(f.matrix.numel() - f.degrees_of_freedom for f in self.frames())


def stored_settings(module: Intervention) -> dict[str, Any]:
    """Its `settings()`; `ValueError` where they cannot be written down, or it cannot be stored."""
    if module.unsaved:
        raise ValueError(f"an edit that is {module.kind} cannot be stored: {module.unsaved}")
    settings, name = module.settings(), type(module).__name__
    try:
        same = json.loads(json.dumps(settings)) == settings
    except TypeError:
        same = False
    if not same:
        raise ValueError(
            f"settings() of {name} must hold JSON values only (numbers, text, lists; a function cannot be stored: "
            f"write its values out), got {settings}"
        )
    return settings


@torch.no_grad()
def check_reset(module: Intervention) -> None:
    """Raise where `reset` of a class outside reftlens does not give the same from two starts and one seed.

    Raises:
        ValueError: naming the first tensor that differs: what `reset` leaves as it was, or draws from torch's global
            generator.
    """
    if all(type(part).__module__.partition(".")[0] == "reftlens" for part in module.modules() if hasattr(part, "kind")):
        return
    first, second = deepcopy(module), deepcopy(module)
    for parameter in second.parameters():
        if parameter.requires_grad:
            parameter.add_(1)
    with torch.random.fork_rng(devices=[]):
        for copy in (first, second):
            torch.rand(1)  # torch's global generator stands elsewhere for the second
            copy.reset(torch.Generator().manual_seed(0))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        if not torch.equal(a, b):
            raise ValueError(
                f"{module.kind}.reset(generator) does not give {name!r} the same value from one seed: it leaves it as "
                "it was, or draws from torch's global generator. Initialise every parameter from `generator` there"
            )


def _width_in(value: Any) -> str:
    """What was meant by a vector, or whatever else, in the place of a width."""
    return str(value.shape[-1]) if isinstance(value, Tensor) and value.ndim else "model.cfg.d_model"
