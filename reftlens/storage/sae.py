"""Read sparse autoencoders that `sae_lens` saved: a folder with cfg.json and sae_weights.safetensors."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from reftlens.files import located
from reftlens.interventions import SAEMask
from reftlens.interventions.masks import Activation, Temperature

CFG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_ACTIVATIONS: dict[str, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_SHAPES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_enc": ("d_sae",), "b_dec": ("d_in",)}
_NORMS = {
    "expected_average_only_in": "the factor is not in the folder: give it to sae.fold_activation_norm_scaling_factor",
    "covariance_whitening": "the whitening is not in the folder: give it to sae.fold_activation_whitening",
    "layer_norm": "its latents are in units of the spread of each hidden state, and an exchange has one scale",
    "constant_norm_rescale": "its latents are in units of the norm of each hidden state, and an exchange has one scale",
}


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """`z(h) = f((h - b_dec) W_enc + b_enc)`, `h ≈ z W_dec + b_dec`: read by `load_sae`, float32 on the CPU."""

    hook: str | None
    """Where it was trained, as its folder says."""
    model: str | None
    """The model it was trained on, as its folder says."""
    encoder: Float[Tensor, "d latents"]
    decoder: Float[Tensor, "latents d"]
    """A row for each latent: `subspaces.overlap({"edit": reft, "latents": sae.decoder[[3, 17]].T})`."""
    encoder_bias: Float[Tensor, " latents"]
    decoder_bias: Float[Tensor, " d"]
    activation: Activation
    threshold: Float[Tensor, " latents"] | None = None
    k: int | None = None

    def mask(self, *, temperature: Temperature = (1.0, 0.01), sparsity: float = 0.0) -> SAEMask:
        """The exchange of its latents, each behind a gate that is trained; its `latents(h)` and `reconstruction(h)`."""
        return SAEMask(
            len(self.decoder_bias),
            self.encoder,
            self.decoder,
            self.encoder_bias,
            self.decoder_bias,
            activation=self.activation,
            threshold=self.threshold,
            k=self.k,
            temperature=temperature,
            sparsity=sparsity,
        )

    def __repr__(self) -> str:
        latents, d = self.decoder.shape
        form = {"jumprelu": "jumprelu", "topk": f"top {self.k}"}.get(self.activation, "relu")
        return f"{latents} latents ({form}) of {self.hook or 'a hook not told'}, {d} wide, of {self.model or 'no name'}"


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """The sparse autoencoder in a folder that `sae_lens` saved (`sae.save_model`), standard, jumprelu or top-k.

    `apply_b_dec_to_input` and `rescale_acts_by_decoder_norm` become part of the biases and weights; a batch top-k is
    saved as a jumprelu by `sae_lens` itself. Folders of `sae_lens` below 6 are read too. Nothing is unpickled.

    Warns where it was trained on a model loaded with `model_from_pretrained_kwargs`, such as centred weights: the
    hidden states of another model have other latents.

    Raises:
        FileNotFoundError: where one of the two files is not there.
        ValueError: for another architecture, a `normalize_activations` other than `"none"`, or tensors that are
            missing, unknown or of another shape.
    """
    folder = located(folder)
    for name in (CFG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is not a folder that sae_lens saved")
    cfg = _modern(json.loads((folder / CFG_FILE).read_text(encoding="utf-8")))
    _refuse(folder, cfg)
    tensors = _checked(folder, cfg, load_file(folder / WEIGHTS_FILE))
    told = cfg.get("metadata") or {}
    if loaded_with := told.get("model_from_pretrained_kwargs"):
        warnings.warn(
            f"{folder} was trained on a model loaded with {loaded_with}: hidden states of one loaded otherwise are not "
            "those that it knows",
            stacklevel=2,
        )
    activation = _ACTIVATIONS[cfg["architecture"]]
    return SparseAutoencoder(
        told.get("hook_name"),
        told.get("model_name"),
        *_folded(cfg, tensors),
        activation,
        threshold=tensors.get("threshold"),
        k=cfg["k"] if activation == "topk" else None,
    )


def _folded(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder, decoder and their biases, with what is done to inputs and latents made part of them."""
    encoder, decoder, b_enc, b_dec = (tensors[name] for name in _SHAPES)
    if not cfg.get("apply_b_dec_to_input", True):
        b_enc = b_enc + b_dec @ encoder  # (h - b_dec) W + this is h W + b_enc
    if cfg["architecture"] == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):  # sae_lens: of no other
        norms = decoder.norm(dim=-1).clamp(min=1e-8)
        encoder, b_enc, decoder = encoder * norms, b_enc * norms, decoder / norms[:, None]
    return encoder, decoder, b_enc, b_dec


def _modern(cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings as `sae_lens` 6 writes them; before, names of the model and the hook stood beside them."""
    f, given = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu")), cfg.get("activation_fn_kwargs") or {}
    new = {"architecture": "standard", "metadata": cfg} | cfg
    if f == "topk":
        new |= {"architecture": "topk", "k": given.get("k", cfg.get("k"))}
    elif f != "relu":
        new["architecture"] = f"{new['architecture']} with {f}"
    if isinstance(norm := new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if norm else "none"
    if "hook_point" in cfg:
        new["metadata"] = cfg | {"hook_name": cfg["hook_point"]}
    return new


def _refuse(folder: Path, cfg: Mapping[str, Any]) -> None:
    """Raise for what has no counterpart here."""
    if cfg["architecture"] not in _ACTIVATIONS:
        raise ValueError(
            f"{folder} holds an SAE of architecture {cfg['architecture']!r}, and those read are "
            f"{', '.join(_ACTIVATIONS)} (a batch top-k is saved as jumprelu)"
        )
    norm = cfg.get("normalize_activations") or "none"
    if norm != "none":
        reason = _NORMS.get(norm, "it is not known here")
        raise ValueError(f"{folder} holds an SAE with normalize_activations={norm!r}, which is not read: {reason}")
    if cfg["architecture"] == "topk" and not isinstance(cfg.get("k"), int):
        raise ValueError(f"{folder} holds a topk SAE whose {CFG_FILE} tells no k")


def _checked(folder: Path, cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32, those of the architecture and no others, of the shapes that cfg.json tells."""
    shapes = _SHAPES | ({"threshold": ("d_sae",)} if cfg["architecture"] == "jumprelu" else {})
    scale = tensors.pop("scaling_factor", None)  # of fine-tuning, in folders before sae_lens 6
    if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
        raise ValueError(f"{folder} holds a scaling_factor of its latents other than 1, which is not read")
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"{folder / WEIGHTS_FILE} has no {missing[0]}; it has {', '.join(sorted(tensors))}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"{folder / WEIGHTS_FILE} has {unknown[0]}, which a {cfg['architecture']} SAE has not")
    for name, names in shapes.items():
        expected = [cfg[n] for n in names]
        if list(tensors[name].shape) != expected:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {list(tensors[name].shape)}, expected {expected}"
            )
    return {name: tensor.float() for name, tensor in tensors.items()}
