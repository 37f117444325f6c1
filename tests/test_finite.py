"""Numbers that are none end in an error that names where; what has no direction is refused, not filled with noise."""

import math

import pytest
import torch

from architectures import D, bridge, fresh_bridge

NAN = math.nan


def broken(vector=None):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.SteeringVector(D)})
    with torch.no_grad():
        for parameter in reft.parameters():
            parameter.fill_(NAN) if vector is None else parameter.copy_(vector)
    return reft


def data(model):
    import reftlens as rl

    return rl.encode(model, [rl.Example("the cat", " sat"), rl.Example("a dog", " ran")])


EDITED = {
    "evaluate": lambda rl, m: rl.evaluate(broken(), m, data(m), progress=False),
    "doses": lambda rl, m: rl.dose_response(broken(), m, data(m), [0.0, 1.0], progress=False),
    "effects": lambda rl, m: rl.effects(broken(), m, data(m), of="positions", progress=False),
    "greedy": lambda rl, m: rl.generate(broken(), m, ["the cat"], rl.Decoding(max_new_tokens=2)),
    "sampled": lambda rl, m: rl.generate(broken(), m, ["the cat"], rl.Decoding(max_new_tokens=2, temperature=1.0)),
    "beams": lambda rl, m: rl.generate(broken(), m, ["the cat"], rl.Decoding(max_new_tokens=2, beams=2)),
    "stream": lambda rl, m: list(rl.generation.stream(broken(), m, "the cat")),
    "in float16": lambda rl, m: rl.evaluate(
        broken(torch.full((D,), 1e6)), fresh_bridge("llama", dtype=torch.float16), data(m), progress=False
    ),
}


@pytest.mark.parametrize("call", EDITED)
def test_logits_that_are_no_numbers_are_named(call):
    import reftlens as rl

    with pytest.raises(rl.errors.NotFinite, match=r"the logits of .* at strength 1.*NaN or infinite numbers \(float"):
        EDITED[call](rl, bridge("llama"))


def test_activations_that_are_no_numbers_are_named():
    import reftlens as rl

    model = fresh_bridge("llama")
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[:] = NAN
    with pytest.raises(rl.errors.NotFinite, match=r"activations at blocks\.1\.hook_resid_post at First"):
        rl.activations(model, data(model), rl.resid_post(1, "first"))


def test_nothing_stores_them(tmp_path):
    import reftlens as rl

    with pytest.raises(rl.errors.NotFinite, match="vector"):
        rl.save(broken(), tmp_path / "edit", bridge("llama"))
    assert not (tmp_path / "edit").exists()


def test_a_dose_that_overflows_is_over_the_budget():
    import reftlens as rl

    model = fresh_bridge("llama", dtype=torch.float16)
    reft = broken(torch.randn(D, generator=torch.Generator().manual_seed(0)))
    doses = rl.strength.at_kl(0.01, {"vector": reft}, model, data(model), high=1e5, evaluations=30, progress=False)
    assert doses["vector"].strength < 1e4


X, LABELS = torch.randn(10, D, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 5)
BAD = torch.where(torch.arange(10)[:, None] == 3, NAN, X)
SAME = torch.ones(10, D)
LINE = torch.arange(10.0)[:, None] * X[:1]

GIVEN = {
    "difference of means": lambda rl, x: rl.directions.difference_of_means(x, LABELS),
    "PCA": lambda rl, x: rl.directions.pca(x, rank=2),
    "probe": lambda rl, x: rl.directions.linear_probe(x, LABELS),
    "LDA": lambda rl, x: rl.directions.lda(x, LABELS),
    "CAA": lambda rl, x: rl.directions.caa(x, SAME),
    "RepE": lambda rl, x: rl.directions.repe(x, SAME, rank=2),
    "mean ablation": lambda rl, x: rl.directions.mean_ablation(x),
    "vector": lambda rl, x: rl.SteeringVector(D, x[3]),
    "ablation": lambda rl, x: rl.Ablation(D, directions=x[2:4].T),
}


@pytest.mark.parametrize("method", GIVEN)
def test_inputs_that_are_no_numbers_are_named(method):
    import reftlens as rl

    with pytest.raises(rl.errors.NotFinite, match="NaN or infinite"):
        GIVEN[method](rl, BAD)
    GIVEN[method](rl, X)


@pytest.mark.parametrize("method", [name for name in GIVEN if name not in ("mean ablation", "vector")])
def test_what_does_not_vary_has_no_direction(method):
    import reftlens as rl

    with pytest.raises(ValueError, match=r"direction|differ|all the same|independent"):
        GIVEN[method](rl, SAME)


@pytest.mark.parametrize("method", ["PCA", "RepE"])
def test_more_directions_than_the_data_has_are_refused(method):
    import reftlens as rl

    x = LINE if method == "PCA" else SAME + LINE
    with pytest.raises(ValueError, match=r"differ along 1 direction\(s\), and 2 are to be taken"):
        GIVEN[method](rl, x)
