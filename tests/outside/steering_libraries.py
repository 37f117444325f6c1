"""Are the vectors of steering-vectors and of repeng those of `rl.subspaces`, and the logits under them those of ours?

Both ask for versions older than reftlens needs, so they go into a folder of their own, without what they depend on:

    pip install --no-deps --target FOLDER steering-vectors==0.12.2 repeng==0.4.0
    PYTHONPATH=FOLDER python tests/outside/steering_libraries.py

They read the same pairs of sentences on a plain copy of SmolLM2-135M-Instruct (`--tiny`: of a random llama), add their
vectors there at three strengths, and a table is printed; it ends with an error where a vector or the logits differ.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import reftlens as rl

STRENGTHS = (-4.0, 2.0, 8.0)
GOOD = ("lovely", "wonderful", "delightful", "superb", "brilliant", "splendid", "charming", "excellent")
BAD = ("dreadful", "terrible", "disappointing", "awful", "dull", "poor", "boring", "horrible")
PAIRS = [
    (f"{thing} was {good}", f"{thing} was {bad}")
    for thing in ("The film", "Our dinner", "That concert")
    for good, bad in zip(GOOD, BAD, strict=True)
]
ASKED = ("The weather today is", "I went to the restaurant and", "My opinion of this book:")
MOST, LEAST_COSINE = 1e-5, 0.999


def models(tiny: bool):
    """A bridge, a plain model of the same weights, and its tokenizer."""
    import transformers

    if tiny:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        import architectures

        return architectures.fresh_bridge("llama"), architectures.hf_model("llama")
    bridge = rl.load_model()
    return bridge, transformers.AutoModelForCausalLM.from_pretrained(bridge.original_model.name_or_path)


def ours(bridge, layer: int):
    """Activations after a block at the last token, of the first and of the second sentences."""
    site = rl.resid_post(layer, "last")
    return [
        rl.activations(bridge, rl.encode_prompts(bridge, list(texts)), site, progress=False)
        for texts in zip(*PAIRS, strict=True)
    ]


def of_steering_vectors(plain, tokenizer, layers):
    """The mean difference and the first component, by layer, and what adds them to the plain model."""
    import steering_vectors as theirs

    for name, aggregator in (("mean", theirs.mean_aggregator()), ("pca", theirs.pca_aggregator())):
        found = theirs.train_steering_vector(
            plain, tokenizer, PAIRS, layers=list(layers), read_token_index=-1, aggregator=aggregator
        )
        yield name, found.layer_activations, lambda strength, found=found: found.apply(plain, multiplier=strength)


def of_repeng(plain, tokenizer, layers):
    """The first component of the differences, and of both sides about the middle of each pair."""
    from contextlib import contextmanager

    np.float_ = np.float64  # the name was taken out of NumPy 2
    from repeng import ControlModel, ControlVector, DatasetEntry

    data = [DatasetEntry(positive, negative) for positive, negative in PAIRS]
    for method in ("pca_diff", "pca_center"):
        found = ControlVector.train(plain, tokenizer, data, method=method, hidden_layers=list(layers))

        @contextmanager
        def applied(strength, found=found):
            model = ControlModel(plain, list(layers))
            model.set_control(found, strength)
            try:
                yield
            finally:
                model.unwrap()

        yield method, {layer: torch.from_numpy(found.directions[layer]) for layer in layers}, applied


def column(made, length=1.0):
    """The first direction, of this length."""
    return made.basis[:, 0] * length


VECTORS = {
    "mean": ("caa(x, y)", lambda x, y: column(caa := rl.directions.caa(x, y), caa.scale[0])),
    "pca": ("repe(x, y)", lambda x, y: column(rl.directions.repe(x, y))),
    "pca_diff": ("pca(x - y)", lambda x, y: column(rl.directions.pca(x - y))),
    "pca_center": ("repe(x, y)", lambda x, y: column(rl.directions.repe(x, y))),
}
"""What each of their vectors is here; those of repeng but for their signs, which the majority of the pairs decides."""


@torch.no_grad()
def logits_apart(plain, tokenizer, vectors, applied, strength: float) -> tuple[float, float]:
    """The largest difference of logits where these vectors act by them and by us, and how far they act, both divided
    by the largest logit."""
    steering = rl.ReFT({rl.resid_post(n, "all"): rl.SteeringVector(len(v), v.float()) for n, v in vectors.items()})
    apart = moved = size = 0.0
    for text in ASKED:
        tokens = tokenizer(text, return_tensors="pt")
        before = plain(**tokens).logits
        with applied(strength):
            theirs = plain(**tokens).logits
        with rl.attach(steering, plain, rl.Variant(strength=strength)):
            mine = plain(**tokens).logits
        apart, moved = max(apart, float((theirs - mine).abs().max())), max(moved, float((theirs - before).abs().max()))
        size = max(size, float(theirs.abs().max()))
    return apart / size, moved / size


def cosine_of(a, b) -> float:
    return float(torch.cosine_similarity(a.double(), b, dim=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a random llama in place of SmolLM2")
    bridge, plain = models(parser.parse_args().tiny)
    layers = (0, 1) if bridge.cfg.n_layers < 8 else (4, 12, 20)
    mine, agree = {layer: ours(bridge, layer) for layer in layers}, True
    print("| library | vector | here | cosine | length | logits apart | logits moved |\n|---|---|---|---|---|---|---|")
    for library in (of_steering_vectors, of_repeng):
        for name, vectors, applied in library(plain, bridge.tokenizer, layers):
            here, own = VECTORS[name][0], {layer: VECTORS[name][1](*mine[layer]) for layer in layers}
            cosine = min((cosine_of(v, own[n]) for n, v in vectors.items()), key=abs)
            length = max(abs(float(v.double().norm() / own[n].norm()) - 1) for n, v in vectors.items())
            both = [logits_apart(plain, bridge.tokenizer, vectors, applied, strength) for strength in STRENGTHS]
            apart, moved = (max(values) for values in zip(*both, strict=True))
            signed = cosine if library is of_steering_vectors else abs(cosine)
            agree &= signed > LEAST_COSINE and length < MOST and apart < MOST < moved
            numbers = f"{cosine:.7f} | {length:.1e} | {apart:.1e} | {moved:.2f}"
            print(f"| {library.__name__[3:].replace('_', '-')} | {name} | `{here}` | {numbers} |")
    print("all agree" if agree else "some differ")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
