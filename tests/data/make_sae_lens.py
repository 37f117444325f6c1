"""Make the SAEs that `tests/test_sae.py` reads: sae-lens saves them, and says what they give.

sae-lens needs TransformerLens 3, so it gets an environment of its own (Python 3.11):

    python -m venv saes
    saes/bin/pip install torch==2.13.0 "transformer-lens<4" sae-lens==6.54.12
    saes/bin/python tests/data/make_sae_lens.py

Every SAE is 16 wide with 64 latents, its weights drawn from a fixed seed. Beside this file it writes one folder for
each, `sae_lens_<name>` with `cfg.json` and `sae_weights.safetensors` as sae-lens writes them, and
`sae_lens_outputs.safetensors`: the inputs `h` [12, 16], and `<name>.latents` [12, 64] and `<name>.output` [12, 16].
"""

import shutil
from pathlib import Path

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
D, LATENTS, ROWS = 16, 64, 12
SIZE = {"d_in": D, "d_sae": LATENTS}


@torch.no_grad()
def drawn(sae, seed):
    """The SAE with weights away from its start, decoder rows of unlike length, and no bias that is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / D**0.5)
        if name == "threshold":
            parameter.copy_(0.3 * torch.rand(parameter.shape, generator=generator) + 0.1)
        if name == "W_dec":
            parameter.mul_(torch.rand(LATENTS, 1, generator=generator) + 0.5)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "tiny", "blocks.1.hook_resid_post"
    return sae


def batch_topk():
    """Trained with a top k over the whole batch, saved for inference as a jumprelu."""
    sae = drawn(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZE, k=6)), 4)
    sae.topk_threshold.fill_(0.4)
    return sae


SAES = {
    "standard": lambda: drawn(StandardSAE(StandardSAEConfig(**SIZE)), 0),
    "standard_raw_input": lambda: drawn(StandardSAE(StandardSAEConfig(**SIZE, apply_b_dec_to_input=False)), 1),
    "jumprelu": lambda: drawn(JumpReLUSAE(JumpReLUSAEConfig(**SIZE)), 2),
    "topk": lambda: drawn(TopKSAE(TopKSAEConfig(**SIZE, k=6, rescale_acts_by_decoder_norm=True)), 3),
    "batchtopk": batch_topk,
}


@torch.no_grad()
def main():
    h = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(9))
    outputs = {"h": h}
    for name, make in SAES.items():
        folder = HERE / f"sae_lens_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        sae = make()
        (sae.save_inference_model if hasattr(sae, "save_inference_model") else sae.save_model)(folder)
        sae = SAE.load_from_disk(folder)  # what a user of sae-lens gets
        outputs |= {f"{name}.latents": sae.encode(h), f"{name}.output": sae(h)}
        print(f"{folder.name}: {type(sae).__name__}, {(outputs[f'{name}.latents'] > 0).sum(dim=1).tolist()} active")
    save_file({key: value.contiguous() for key, value in outputs.items()}, HERE / "sae_lens_outputs.safetensors")


if __name__ == "__main__":
    main()
