"""Regenerate `pyvene_functions.safetensors`: what pyvene's exchanges answer, and the weights they had.

It runs the real classes of pyvene 0.1.8 in float32 on a CPU with fixed seeds, in the environment that the docstring of
`make_pyreft_reference.py` describes:

    peers/bin/python tests/reference/make_pyvene_reference.py

Boundless DAS is not among them: it fails for more than one row inside a model, and here its gate has two edges.
"""

from pathlib import Path

import pyvene
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
DIM, ROWS, RANKS = 24, 5, (1, 4, 12)


def drawn(seed):
    """Base, source, and weights for a sum over the output, whose gradient is stored too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, ROWS, DIM, generator=generator)


def low_rank(rank):
    torch.manual_seed(rank)
    module = pyvene.LowRankRotatedSpaceIntervention(embed_dim=DIM, low_rank_dimension=rank).eval()
    base, source, weight = drawn(100 + rank)
    base.requires_grad_()
    out = module(base, source)
    (gradient,) = torch.autograd.grad((out * weight).sum(), base)
    return dict(base=base, source=source, weight=weight, out=out, gradient=gradient, R=module.rotate_layer.weight)


@torch.no_grad()
def sigmoid_mask(name, logits, temperature):
    """The gates spread out, so that some directions are open, some shut and some half open."""
    torch.manual_seed(0)
    module = getattr(pyvene, name)(embed_dim=DIM).eval()
    module.set_temperature(torch.tensor(temperature))
    gates = dict(module.named_parameters())[logits]
    gates.copy_(temperature * torch.linspace(-4, 4, DIM))
    base, source, _ = drawn(200)
    found = {"base": base, "source": source, "out": module(base.clone(), source.clone()), logits: gates}
    if hasattr(module, "rotate_layer"):
        found["R"] = module.rotate_layer.weight
    return found | {"temperature": module.get_temperature()}


def main():
    made = {f"LowRankRotatedSpaceIntervention.{rank}": low_rank(rank) for rank in RANKS}
    made["SigmoidMaskIntervention"] = sigmoid_mask("SigmoidMaskIntervention", "mask", 0.5)
    made["SigmoidMaskRotatedSpaceIntervention"] = sigmoid_mask("SigmoidMaskRotatedSpaceIntervention", "masks", 50.0)
    tensors = {f"{k}.{key}": v.detach().clone().contiguous() for k, found in made.items() for key, v in found.items()}
    save_file(tensors, HERE / "pyvene_functions.safetensors")


if __name__ == "__main__":
    main()
