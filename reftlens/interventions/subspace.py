"""Orthonormal frames: a `[d, rank]` matrix with orthonormal columns that any optimizer can train.

The trained parameter is free; its thin QR factor is the frame. That costs O(d·rank²) per use and stores no
`d × d` buffer. The factor is made unique by a positive diagonal of R, so that it depends smoothly on the
parameter and an orthonormal parameter is its own frame (up to rounding).
"""

from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.numbers import whole

Basis = Float[Tensor, "d rank"]


def orthonormal(matrix: Basis) -> Basis:
    """The thin QR factor `Q` of `matrix = Q R` with `diag(R) > 0`: same column space, orthonormal columns.

    In float32 or wider, whatever the dtype of `matrix`.
    """
    q, r = torch.linalg.qr(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    return q * sign


class Frame(nn.Module):
    """A trainable orthonormal frame; calling it gives the basis `[d, rank]`, columns orthonormal.

    It starts as the first unit vectors: `reset` draws it, `set` gives it.
    Weight decay on the parameter would only shrink `R`, never the frame, and so speed up learning without
    being asked to: `fit` leaves frames out of it, and settles them at the end: the parameter is then the basis itself.

    That holds in an intervention of one's own as well, wherever it keeps its frames. One that bounds what `h` holds in
    a trained subspace, `h' = h + strength · (tanh(h B) - h B) Bᵀ`:

        class Squash(rl.Intervention):
            kind = "Squash"

            def __init__(self, d: int, rank: int) -> None:
                super().__init__(d, rank)
                self.frame = rl.interventions.Frame(d, rank)

            def code(self, h, basis):
                return torch.tanh(h @ basis) - h @ basis

            def basis(self):
                return self.frame()

            def settings(self):
                return {"d": self.d, "rank": self.rank}

            def reset(self, generator=None):
                self.frame.reset(generator)
    """

    def __init__(self, d: SupportsIndex, rank: SupportsIndex) -> None:
        super().__init__()
        d, rank = whole(d, "d"), whole(rank, "rank")
        if not 1 <= rank <= d:
            raise ValueError(f"rank={rank} does not fit into d={d}: need 1 <= rank <= d")
        self.matrix = nn.Parameter(torch.eye(d, rank, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the frame anew, uniformly among all frames of this size."""
        noise = torch.randn(self.matrix.shape, generator=generator, dtype=torch.float64)
        self.set(orthonormal(noise))

    @torch.no_grad()
    def set(self, basis: Basis) -> None:
        """Start from a given basis, which must have orthonormal columns (to 1e-4)."""
        if basis.shape != self.matrix.shape:
            raise ValueError(f"the basis has shape {list(basis.shape)}, expected {list(self.matrix.shape)}")
        gram = basis.double().T @ basis.double()
        off = (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).abs().max().item()
        if not off <= 1e-4:  # NaN is not orthonormal either
            raise ValueError(
                f"the basis is not orthonormal: largest entry of BᵀB - I is {off:.2g}, expected below 1e-4; "
                "pass it through interventions.orthonormal first"
            )
        self.matrix.copy_(basis)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the parameter the basis itself, so that what is saved is what acts; one that is not trained stays."""
        if self.matrix.requires_grad:
            self.matrix.copy_(self())

    def forward(self) -> Basis:
        return orthonormal(self.matrix)

    @property
    def degrees_of_freedom(self) -> int:
        """`d·rank - rank(rank+1)/2`: the dimension of the Stiefel manifold."""
        d, rank = self.matrix.shape
        return d * rank - rank * (rank + 1) // 2
