"""What a trained subspace is compared with: placebos, answers that mean nothing, directions, a model never trained."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import arbitrary_targets

from reftlens.analysis.subspaces.directions import Direction
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.interventions.interchange import Exchange
from reftlens.interventions.subspace import orthonormal
from reftlens.numbers import seeded, whole
from reftlens.text.batch import Batch


class Placebo(Exchange):
    """An exchange in a random subspace that moves each vector exactly as far as the trained one does.

    `h' = h + strength · (away R) Rᵀ · ‖away M‖ / ‖away R‖` with `away = source - h`, `M` what the trained one moves
    along (its basis, each column times its gate where it has gates), `R` a random basis of the rank that was trained
    or learned. What it also reaches comes from moving that far.
    """

    kind = "Placebo"

    def __init__(self, movement: Float[Tensor, "d columns"], rank: int, seed: int) -> None:
        super().__init__(movement.shape[0], rank)
        generator = seeded(seed)
        drawn = torch.randn(self.d, self.rank, generator=generator, dtype=torch.float64)
        self.register_buffer("movement", movement.detach().float())
        self.register_buffer("drawn", orthonormal(drawn).float().to(movement.device))

    def exchanged(self, h: Tensor, basis: Tensor | None, away: Tensor) -> Tensor:
        assert basis is not None
        theirs, mine = away[..., 0, :] @ self.get_buffer("movement").to(h.dtype), away[..., 0, :] @ basis
        return mine * theirs.norm(dim=-1, keepdim=True) / mine.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    def basis(self) -> Tensor:
        return self.get_buffer("drawn")

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "rank": self.rank}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Nothing is trained, so nothing changes."""


def relabelled(data: Batch, classes: Int[Tensor, " classes"], seed: int) -> Batch:
    """`data` with another answer for each row: one of `classes`, drawn by a hash of its source prompt."""
    counts = data.target_mask.sum(dim=1)
    if bool((counts != 1).any()):
        row = int((counts != 1).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(counts[row])} target tokens, and controls relabel one: encode(…, end=False), "
            "or only the first token of each answer, pairs.encode(model, first_token=True)"
        )
    source = data.sources["source"]
    tokens, mask = source.batch.tokens, source.batch.attention_mask
    prompts = [tuple(tokens[row][mask[row]].tolist()) for row in source.rows.tolist()]
    drawn = arbitrary_targets(prompts, len(classes), seed)
    tokens = data.tokens.clone()
    tokens[data.target_mask] = classes[drawn].to(tokens)
    return replace(data, tokens=tokens)


def untrained_copy(model: Bridge, seed: int) -> Any:
    """A bridge of the same architecture with weights drawn as the architecture draws them, never trained."""
    from transformer_lens.model_bridge import TransformerBridge

    original: Any = model.original_model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(whole(seed, "seed"))
        network = type(original)(deepcopy(original.config))
    dtype, device = next(original.parameters()).dtype, device_of(model)
    network = network.to(device, dtype).eval()
    return TransformerBridge.boot_transformers(
        model.cfg.model_name, hf_model=network, tokenizer=model.tokenizer, device=str(device), dtype=dtype
    ).eval()


def filled_up(means: Direction, components: Direction) -> Direction:
    """The first columns of `means`, as many as `components`; where there are too few, filled up with those."""
    rank, basis = components.basis.shape[1], means.basis
    missing = rank - basis.shape[1]
    if missing <= 0:
        return replace(means, basis=basis[:, :rank], scale=means.scale[:rank])
    left = components.basis - basis @ (basis.T @ components.basis)
    more = torch.linalg.svd(left, full_matrices=False).U[:, :missing]
    return replace(means, basis=orthonormal(torch.cat([basis, more], dim=1)), scale=means.scale.new_ones(rank))
