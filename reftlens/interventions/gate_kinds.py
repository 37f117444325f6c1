"""Kinds of gate: by the projection on a direction, trained, or by how far a token is after the prompt."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.errors import check_one_of
from reftlens.interventions.base import Hidden, Origin
from reftlens.interventions.fixed import checked_tensor
from reftlens.interventions.gates import Gate, undecided
from reftlens.numbers import real, tensor_of, whole

Per = Literal["token", "prompt"]
Rule = Literal["last", "max", "mean"]


class _Scored(Gate):
    """Opens by a score of each token; or of the whole row, by those tokens of its prompt that the site chooses.

    Args:
        per: `"prompt"` decides once for a row, also for what is written after the prompt.
        by: which score that is: of the last of these tokens (default), the largest, or the mean.
    """

    d: int

    def __init__(self, d: SupportsIndex, per: Per, by: Rule | None) -> None:
        super().__init__()
        check_one_of("per", per, ("token", "prompt"))
        self.d, self.pools = whole(d, "d", 1), per == "prompt"
        self.per: Per = per
        self.by: Rule | None = "last" if self.pools and by is None else by
        if self.pools:
            check_one_of("by", self.by, ("last", "max", "mean"))
        elif by is not None:
            raise ValueError(f'by={by!r} says how a prompt is judged, and per="token" judges each token: drop it')

    def score(self, h: Hidden) -> Float[Tensor, " *units"]:
        raise NotImplementedError

    def at(self, score: Float[Tensor, " *units"]) -> Float[Tensor, " *units"]:
        """How far it is open at a score."""
        raise NotImplementedError

    def open(self, h: Hidden, origin: Origin | None = None) -> Float[Tensor, "*units 1"]:
        if self.pools and origin is not None and origin.decided is not None:
            return origin.decided.to(h)[..., None]
        return self.at(self._of_row(self.score(h), origin) if self.pools else self.score(h))[..., None]

    def _of_row(self, score: Float[Tensor, " tokens"], origin: Origin | None) -> Float[Tensor, " tokens"]:
        """Of each token the score of its row."""
        prompt = _steps(self, origin) < 0
        rows, group = torch.unique(origin.rows, return_inverse=True) if origin else (score[:0], score[:0].long())
        counts = torch.bincount(group[prompt], minlength=len(rows))
        if not bool(counts.all()):
            raise undecided(self)
        if self.by == "last":
            places = torch.arange(len(score), device=score.device)
            return score[torch.zeros_like(rows).scatter_reduce(0, group[prompt], places[prompt], "amax")][group]
        if self.by == "max":
            lowest = score.new_full((len(rows),), -torch.inf)
            return lowest.scatter_reduce(0, group[prompt], score[prompt], "amax")[group]
        return (score.new_zeros(len(rows)).index_add(0, group[prompt], score[prompt]) / counts)[group]

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "per": self.per, "by": self.by}


class Threshold(_Scored):
    """Open where the projection on a direction is over a threshold: `g = [h · direction / ‖direction‖ > above]`.

    Nothing is trained. `above` is in units of the activations; as for every gate, `h` is what the site holds before
    its own edit.

    Args:
        direction: `[d]`; its length does not matter.
        above: the threshold.
        per: `"token"` decides for each token alone; `"prompt"` once for a row, by the tokens of its prompt that the
            site chooses, and what is written after the prompt is edited or not as the prompt is.
        by: for `per="prompt"`, whether the last of these tokens decides (default), the largest projection, or the mean.
        d: only for loading: the width of a direction that is filled in later.
    """

    direction: Tensor
    kind = "Threshold"

    def __init__(
        self,
        direction: Float[Tensor, " d"] | None = None,
        above: SupportsFloat = 0.0,
        *,
        per: Per = "token",
        by: Rule | None = None,
        d: SupportsIndex | None = None,
    ) -> None:
        if (direction is None) == (d is None):
            raise ValueError("Threshold needs a direction [d], such as direction.basis[:, 0]; d=… is for loading alone")
        unit = None if direction is None else tensor_of(direction, "direction").detach().double()
        super().__init__(unit.shape[-1] if unit is not None else whole(d, "d"), per, by)
        self.above = real(above, "above")
        if unit is None:
            unit = torch.zeros(self.d, dtype=torch.float32)
        elif not checked_tensor("direction", unit, (self.d,)).any():
            raise ValueError("direction is zero: nothing has a projection on it")
        else:
            unit = unit / unit.norm()
        self.register_buffer("direction", unit.float())

    def score(self, h: Hidden) -> Float[Tensor, " *units"]:
        """The projection of each vector, in units of the activations."""
        return h @ self.direction.to(h.dtype)

    def at(self, score: Float[Tensor, " *units"]) -> Float[Tensor, " *units"]:
        return (score > self.above).to(score)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "above": self.above}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Nothing is trained, so nothing changes."""


