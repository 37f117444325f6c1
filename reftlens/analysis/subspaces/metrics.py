"""In which inner product directions are compared: the Euclidean one, or that of what they do to the logits."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.analysis.subspaces.readers import folded_in
from reftlens.bridge.offload import numbers_of
from reftlens.bridge.protocol import Bridge
from reftlens.editing.site import Site
from reftlens.numbers import tensor_of

_STREAM = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|in|out)")


@dataclass(frozen=True, eq=False)
class Metric:
    """An inner product of directions: `⟨u, v⟩ = (root u)ᵀ (root v)`. `causal_metric` makes one of a model.

    Args:
        name: what axes and tables call it.
        root: float64 on the CPU; None is the identity, of any width. Directions that it maps to 0 have no length.
        stream_only: whether it is of the residual stream alone, so that interventions elsewhere are refused.
    """

    name: str
    root: Float[Tensor, "rank d"] | None = None
    stream_only: bool = False

    def coordinates(self, columns: Float[Tensor, "d k"], name: str = "the basis") -> Float[Tensor, "rank k"]:
        """The columns where the inner product is the ordinary one; float64 on the CPU.

        Raises:
            ValueError: for columns of another width.
        """
        x = columns.detach().cpu().double()
        if self.root is None:
            return x
        if len(x) != self.root.shape[1]:
            raise ValueError(f"{name} has width {len(x)}, and the metric {self.name!r} is of {self.root.shape[1]}")
        mapped, rounding = self.root @ x, 1e-9 * torch.linalg.matrix_norm(self.root, 2) * x.norm(dim=0)
        return torch.where(mapped.norm(dim=0) > rounding, mapped, 0.0)

    @property
    def effective_dimensions(self) -> float | None:
        """`(tr Σ)² / tr Σ²`, `Σ = rootᵀ root`; None for the Euclidean metric, where it is the width.

        Two directions drawn uniformly in the Euclidean sense, as weights are before training, have a mean squared
        cosine of about 1 over this here: more than the chance level, which is that of directions uniform in the metric.
        """
        if self.root is None:
            return None
        values = torch.linalg.svdvals(self.root).square()
        return (values.sum().square() / values.square().sum()).item()

    def check(self, site: Site) -> None:
        """Raise `ValueError` for a site whose directions it does not compare."""
        if self.stream_only and _STREAM.fullmatch(site.hook) is None:
            raise ValueError(
                f"{site.hook} is not the residual stream, and the metric {self.name!r} is of directions there: edit "
                "resid_pre, resid_mid or resid_post, or compare in the Euclidean metric"
            )


EUCLIDEAN = Metric("Euclidean")


def causal_metric(model: Bridge) -> Metric:
    """The causal inner product (Park, Choe and Veitch 2023, arXiv 2311.03658) of directions in the residual stream.

    `⟨u, v⟩ = uᵀ Σ v` with `Σ = Cov(γ)`, the covariance of the rows γ of the unembedding over the vocabulary, each token
    once. That is the covariance, over tokens, of how much `u` and `v` move their logits: two directions are alike as
    far as they do alike to the predictions, and what adds a constant to all logits has no length.

    The paper writes `⟨γ̄, γ̄'⟩ = γ̄ᵀ Σ⁻¹ γ̄'` for directions in the space of the unembedding (which probes and contrasts of
    tokens are). Residual directions are in the dual space, as a logit is `γᵀ h`; the same inner product, carried over
    by the isomorphism `h = Σ⁻¹ γ̄`, is `Σ` there. Softmax does not tell `γ → A γ + β`, `h → A⁻ᵀ h`, with any invertible
    `A`, from the model itself; then `Σ → A Σ Aᵀ`, and `uᵀ A⁻¹ A Σ Aᵀ A⁻ᵀ v = uᵀ Σ v` stays, which `uᵀ v` does not.

    Assumed of the final norm: its gain, and the centring of a LayerNorm, are part of γ; its division by the length is
    left out, as it is one factor for all directions at a token, and not linear. At a site before the last block this
    is the metric of the direct path to the logits: what later blocks read of a direction plays no part. A cap on the
    logits and their bias are left out, too.

    Raises:
        ValueError: for a model whose final norm has no gain.
    """
    bridge: Any = model
    norm = getattr(bridge, "ln_final", None)
    if getattr(norm, "weight", None) is None:
        raise ValueError("the metric takes the gain of the model's final norm, ln_final, and this model has none there")
    total, gram, count = torch.zeros(model.cfg.d_model, dtype=torch.float64), 0.0, bridge.W_U.shape[1]
    for part in bridge.W_U.split(8192, dim=1):
        folded = folded_in(norm, numbers_of(part))
        total, gram = total + folded.sum(dim=1), gram + folded @ folded.T
    mean = total / count
    return _whitening(gram / count - torch.outer(mean, mean), "causal inner product", stream_only=True)


def metric_of(unembedding: Float[Tensor, "vocab d"]) -> Metric:
    """The causal inner product of directions that rows of one's own, such as class vectors, read as `γᵀ h`.

    Raises:
        ValueError: for fewer than two rows, or rows that are all alike.
    """
    rows = tensor_of(unembedding, "unembedding").detach().cpu().double()
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"unembedding has shape {list(rows.shape)}, expected [vocab, d], two rows or more")
    centred = rows - rows.mean(dim=0)
    return _whitening(centred.T @ centred / len(rows), "causal inner product of rows", stream_only=False)


def _whitening(covariance: Float[Tensor, "d d"], name: str, *, stream_only: bool) -> Metric:
    """The metric `uᵀ covariance v`; of a LayerNorm the covariance has no length along what is centred away."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    some = values > values[-1] * len(values) * torch.finfo(torch.float64).eps * 10
    if not values[-1] > 0:
        raise ValueError("the rows of the unembedding are all alike: they tell no direction from another")
    return Metric(name, values[some].sqrt()[:, None] * vectors[:, some].T, stream_only)
