"""Control vectors in GGUF: constants that llama.cpp adds to the residual stream of every token.

Its tensor `direction.N` is added to what block `N` gives, from block 1 on: that is `resid_post(N)`. llama.cpp reads a
width and float32 numbers, nothing else; the model is for people to know.
"""

import re
import tempfile
from pathlib import Path
from typing import SupportsFloat

import torch
from torch import Tensor

from reftlens.bridge.fingerprint import weights_processed
from reftlens.bridge.protocol import Bridge, underlying
from reftlens.editing.bound import Place
from reftlens.editing.preflight import preflight
from reftlens.editing.reft import ReFT, check_types, training_mode
from reftlens.editing.variant import Variant
from reftlens.files import destination, write_atomically
from reftlens.storage.merge import affine_map
from reftlens.text.positions import All, Positions
from reftlens.text.positions.base import Union

_BLOCK_OUTPUT = re.compile(r"blocks\.(\d+)\.hook_out")


def save_control_vector(reft: ReFT, path: str | Path, model: Bridge, *, variant: Variant | SupportsFloat = 1.0) -> Path:
    """Write what `reft` adds to the residual stream as a control vector for llama.cpp; returns the path.

    `direction.N` is the sum of the constants at `resid_post(N)`: of steering vectors, `LobiReFT`, noise, and of any
    other kind where the edit is `h' = h + c`, strength included. `llama-cli -m MODEL.gguf --control-vector FILE` adds
    them to every token, in every layer that has one (`--control-vector-layer-range 1 40` adds those of these layers,
    both ends included). A strength can be chosen there as well, as `--control-vector-scaled` multiplies the constants.

    Args:
        model: the bridge that `reft` is for.
        variant: how strongly, and which sites.

    Raises:
        ValueError: for what llama.cpp could not say: a place other than `resid_post(N)` with `N >= 1`, positions other
            than all tokens, an edit that is no constant, or a bridge whose weights TransformerLens has processed.
    """
    check_types(reft, model)
    if weights_processed(model):
        raise ValueError(
            "TransformerLens has processed the weights of this model (compatibility mode), so its residual stream is "
            "not that of the GGUF file: export on a bridge without that"
        )
    variant = variant if isinstance(variant, Variant) else Variant(variant)
    if variant.among not in (None, All()):
        raise ValueError(f"{variant} edits some tokens only, and llama.cpp adds a control vector to every token")
    path = destination(path)
    preflight(reft, model)
    vectors: dict[int, Tensor] = {}
    places = reft.bind(model)
    with torch.no_grad(), training_mode(reft, training=False):
        for i in variant.active(reft.sites):
            block, constant = _block(places[i]), _constant(places[i], variant)
            vectors[block] = vectors[block] + constant if block in vectors else constant
    write_atomically(path, _gguf({f"direction.{block}": vectors[block] for block in sorted(vectors)}, model))
    return path


def _block(place: Place) -> int:
    """`N` of `resid_post(N)` at all tokens."""
    site, match = place.site, _BLOCK_OUTPUT.fullmatch(place.point.name or "")
    if match is None:
        raise ValueError(
            f"{site.hook} is not the output of a block, where llama.cpp adds control vectors: use resid_post(N, 'all')"
        )
    if int(match[1]) == 0:
        raise ValueError(f"{site.hook} is the output of block 0, and llama.cpp adds control vectors from block 1 on")
    if not _everywhere(site.positions):
        raise ValueError(
            f"the edit at {site.hook} acts at {site.positions}, and llama.cpp adds a control vector to every token: "
            "train it at All()"
        )
    return int(match[1])


def _everywhere(positions: Positions) -> bool:
    """Whether all tokens are chosen, also as `reft | reft` writes it for a second edit of one place."""
    if isinstance(positions, Union):
        return _everywhere(positions.left) or _everywhere(positions.right)
    return positions == All()


def _constant(place: Place, variant: Variant) -> Tensor:
    """`c` of `h' = h + c`, in float64 on the CPU."""
    module, hook = place.intervention, place.site.hook
    what = f"{module.kind} at {hook} is no constant"
    if not module.affine:
        raise ValueError(f"{what}: what it adds depends on the hidden state, and a control vector adds the same always")
    matrix, constant = affine_map(hook, module, place.strength(variant))
    changed = (matrix - torch.eye(module.d, dtype=matrix.dtype, device=matrix.device)).abs().max().item()
    if changed > 1e-9:
        raise ValueError(
            f"{what}: it adds h A + c with entries of A up to {changed:.2g}, and a control vector adds c alone"
        )
    return constant.cpu()


def _gguf(tensors: dict[str, Tensor], model: Bridge) -> bytes:
    """The file, with the keys that llama.cpp's own generator and `repeng` write."""
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ModuleNotFoundError("control vectors are written by the package gguf: pip install gguf") from None
    config = getattr(underlying(model), "config", None)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vector.gguf"
        writer = GGUFWriter(file, "controlvector")
        writer.add_string("controlvector.model_hint", str(getattr(config, "model_type", model.cfg.model_name)))
        writer.add_uint32("controlvector.layer_count", len(tensors))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()
