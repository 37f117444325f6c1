"""Exchanges behind a gate that is trained: how many directions, which neurons, which latents carry a variable.

`h' = h + strength · (m ⊙ (source - h) B) Bᵀ`, with a gate `m` in (0, 1) per direction that sharpens in training.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftlens.errors import check_one_of
from reftlens.interventions.fixed import checked_tensor
from reftlens.interventions.interchange import DAS, Exchange
from reftlens.interventions.subspace import Frame
from reftlens.numbers import tensor_of, whole

Temperature = Sequence[float]
"""First and last."""

Activation = Literal["relu", "jumprelu", "topk"]


class GatedExchange(Exchange):
    """Abstract: an exchange with a gate whose temperature falls geometrically from `start` to `end` in training.

    `fit` calls `anneal` before each step, so that a resumed run goes on as it would have.
    """

    temperature_now: Tensor

    def __init__(self, d: SupportsIndex, rank: SupportsIndex, temperature: Temperature, sparsity: float) -> None:
        super().__init__(d, rank)
        start, end = temperature
        if not (0 < end <= start < math.inf):
            raise ValueError(f"temperature=({start}, {end}), expected start >= end > 0")
        if not 0 <= sparsity < math.inf:
            raise ValueError(f"sparsity={sparsity}, expected 0 or more")
        self.temperature, self.sparsity = (float(start), float(end)), float(sparsity)
        self.register_buffer("temperature_now", torch.tensor(float(start), dtype=torch.float32))

    @property
    def _gate_settings(self) -> dict[str, Any]:
        return {"temperature": list(self.temperature), "sparsity": self.sparsity}

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "rank": self.rank, **self._gate_settings}

    @abstractmethod
    def gate_logits(self) -> Float[Tensor, " {self.rank}"]:
        """What is trained of the gates; a direction is open where it is positive."""

    def gate(self) -> Float[Tensor, " {self.rank}"]:
        """How far each direction is open, `σ(logit / T)` at the present temperature."""
        return torch.sigmoid(self.gate_logits() / self.temperature_now)

    def is_open(self) -> Bool[Tensor, " {self.rank}"]:
        """Directions more open than shut."""
        return self.gate().detach() > 0.5

    @property
    def learned_rank(self) -> int:
        """How many directions are open."""
        return int(self.is_open().sum())

    def as_das(self) -> DAS:
        """The exchange of the open directions alone, each of them open whole.

        Raises:
            ValueError: where no direction is open.
        """
        if not self.learned_rank:
            raise ValueError(
                f"{self.kind} has no open direction (learned rank 0): it exchanges nothing, as the source tells "
                f"nothing that is worth sparsity={self.sparsity:g} nat(s) for each direction; lower sparsity where "
                "a direction may be worth less"
            )
        basis = self.basis()
        columns = (
            torch.eye(self.d, dtype=torch.float32, device=self.temperature_now.device)
            if basis is None
            else basis.detach()
        )
        return DAS(self.d, basis=columns[:, self.is_open()])

    def anneal(self, progress: float) -> None:
        start, end = self.temperature
        self.temperature_now.fill_(start * (end / start) ** progress)

    def penalty(self) -> Tensor | None:
        """`sparsity · Σ m`: the number of open directions, priced in nats."""
        return self.sparsity * self.gate().sum() if self.sparsity else None

    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        moved = away[..., 0, :] if basis is None else away[..., 0, :] @ basis
        return self.gate().to(h.dtype) * moved


class LogitGates(GatedExchange):
    """Abstract: a gate `m = σ(l / T)` for each unit, its logits `l` trained from 0."""

    def __init__(self, d: SupportsIndex, rank: SupportsIndex, temperature: Temperature, sparsity: float) -> None:
        super().__init__(d, rank, temperature, sparsity)
        self.logits = nn.Parameter(torch.zeros(self.rank, dtype=torch.float32))

    def gate_logits(self) -> Float[Tensor, " {self.rank}"]:
        return self.logits

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Every unit half open."""
        self.logits.zero_()
        self.anneal(0.0)


class SigmoidMask(LogitGates):
    """Differential binary masking: which units are exchanged (Cao et al. 2020; De Cao et al. 2022).

    `h' = h + strength · (σ(l / T) ⊙ (source - h) B) Bᵀ`, the logits `l` trained from 0. `B` is fixed: the standard
    basis, so that units are neurons, or the orthonormal columns given, say `pca(x, 32).basis`.

    Args:
        rank: only for loading: the width of a basis that is filled in later.
        temperature: of the gate, first and last; the last makes it all but binary.
        sparsity: price of an open unit in nats, added to the loss.
    """

    directions: Tensor | None
    kind = "SigmoidMask"

    def __init__(
        self,
        d: SupportsIndex,
        basis: Float[Tensor, "d rank"] | None = None,
        *,
        rank: SupportsIndex | None = None,
        temperature: Temperature = (1.0, 0.01),
        sparsity: float = 0.0,
    ) -> None:
        if basis is not None:
            basis = tensor_of(basis, "basis")
            rank = basis.shape[1]
            Frame(d, rank).set(basis)  # is it d wide, and orthonormal?
        super().__init__(d, d if rank is None else rank, temperature, sparsity)
        columns = None if rank is None else torch.zeros(self.d, self.rank, dtype=torch.float32)  # for the store
        self.register_buffer("directions", columns if basis is None else basis.detach().float().contiguous())

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"] | None:
        return self.directions

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "rank": None if self.directions is None else self.rank, **self._gate_settings}