class Sigmoid(_Scored):
    """A trained gate, `g = σ((w · h + b) / T)`, with `w` and `b` trained from 0 along with the edit.

    It is never quite shut; `as_threshold()` is, on the same side.

    Args:
        temperature: `T`: the lower, the sharper.
        per: as in `Threshold`.
        by: as in `Threshold`, of the scores `w · h + b`.
    """

    kind = "Sigmoid"

    def __init__(
        self, d: SupportsIndex, *, temperature: SupportsFloat = 1.0, per: Per = "token", by: Rule | None = None
    ) -> None:
        super().__init__(d, per, by)
        self.temperature = real(temperature, "temperature")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={temperature}, expected a finite number above 0")
        self.w = nn.Parameter(torch.zeros(self.d, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def score(self, h: Hidden) -> Float[Tensor, " *units"]:
        """`w · h + b`."""
        return h @ self.w.to(h.dtype) + self.b.to(h.dtype)

    def at(self, score: Float[Tensor, " *units"]) -> Float[Tensor, " *units"]:
        return torch.sigmoid(score / self.temperature)

    def as_threshold(self) -> Threshold:
        """Open where this one is more than half open, and shut elsewhere; `ValueError` where `w` is 0."""
        w = self.w.detach()
        return Threshold(w, -(self.b.detach() / w.norm()).item(), per=self.per, by=self.by)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "temperature": self.temperature}

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Half open everywhere."""
        self.w.zero_()
        self.b.zero_()


class Schedule(Gate):
    """A factor for each token after the prompt: `g = factors[step]`, with `step` 0 for the first of them.

    The hidden state of a token decides the next one: that of the prompt's last token, which `prompt` is for, the first
    that is written.

    Args:
        factors: in [0, 1], the strength being what they are a share of; the last one holds from there on. Or a function
            of the step, which cannot be stored.
        prompt: the factor of every token of the prompt.

    Raises:
        ValueError: for no factor, or one outside [0, 1]; of a function, where it gives one.
    """

    kind = "Schedule"
    counts = True

    def __init__(
        self, factors: Sequence[SupportsFloat] | Callable[[int], SupportsFloat], *, prompt: SupportsFloat = 1.0
    ) -> None:
        super().__init__()
        self.prompt = _share(prompt, "prompt")
        self.factors = (
            factors if callable(factors) else tuple(_share(x, f"factors[{i}]") for i, x in enumerate(factors))
        )
        if not callable(self.factors) and not self.factors:
            raise ValueError("factors=[], expected one or more, the last of which holds from there on")

    def open(self, h: Hidden, origin: Origin | None = None) -> Float[Tensor, "*units 1"]:
        steps = _steps(self, origin)
        if callable(self.factors):
            every, numbers = torch.unique(steps.clamp(min=0), return_inverse=True)
            factors = [_share(self.factors(step), f"factors({step})") for step in every.tolist()]
        else:
            factors, numbers = list(self.factors), steps.clamp(0, len(self.factors) - 1)
        table = torch.tensor(factors, dtype=h.dtype, device=h.device)
        return torch.where(steps < 0, self.prompt, table[numbers])[..., None]

    def settings(self) -> dict[str, Any]:
        factors = self.factors if callable(self.factors) else list(self.factors)
        return {"factors": factors, "prompt": self.prompt}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Nothing is trained, so nothing changes."""


def _steps(gate: Gate, origin: Origin | None) -> Tensor:
    if origin is None or origin.steps is None:
        raise ValueError(f"{gate.kind} was not told where the tokens stand: pass origin=Origin(rows, steps)")
    return origin.steps


def _share(value: SupportsFloat, name: str) -> float:
    number = real(value, name)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}={value}, expected 0 to 1: a share of the strength, which may be any number")
    return number
