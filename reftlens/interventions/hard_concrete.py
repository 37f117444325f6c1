"""A gate over a whole site: whether it is edited at all, learned with the edit at a price for each open site."""

import math
from typing import Any, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.interventions.base import Hidden, Origin
from reftlens.interventions.gates import Gate
from reftlens.numbers import real


class HardConcrete(Gate):
    """Open or shut for every token alike: the L0 gate of Louizos et al. 2018 (arXiv 1712.01312, eq. 10 to 13).

    In training `s = σ((log u - log(1 - u) + log α) / β)`, `u` uniform and drawn once for each optimizer step, from the
    seed of that step; else `s = σ(log α)`. Stretched to `(γ, ζ) = (-0.1, 1.1)` and cut to [0, 1], so that the gate is
    exactly 0 or 1 where `|log α| > 2.4`. `sparsity · P(g > 0)`, with `P(g > 0) = σ(log α - β log(-γ / ζ))`, is
    added to the loss; the price grows to that evenly over the first part of training, as an edit is worth less while
    it is still being learned.

    Args:
        sparsity: price of an open site, in nats.
        ramp: the share of training over which the price grows from 0; 0 asks all of it from the first step on.
        start: `log α` at first.
        rate: `log α` is `rate` times what is trained, so that a gate learns so many times as fast as the edit.
        temperature: β.
    """

    kind = "HardConcrete"
    constant = True
    low, high = -0.1, 1.1
    noise: Tensor
    price: Tensor
    """Of an open site at the present step."""

    def __init__(
        self,
        sparsity: SupportsFloat = 0.5,
        *,
        ramp: SupportsFloat = 0.5,
        start: SupportsFloat = 0.0,
        rate: SupportsFloat = 10.0,
        temperature: SupportsFloat = 2 / 3,
    ) -> None:
        super().__init__()
        self.sparsity, self.start = real(sparsity, "sparsity"), real(start, "start")
        self.rate, self.temperature = real(rate, "rate"), real(temperature, "temperature")
        self.ramp = real(ramp, "ramp")
        if not (0 <= self.sparsity < math.inf and self.rate > 0 and self.temperature > 0):
            raise ValueError(
                f"sparsity={sparsity}, rate={rate}, temperature={temperature}: expected a sparsity of 0 or more, and "
                "the others above 0"
            )
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp={ramp}, expected 0 to 1: the share of training over which the price grows")
        self.trained = nn.Parameter(torch.zeros((), dtype=torch.float32))
        for name in ("noise", "price"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32), persistent=False)
        self.reset()

    @property
    def log_alpha(self) -> Float[Tensor, ""]:
        """Above 0 the gate is rather open; in training noise is added to it."""
        return self.rate * self.trained

    def learned(self) -> Float[Tensor, ""]:
        """How far it is open without noise."""
        return self._stretched(self.log_alpha)

    def _stretched(self, logit: Tensor) -> Tensor:
        return (torch.sigmoid(logit) * (self.high - self.low) + self.low).clamp(0, 1)

    def open(self, h: Hidden, origin: Origin | None = None) -> Float[Tensor, "*units 1"]:
        drawn = (self.noise + self.log_alpha) / self.temperature
        value = self._stretched(drawn) if self.training else self.learned()
        return value.to(h.dtype).expand(*h.shape[:-1], 1)

    def anneal(self, progress: float) -> None:
        """Draw the noise of a step, from torch's generator as the run has just seeded it, and ask its price."""
        u = torch.rand((), dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        self.noise.copy_(u.logit())
        self.price.fill_(self.sparsity * (min(1.0, progress / self.ramp) if self.ramp else 1.0))

    def penalty(self) -> Tensor | None:
        if not self.sparsity:
            return None
        return self.price * torch.sigmoid(self.log_alpha - self.temperature * math.log(-self.low / self.high))

    def settings(self) -> dict[str, Any]:
        names = ("sparsity", "ramp", "start", "rate", "temperature")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """As open as at first, at its whole price; nothing is drawn."""
        self.trained.fill_(self.start / self.rate)
        self.noise.zero_()
        self.price.fill_(self.sparsity)