class SAEMask(LogitGates):
    """A mask over the latents of a sparse autoencoder; what the autoencoder does not explain stays as it is.

    `h' = h + strength · (m ⊙ (z(source) - z(h))) W_dec` with `z(h) = f((h - b_dec) W_enc + b_enc)` and
    `m = σ(l / T)`, `l` trained from 0. The reconstruction error of `h` is kept (pyvene's version drops it).
    `f` is `relu`; where it is 0 up to a threshold of each latent, a jumprelu (Rajamanoharan et al. 2024, 2407.14435);
    where only the `k` largest of a token are kept, a top-k (Gao et al. 2024, 2406.04093).

    Args:
        encoder: `[d, latents]`. decoder: `[latents, d]`. Given as tensors, of any autoencoder of this form; its
            biases are 0 where they are not given. `storage.load_sae` reads those of `sae_lens`.
        latents: only for loading: how many there are, filled in later.
        activation: `f`: `"relu"`, `"jumprelu"` with its `threshold`, or `"topk"` with its `k`.
    """

    kind = "SAEMask"

    def __init__(
        self,
        d: SupportsIndex,
        encoder: Float[Tensor, "_ _"] | None = None,
        decoder: Float[Tensor, "_ _"] | None = None,
        encoder_bias: Float[Tensor, " _"] | None = None,
        decoder_bias: Float[Tensor, " _"] | None = None,
        *,
        latents: SupportsIndex | None = None,
        activation: Activation = "relu",
        threshold: Float[Tensor, " _"] | None = None,
        k: SupportsIndex | None = None,
        temperature: Temperature = (1.0, 0.01),
        sparsity: float = 0.0,
    ) -> None:
        if latents is None and encoder is not None:
            latents = tensor_of(encoder, "encoder").shape[1]
        if latents is None:
            raise ValueError("SAEMask needs the autoencoder: encoder [d, latents] and decoder [latents, d]")
        super().__init__(d, latents, temperature, sparsity)
        check_one_of("activation", activation, ("relu", "jumprelu", "topk"))
        for name, value, of in (("threshold", threshold, "jumprelu"), ("k", k, "topk")):
            if value is not None and activation != of:
                raise ValueError(f"{name}= is of activation={of!r}, and activation is {activation!r}")
        d, latents = self.d, self.rank
        self.activation, self.k = activation, whole(k, "k", 1) if activation == "topk" else None
        if self.k is not None and self.k > latents:
            raise ValueError(f"k={self.k}, and there are {latents} latents")
        shapes = {"encoder": (d, latents), "decoder": (latents, d), "encoder_bias": (latents,), "decoder_bias": (d,)}
        tensors = [encoder, decoder, encoder_bias, decoder_bias]
        if activation == "jumprelu":
            shapes["threshold"], tensors = (latents,), [*tensors, threshold]
        for (name, shape), values in zip(shapes.items(), tensors, strict=True):
            x = torch.zeros(shape, dtype=torch.float32) if values is None else tensor_of(values, name).detach().float()
            self.register_buffer(name, checked_tensor(name, x, shape))

    def latents(self, h: Float[Tensor, "*units {self.d}"]) -> Float[Tensor, "*units {self.rank}"]:
        """`z(h) = f((h - b_dec) W_enc + b_enc)`."""
        encoder, bias = self.get_buffer("encoder").to(h.dtype), self.get_buffer("encoder_bias").to(h.dtype)
        x = (h - self.get_buffer("decoder_bias").to(h.dtype)) @ encoder + bias
        if self.activation == "jumprelu":
            return torch.relu(x) * (x > self.get_buffer("threshold").to(h.dtype))
        if self.k is not None:
            values, places = torch.topk(x, self.k, dim=-1)
            return torch.zeros_like(x).scatter(-1, places, torch.relu(values))
        return torch.relu(x)

    def reconstruction(self, h: Float[Tensor, "*units {self.d}"]) -> Float[Tensor, "*units {self.d}"]:
        """`z(h) W_dec + b_dec`: what the autoencoder makes of `h`."""
        decoder, bias = self.get_buffer("decoder").to(h.dtype), self.get_buffer("decoder_bias").to(h.dtype)
        return self.latents(h) @ decoder + bias

    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        return self.gate().to(h.dtype) * (self.latents(h + away[..., 0, :]) - self.latents(h))

    def as_das(self) -> DAS:
        """There is none: `ValueError`."""
        raise ValueError("SAEMask exchanges latents, whose directions overlap: it has no subspace, and no DAS")

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.get_buffer("decoder").T

    def settings(self) -> dict[str, Any]:
        told = {} if self.activation == "relu" else {"activation": self.activation}
        told |= {} if self.k is None else {"k": self.k}
        return {"d": self.d, "latents": self.rank, **told, **self._gate_settings}
