"""Numbers of numpy, torch and pandas: what is true of an `int` is true of them, and a mask is never read as numbers."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError

import architectures as A
import reftlens as rl
from reftlens import interventions, positions
from reftlens.analysis.causal.permutation import shuffled_p
from reftlens.analysis.strength.texts import repetition
from reftlens.scoring.comparison import pieces

D = A.D
MASK = [True, False, True, False, False, False]
try:
    positions.Last(np.int64(1))
    checked = False
except TypeCheckError:
    checked = True
pytestmark = pytest.mark.skipif(checked, reason="shapes and types are checked at every call, and refused before")
KINDS = [np.int64, np.int32, np.uint8, torch.tensor]


@pytest.fixture
def rows(llama):
    return rl.encode(llama, [rl.Example(f"the cat sat {i}", " over the hill") for i in range(6)])


def chosen(batch):
    return [int(example.prompt[-1]) for example in batch.examples]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (MASK, [0, 2]),
        (np.array(MASK), [0, 2]),
        (torch.tensor(MASK), [0, 2]),
        (pd.Series(MASK, index=list("fedcba")), [0, 2]),
        (pd.array(MASK, dtype="boolean"), [0, 2]),
        ([False] * 6, []),
        ([True] * 6, [0, 1, 2, 3, 4, 5]),
        (np.array([1, 0]), [1, 0]),
        (torch.tensor([-1, 1, 1]), [5, 1, 1]),
        (pd.Series([4, 2], index=[9, 8]), [4, 2]),
        (pd.Index([3]), [3]),
        (range(4, 0, -2), [4, 2]),
        (iter([2, 3]), [2, 3]),
        (np.int64(-2), [4]),
        (torch.tensor(3), [3]),
        (slice(np.int64(1), torch.tensor(3)), [1, 2]),
        ([], []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_are_chosen_by_number_or_by_mask(rows, choice, expected):
    assert chosen(rows[choice]) == expected


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ([True, False], r"a mask of 2 for 6 rows"),
        (np.ones(7, bool), r"a mask of 7 for 6 rows"),
        ([True, 2], "row=True, expected a whole number"),
        (True, "row=True, expected a whole number"),
        (np.bool_(False), "row=.*False.*, expected a whole number"),
        ([0.0, 1.0], "row=0.0, expected a whole number"),
        (np.array([[0, 1]]), r"row=\[0, 1\], expected a whole number"),
        ("ab", "row='ab', expected a whole number"),
        ([0, 6], "no row 6, there are 6"),
        (np.int64(-7), "no row -7, there are 6"),
    ],
    ids=repr,
)
def test_what_chooses_no_rows_is_refused(rows, choice, error):
    with pytest.raises((TypeError, ValueError, IndexError), match=error):
        rows[choice]


@pytest.mark.parametrize("n", KINDS)
def test_places_sites_kinds_and_settings_hold_plain_integers(n):
    """They are equal to those of an `int`, and can be written as JSON."""
    for make in (
        lambda n: rl.resid_post(n(1), positions.Last(n(2))).to_dict(),
        lambda n: rl.attn_z(n(2), positions.First(n(2)) | [n(3)], heads=n(1)).to_dict(),
        lambda n: rl.attn_k(n(2), n(3), heads=[n(1), n(0)]).to_dict(),
        lambda n: rl.mlp_post(n(0), positions.At(n(1), n(4)) - positions.Nth(n(1))).to_dict(),
        lambda n: rl.LoReFT(n(D), rank=n(2)).settings(),
        lambda n: rl.DiReFT(n(D), n(2)).settings(),
        lambda n: rl.SteeringVector(n(D)).settings(),
        lambda n: rl.Ablation(n(D), rank=n(3)).settings(),
        lambda n: rl.DAS(n(D), n(2)).settings(),
        lambda n: rl.DAS(n(D), variables={"a": n(2), "b": n(1)}).settings(),
        lambda n: rl.Interchange(n(D)).settings(),
        lambda n: interventions.Noise(n(D), n(1), seed=n(2)).settings(),
        lambda n: interventions.ReFTr1(n(D), k=n(4)).settings(),
        lambda n: interventions.BoundlessDAS(n(D), n(5)).settings(),
        lambda n: interventions.MaskedDAS(n(D), n(5)).settings(),
        lambda n: interventions.SigmoidMask(n(D), rank=n(5)).settings(),
        lambda n: interventions.SAEMask(n(D), latents=n(5)).settings(),
        lambda n: vars(rl.FitConfig(epochs=n(3), steps=n(4), batch_size=n(2), seed=n(5))),
        lambda n: vars(rl.Decoding(max_new_tokens=n(3), beams=n(2), no_repeat_ngram=n(2), seed=n(1))),
        lambda n: vars(rl.Variant(sites=[n(1), n(0)])),
        lambda n: vars(rl.training.Reuse(buckets=n(2))),
    ):
        assert json.dumps(make(n)) == json.dumps(make(int))


def test_places_in_arrays_are_places():
    for many in (np.array, torch.tensor, pd.Series):
        assert rl.resid_post(1, many([1, 2])).positions == positions.At(1, 2) == positions.At(many([2, 1]))
        assert rl.attn_z(1, "last", heads=many([2, 0])).heads == (2, 0)
        assert rl.Variant(sites=many([1])).sites == (1,)
        assert rl.Variant(many([0.5, 2.0])).strength == (0.5, 2.0)


def test_a_strength_is_a_number():
    assert [rl.Variant(x).strength for x in (1, np.float32(0.5), torch.tensor(2.0), [1])] == [1.0, 0.5, 2.0, (1.0,)]
    for wrong in ("half", True, ["half"], [None]):
        with pytest.raises(TypeError, match=r"strength=.*, expected a number"):
            rl.Variant(wrong)


@pytest.mark.parametrize("n", [*KINDS, int])
def test_seeds_of_every_kind_draw_the_same(n, llama, rows):
    def weights(reft):
        return torch.cat([p.flatten() for p in reft.parameters()])

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, rank=2)})
    reft.reset(n(3))
    copy = reft.seeds(np.array([1, 3]))["seed 3"]
    assert type(copy.seed) is int and torch.equal(weights(copy), weights(reft))
    assert torch.equal(rows.resampled(n(3)).sources["source"].rows, rows.resampled(3).sources["source"].rows)
    assert reft[n(0)] is reft[0]
    sampled = [rl.generate(reft, llama, ["the"], rl.Decoding(4, 1.0, top_k=m(5), seed=m(3))) for m in (n, int)]
    assert sampled[0].ids == sampled[1].ids


def test_what_was_trained_with_numbers_of_numpy_is_saved(tmp_path, llama, rows):
    reft = rl.ReFT({rl.resid_post(np.int64(1), positions.Last(np.int64(2))): rl.LoReFT(D, rank=np.int64(2))})
    lr = np.float32(0.5)
    run = rl.fit(reft, llama, rows, steps=np.int64(2), lr=lr, batch_size=np.int64(2), seed=np.int64(1), progress=False)
    rl.save(reft, tmp_path, llama, run=run)
    assert rl.load(tmp_path, llama).sites == reft.sites
    assert rl.storage.load_run(tmp_path).config == run.config


@pytest.mark.parametrize(
    "make",
    [
        lambda: positions.Last(True),
        lambda: positions.First(2.0),
        lambda: positions.Nth(1.5),
        lambda: positions.At(np.array([True, False])),
        lambda: positions.At([0.0]),
        lambda: rl.resid_post(True, "last"),
        lambda: rl.resid_post(1.0, "last"),
        lambda: rl.attn_z(1, "last", heads=[True, False]),
        lambda: rl.LoReFT(D, rank=True),
        lambda: rl.LoReFT(D, rank=2.0),
        lambda: rl.LoReFT(str(D), rank=2),
        lambda: rl.DAS(D, variables={"a": 1.0}),
        lambda: interventions.Noise(D, 1.0, seed=0.5),
        lambda: rl.FitConfig(steps=True),
        lambda: rl.FitConfig(steps=2.0),
        lambda: rl.FitConfig(seed="0"),
        lambda: rl.FitConfig(batch_size=None),
        lambda: rl.Decoding(max_new_tokens=2.5),
        lambda: rl.Decoding(seed=None),
        lambda: rl.Variant(sites=np.array([True])),
        lambda: rl.training.Reuse(buckets=2.0),
        lambda: pieces(6, 2.0),
        lambda: repetition([1, 2, 1, 2], n=True),
        lambda: shuffled_p(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), None, 99.0, 0),
        lambda: rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, rank=2)}).reset(1.0),
        lambda: rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, rank=2)}).seeds([True]),
    ],
)
def test_floats_bools_and_texts_are_no_whole_numbers(make):
    with pytest.raises(TypeError, match="expected a whole number"):
        make()


@pytest.mark.parametrize("many", [np.array, lambda x: x.tolist(), pd.DataFrame, lambda x: x.double()])
def test_vectors_and_bases_may_be_arrays(many):
    columns, vector = torch.eye(D, 2), torch.arange(float(D))

    def row(x):
        return many(x).iloc[:, 0] if many is pd.DataFrame else many(x)

    for plain, same in (
        (rl.SteeringVector(D, vector), rl.SteeringVector(D, row(vector))),
        (rl.Ablation(D, vector, columns), rl.Ablation(D, row(vector), many(columns))),
        (rl.DAS(D, basis=columns), rl.DAS(D, basis=many(columns))),
        (interventions.SigmoidMask(D, columns), interventions.SigmoidMask(D, many(columns))),
        (interventions.SAEMask(D, columns, columns.T), interventions.SAEMask(D, many(columns), many(columns.T))),
    ):
        states = plain.state_dict(), same.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
        assert [t.dtype for t in states[0].values()] == [t.dtype for t in states[1].values()]
    for wrong in ("abc", rl.LoReFT, ["a"]):
        with pytest.raises(TypeError, match=r"vector=.*, expected a tensor of numbers"):
            rl.SteeringVector(D, wrong)


@pytest.mark.parametrize("kind", [rl.SteeringVector, rl.Ablation, rl.LoReFT, rl.Interchange, interventions.SigmoidMask])
def test_a_vector_in_the_place_of_the_width_is_told_where_it_belongs(kind):
    with pytest.raises(TypeError, match=rf"d=a tensor of shape \[576\], .*{kind.__name__}\(576, …\)"):
        kind(torch.randn(576))
    with pytest.raises(TypeError, match=rf"d=Linear.*{kind.__name__}\(model.cfg.d_model, …\)"):
        kind(torch.nn.Linear(4, 4))
