"""Plain edits that need no training, though they can be trained too: a steering vector and ablations."""

from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.errors import check_finite
from reftlens.interventions.base import Intervention
from reftlens.interventions.subspace import orthonormal
from reftlens.numbers import seeded, tensor_of, whole


class SteeringVector(Intervention):
    """`h' = h + strength · v`: one vector added to every edited position; trainable, zero unless given.

    Strength is in units of `v` as it is; nothing is normalised. A vector from labelled activations:
    `reftlens.directions.difference_of_means(x, labels).as_steering()`.
    """

    kind = "SteeringVector"
    affine = True

    def __init__(self, d: SupportsIndex, vector: Float[Tensor, " {d}"] | None = None) -> None:
        super().__init__(d, 1)
        self.vector = nn.Parameter(torch.zeros(self.d, dtype=torch.float32))
        if vector is not None:
            with torch.no_grad():
                self.vector.copy_(checked_tensor("vector", vector, (self.d,)))

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        return h.new_ones(*h.shape[:-1], 1)

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.vector[:, None]

    def settings(self) -> dict[str, Any]:
        return {"d": self.d}

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """The zero vector: the edit is the identity."""
        self.vector.zero_()


class Ablation(Intervention):
    """`h' = h + strength · (reference - h) B Bᵀ`: replace what lies in a subspace, or everything, by a constant.

    Args:
        reference: what to put there, `[d]`; None is zero ablation, the mean over a data set is mean ablation
            (`directions.mean_ablation(activations(model, data, site))`).
        directions: linearly independent columns that span the subspace (made orthonormal here); None ablates the
            whole vector.
        rank: width of the subspace where the directions come later, from a file.

    Nothing is trained: reference and basis are buffers.
    """

    reference: Tensor
    directions: Tensor | None
    kind = "Ablation"
    affine = True

    def __init__(
        self,
        d: SupportsIndex,
        reference: Float[Tensor, " {d}"] | None = None,
        directions: Float[Tensor, "{d} rank"] | None = None,
        *,
        rank: SupportsIndex | None = None,
    ) -> None:
        if directions is not None:
            directions = tensor_of(directions, "directions")
            if rank not in (None, directions.shape[-1]):
                raise ValueError(f"rank={rank}, and there are {directions.shape[-1]} directions: drop rank")
            rank = directions.shape[-1]
            checked_tensor("directions", directions, (whole(d, "d"), directions.shape[-1]))
            if int(torch.linalg.matrix_rank(directions.detach().float())) < rank:
                raise ValueError(
                    f"the {rank} directions are not linearly independent, so they do not span a subspace of that width"
                )
        super().__init__(d, d if rank is None else rank)
        self.whole = rank is None
        constant = torch.zeros(self.d, dtype=torch.float32)
        if reference is not None:
            constant = checked_tensor("reference", reference, (self.d,)).detach().float().clone()
        self.register_buffer("reference", constant)
        columns = None if self.whole else torch.eye(self.d, self.rank, dtype=torch.float32)  # filled in by the store
        if directions is not None:
            columns = orthonormal(directions.detach().double()).float().contiguous()
        self.register_buffer("directions", columns)

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        away = self.reference.to(h.dtype) - h
        return away if basis is None else away @ basis

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"] | None:
        return self.directions

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "rank": None if self.whole else self.rank}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Nothing is trained, so nothing changes."""


class Noise(Intervention):
    """Gaussian noise, `h' = h + strength · scale · ε`, `ε ~ N(0, I)` drawn once from `seed`. Nothing is trained.

    One draw for every token, so that an edit is a function of its settings; other draws have other seeds.
    """

    kind = "Noise"
    affine = True

    def __init__(self, d: SupportsIndex, scale: SupportsFloat, seed: SupportsIndex = 0) -> None:
        super().__init__(d, 1)
        self.scale, self.seed = float(scale), whole(seed, "seed")
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale={scale}, expected a finite number, 0 or more")
        self.register_buffer("drawn", torch.zeros(self.d, dtype=torch.float32))
        self.reset(seeded(seed))

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        return h.new_ones(*h.shape[:-1], 1)

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.scale * self.get_buffer("drawn")[:, None]

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "scale": self.scale, "seed": self.seed}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the noise anew."""
        self.get_buffer("drawn").copy_(torch.randn(self.d, generator=generator, dtype=torch.float32))


def checked_tensor(name: str, values: Any, expected: tuple[int, ...]) -> Tensor:
    """The argument `name` as a tensor.

    Raises:
        TypeError: for what is no tensor and cannot become one.
        ValueError: for another shape than `expected`.
        NotFinite: for NaN or infinity.
    """
    tensor = tensor_of(values, name)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
    check_finite(tensor, name)
    return tensor
