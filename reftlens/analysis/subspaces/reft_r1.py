"""ReFT-r1: a direction that is trained to detect a concept and to write it, from two sets of examples."""

import torch

from reftlens.analysis.subspaces.directions import Direction
from reftlens.bridge.protocol import Bridge
from reftlens.cone.reuse import Reuse
from reftlens.editing.activations import activations
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.interventions.pooled import ReFTr1
from reftlens.text.batch import Batch, join
from reftlens.training.config import FitConfig
from reftlens.training.fitting import run_fit

_CONFIG = FitConfig(epochs=3, lr=1e-2, batch_size=6)


def reft_r1(
    model: Bridge,
    positive: Batch,
    negative: Batch,
    site: Site,
    *,
    k: int = 8,
    sparsity: float = 5e-3,
    config: FitConfig = _CONFIG,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Direction:
    """Train `ReFTr1` at `site` on examples with a concept and without (AxBench, Wu et al. 2025, arXiv 2501.17148).

    Its scale is the largest `relu(h·w + b)` at the positive examples, the unit of strength of that benchmark, and its
    `threshold` is `-b`: `relu(x @ basis - threshold)` says how much of the concept is in activations `x`. The default
    settings are the benchmark's.

    Args:
        positive: prompts about the concept, with completions that show it.
        negative: prompts and completions without it.

    Raises:
        ValueError: for a site that reaches past the prompt, as `fit`, and where nothing in the positive examples
            excites the direction.
    """
    x = activations(model, positive, site, progress=False)
    module = ReFTr1(x.shape[1], k=k, sparsity=sparsity, generator=torch.Generator().manual_seed(config.seed))
    reft = ReFT({site: module})
    run_fit(reft, model, join([positive, negative]), config, reuse=Reuse.of(reuse), progress=progress)
    with torch.no_grad():
        largest = module.cpu().latents(x).max().double()
    if largest == 0:
        raise ValueError("the trained direction is not excited by any positive example: train longer, or elsewhere")
    return Direction("ReFT-r1", module.frame().detach().double(), largest[None], -module.b.item())
