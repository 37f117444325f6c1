"""Collect hidden states at a site: what mean ablation, fixed directions and many analyses start from."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from reftlens.data import Batch
from reftlens.engine import forward, hooked, token_vectors
from reftlens.model import Bridge, check_deterministic, device_of, resolve_hook
from reftlens.site import Site


@dataclass
class _Reader:
    """Keeps the hidden states that pass through a hook."""

    kept: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, hook: HookPoint) -> None:
        self.kept.append(h)


@torch.no_grad()
def activations(
    model: Bridge, data: Batch, site: Site, *, batch_size: int = 16, progress: bool = True
) -> Float[Tensor, "tokens d"]:
    """Hidden states of the unedited model at the positions of `site`, row by row, on the CPU in float32 or wider.

    Chosen heads of one token are joined to one vector, as an intervention at the site would see them.
    """
    check_deterministic(model)
    point, device = resolve_hook(model, site.hook), device_of(model)
    collected = []
    with tqdm(total=len(data), desc="activations", unit="example", disable=not progress) as bar:
        for start in range(0, len(data), batch_size):
            batch = data[start : start + batch_size].to(device)
            reader = _Reader()
            with hooked([(point, reader)]):
                forward(model, batch.tokens, batch.attention_mask)
            if len(reader.kept) != 1:
                raise ValueError(f"{site.hook} fired {len(reader.kept)} times in one forward pass, expected once")
            h = token_vectors(reader.kept[0], site.heads, site.hook)[site.positions.mask(batch.view)]
            collected.append(h.to("cpu", torch.promote_types(h.dtype, torch.float32)))
            bar.update(len(batch))
    result = torch.cat(collected)
    if not len(result):
        raise ValueError(f"{site} chooses no token in any of {len(data)} row(s)")
    return result
