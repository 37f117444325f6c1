"""The page about other tools: its blocks run, one after the other, on a tiny model."""

import json
import re
from pathlib import Path

import stand_in
import torch
from safetensors.torch import save_file

PAGE = Path(__file__).parents[1] / "docs" / "other_tools.md"


def _autoencoder(folder, d, latents=24):
    """An SAE as sae-lens writes it, of the width of the model."""
    folder.mkdir(parents=True)
    cfg = {"architecture": "topk", "d_in": d, "d_sae": latents, "k": 4, "normalize_activations": "none"}
    told = {"metadata": {"hook_name": "blocks.8.hook_resid_post", "model_name": "tiny"}}
    (folder / "cfg.json").write_text(json.dumps(cfg | told))
    shapes = {"W_enc": (d, latents), "W_dec": (latents, d), "b_enc": (latents,), "b_dec": (d,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")


def test_the_blocks_run(monkeypatch, tmp_path, capsys):
    import reftlens as rl

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl, "load_model", stand_in.model)
    _autoencoder(tmp_path / "saes" / "layer_8", stand_in.D)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        assert not re.search(r"\._[a-z]|from reftlens", block), "public names only"
        exec(compile(block, str(PAGE), "exec"), names)
    assert "24 latents (top 4) of blocks.8.hook_resid_post" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"merged", "praise.gguf", "pyreft", "card"}
    assert (tmp_path / "runs" / "card" / "picture.png").is_file()
    assert names["table"].names == ("LoReFT", "latents 3 and 17")
