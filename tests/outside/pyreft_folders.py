"""Does pyreft 0.1.0 load what `rl.storage.save_pyreft` writes, and compute the same logits?

pyreft pins old dependencies, so it gets an environment of its own (Python 3.11), without reftlens:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 transformers==4.57.6 datasets matplotlib
    peers/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    .venv/bin/python tests/outside/pyreft_folders.py write FOLDER
    peers/bin/python tests/outside/pyreft_folders.py read FOLDER

The first writes tiny random models, a folder of every class on each with four edits (block output, block input, MLP and
attention output; first, last and both tokens), once as it is and once with `W`, `W2` and `b` rounded to bfloat16, and
our logits; `--smollm2` takes SmolLM2-135M-Instruct beside them. The second loads the folders in pyreft, compares and
prints a table; it ends with an error where the rounded ones differ by more than 1e-5 of the largest logit.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KINDS = {
    "LoReFT": "Loreft",
    "DiReFT": "Nodireft",
    "OrthoDiReFT": "Direft",
    "NoReFT": "Noreft",
    "ConsReFT": "Consreft",
    "LobiReFT": "Lobireft",
}
WITHOUT_LOAD = ("NoReFT", "DiReFT")
"""`ReftModel.load` makes neither: their classes want an `add_bias` that no folder holds."""
ROWS, TOKENS, MOST = 3, 11, 1e-5


# -- here ----------------------------------------------------------------------------------------------------


def models(smollm2):
    """Bridges by name, each with its plain model."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import transformers

    import architectures
    import reftlens as rl

    found = {name: (architectures.fresh_bridge(name), architectures.hf_model(name)) for name in ("gpt2", "llama")}
    if smollm2:
        model = rl.load_model()
        found["smollm2"] = model, transformers.AutoModelForCausalLM.from_pretrained(model.original_model.name_or_path)
    return found


def edited(kind, model):
    """Four edits, large enough to be seen, as training leaves them."""
    import reftlens as rl

    d, make = model.cfg.d_model, getattr(rl, kind, None) or getattr(rl.interventions, kind)
    last = model.cfg.n_layers - 1
    sites = (rl.resid_post(0, "f1+l1"), rl.resid_pre(1, "first"), rl.mlp_out(1, "last"), rl.attn_out(last, "f1+l1"))
    reft = rl.ReFT({site: make(d, 4) for site in sites})
    reft.reset(seed=0)
    with torch.no_grad():
        for p in reft.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    reft.settle()
    return reft.eval()


@torch.no_grad()
def rounded(reft):
    """A copy with the numbers that pyreft's loader makes of `W`, `W2` and `b`."""
    copy = reft.clone()
    for module in copy.distinct:
        for name in ("W", "W2", "b") if hasattr(module, "W") else ():
            if hasattr(module, name):
                getattr(module, name).copy_(getattr(module, name).bfloat16().float())
    return copy


@torch.no_grad()
def write(folder, smollm2):
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    for name, (model, plain) in models(smollm2).items():
        at = folder / name
        ids = torch.randint(5, 300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
        batch = batch_from_rows(ids.tolist(), [[int(TokenRole.PROMPT)] * TOKENS] * ROWS)
        logits = {"ids": ids, "base": model(batch.tokens)}
        for kind in KINDS:
            reft = edited(kind, model)
            for label, each in (("as_it_is", reft), ("rounded", rounded(reft))):
                rl.storage.save_pyreft(each, at / kind / label, model)
                with each.on(model, batch):
                    logits[f"{kind}.{label}"] = model(batch.tokens)
        save_file({key: value.contiguous() for key, value in logits.items()}, at / "logits.safetensors")
        plain.save_pretrained(at / "model")
        print(f"{name}: {len(KINDS)} classes in {at}")


# -- where pyreft is -----------------------------------------------------------------------------------------


def plain_model(folder):
    """The model of the folder, where transformers 4 reads what transformers 5 wrote."""
    import transformers

    told = json.loads((folder / "config.json").read_text())
    theta = told.get("rope_parameters", {}).get("rope_theta")
    config = transformers.AutoConfig.from_pretrained(folder)
    if theta is not None:
        config.rope_theta = theta
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def loaded(folder, kind, model):
    """What pyreft makes of a folder: its own `load`, and where that cannot, the classes made and filled by hand."""
    import pyreft

    if kind not in WITHOUT_LOAD:
        return pyreft.ReftModel.load(str(folder), model)
    try:
        pyreft.ReftModel.load(str(folder), model)
    except KeyError as error:
        assert "add_bias" in str(error)
    else:
        raise SystemExit(f"pyreft now loads {kind} by itself: take it out of WITHOUT_LOAD")
    told = json.loads((folder / "config.json").read_text())
    make, d = getattr(pyreft, f"{KINDS[kind]}Intervention"), told["intervention_dimensions"][0]
    places = [
        {
            "layer": layer,
            "component": component,
            "low_rank_dimension": rank,
            "intervention": make(embed_dim=d, low_rank_dimension=rank, add_bias=False),
        }
        for layer, component, _, _, rank, *_ in told["representations"]
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places), set_device=False)
    for key, module in reft.interventions.items():
        module.load_state_dict(torch.load(folder / f"intkey_{key}.bin"))
    return reft


@torch.no_grad()
def read(folder):
    worst = 0.0
    print("| model | class | loaded by | rounded to bfloat16 | as it is | edit |\n|---|---|---|---|---|---|")
    for at in sorted(p for p in folder.iterdir() if p.is_dir()):
        ours = load_file(at / "logits.safetensors")
        ids = ours["ids"]
        base = plain_model(at / "model")(ids).logits
        scale = ours["base"].abs().max()
        assert (base - ours["base"]).abs().max() < MOST * scale, "the plain models differ"
        both, first, last = [[0, TOKENS - 1]] * ROWS, [[0]] * ROWS, [[TOKENS - 1]] * ROWS
        locations = {"sources->base": (None, [both, first, last, both])}
        for kind in KINDS:
            differences = {}
            for label in ("rounded", "as_it_is"):
                reft = loaded(at / kind / label, kind, plain_model(at / "model"))
                for module in reft.interventions.values():
                    module.float().eval()  # bfloat16 beside a float32 model fails in LoReFT
                logits = reft({"input_ids": ids}, unit_locations=locations)[1].logits
                differences[label] = ((logits - ours[f"{kind}.{label}"]).abs().max() / scale).item()
            moved = ((ours[f"{kind}.as_it_is"] - ours["base"]).abs().max() / scale).item()
            by = "by hand" if kind in WITHOUT_LOAD else "ReftModel.load"
            shown = [f"{differences[label]:.1e}" for label in ("rounded", "as_it_is")]
            print("|", " | ".join([at.name, kind, by, *shown, f"{moved:.2f}"]), "|")
            worst = max(worst, differences["rounded"])
    print(f"\nlargest difference of the rounded ones: {worst:.1e} of the largest logit")
    if not worst < MOST:
        raise SystemExit(f"expected below {MOST:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smollm2", action="store_true")
    told = parser.parse_args()
    write(told.folder, told.smollm2) if told.what == "write" else read(told.folder)
