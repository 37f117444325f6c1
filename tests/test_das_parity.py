"""DAS beside the two that others use: pyvene's function on equal weights, and TransformerLens' `fit_das` trained."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from planted import VALUES, pairs, planted
from safetensors.torch import load_file
from torch.nn import functional as F
from transformer_lens.tools.analysis import interchange as theirs

import reftlens as rl

PYVENE = Path(__file__).parent / "reference" / "pyvene_functions.safetensors"
HOOK, WIDTH, RANK, LR = "blocks.1.hook_out", 32, 2, 2e-2
SETTINGS = dict(epochs=20, batch_size=64, lr=LR)


def stored(name):
    """What a class of pyvene was given, its weights, and what it answered."""
    case = {k.removeprefix(f"{name}."): v for k, v in load_file(PYVENE).items() if k.startswith(f"{name}.")}
    assert (case["out"] - case["base"]).abs().max() > 0.1  # the edit is no small thing
    return case


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_on_equal_weights_das_is_pyvenes_low_rank_rotation(rank):
    case = stored(f"LowRankRotatedSpaceIntervention.{rank}")
    das = rl.DAS(len(case["R"]), basis=case["R"])
    h = case["base"].clone().requires_grad_()
    out = das(h, source=case["source"][:, None])
    torch.testing.assert_close(out, case["out"], atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad((out * case["weight"]).sum(), h)
    torch.testing.assert_close(gradient, case["gradient"], atol=1e-6, rtol=0)
    other = rl.DAS(*case["R"].shape, generator=torch.Generator().manual_seed(1))
    assert (other(h, source=case["source"][:, None]) - case["out"]).abs().max() > 0.1  # its basis matters


def test_on_equal_weights_a_sigmoid_mask_is_pyvenes():
    case = stored("SigmoidMaskIntervention")
    mask = rl.interventions.SigmoidMask(case["base"].shape[1], temperature=(case["temperature"].item(),) * 2)
    with torch.no_grad():
        mask.logits.copy_(case["mask"])
    out = mask(case["base"], source=case["source"][:, None])
    torch.testing.assert_close(out, case["out"], atol=1e-6, rtol=0)


def test_on_equal_weights_a_mask_in_a_rotated_basis_is_pyvenes():
    case = stored("SigmoidMaskRotatedSpaceIntervention")
    mask = rl.interventions.SigmoidMask(case["base"].shape[1], case["R"], temperature=(case["temperature"].item(),) * 2)
    with torch.no_grad():
        mask.logits.copy_(case["masks"])
    out = mask(case["base"], source=case["source"][:, None])
    # h - h R Rᵀ + … here, (…) Rᵀ there: they differ by how far R Rᵀ is from the identity, rounding of 24 terms
    torch.testing.assert_close(out, case["out"], atol=3e-6, rtol=0)


# -- fit_das ---------------------------------------------------------------------------------------------------


@cache
def task():
    """The planted network, pairs to train on and pairs of other tokens to score on."""
    truth, values = planted(), list(VALUES)
    return truth, pairs(truth.value, 256, 1, values[:200])[0], pairs(truth.value, 200, 2, values[200:])[0]


def as_theirs(data):
    """Base and source prompts (four tokens each) and the answers of pairs, as `fit_das` wants them."""
    source = data.sources["source"]
    return data.tokens[:, :4], source.batch.tokens[source.rows], data.target_ids


def ours_with(basis):
    return rl.ReFT({rl.resid_post(1, "last"): rl.DAS(WIDTH, RANK, basis=basis)})


def fitted_by_them(seed, model, base, source, targets, **settings):
    last = torch.full((len(base),), 3)
    return theirs.fit_das(
        model,
        HOOK,
        base,
        source,
        targets,
        lambda tokens: model(tokens)[:, -1],
        rank=RANK,
        base_positions=last,
        source_positions=last,
        seed=seed,
        **settings,
    )


def accuracy(basis):
    """Held-out interchange accuracy of a basis, whoever found it."""
    truth, _, test = task()
    return rl.causal.interchange_scores(ours_with(basis), truth.model, test, progress=False).accuracy


def cosines(a, b):
    return torch.linalg.svdvals(a.double().T @ b.double())


def test_a_step_has_the_loss_of_fit_das_on_an_equal_basis():
    truth, train, _ = task()
    base, source, targets = as_theirs(train[:64])
    # lr 0: their basis stays the one they began with, and their loss of an epoch of one batch is that of one step
    pyvene = fitted_by_them(0, truth.model, base, source, targets, epochs=1, batch_size=64, lr=0.0)
    run = rl.fit(
        ours_with(pyvene.basis), truth.model, train[:64], steps=1, batch_size=64, weight_decay=0.0, progress=False
    )
    assert run.computation.startswith("light cone")
    assert run.losses[0] == pytest.approx(pyvene.losses[0], abs=1e-5)
    assert run.losses[0] > 0.1
    other = rl.interventions.orthonormal(torch.randn(WIDTH, RANK))
    again = rl.fit(ours_with(other), truth.model, train[:64], steps=1, batch_size=64, progress=False)
    assert abs(again.losses[0] - pyvene.losses[0]) > 1e-3


def test_held_out_logits_are_theirs_on_an_equal_basis():
    truth, _, test = task()
    basis = rl.interventions.orthonormal(torch.randn(WIDTH, RANK))
    base, source, targets = as_theirs(test)
    last = torch.full((len(test),), 3)

    def logits(tokens):
        return truth.model(tokens)[:, -1]

    there = theirs.collect_activations(truth.model, HOOK, source, logits, positions=last)
    edited = theirs.intervened_logits(
        truth.model, HOOK, theirs.SubspaceInterchange(basis), base, there, logits, positions=last
    )
    expected = F.cross_entropy(edited, targets, reduction="none").tolist()
    losses = rl.evaluate(ours_with(basis), truth.model, test, [1], progress=False).loss[0]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_trained_on_the_same_pairs_both_find_the_planted_plane(seed):
    truth, train, _ = task()
    pyvene = fitted_by_them(seed, truth.model, *as_theirs(train), **SETTINGS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = theirs.LearnedSubspace(WIDTH, RANK).basis.detach()  # the basis that they began with
    reft = ours_with(start)
    rl.fit(reft, truth.model, train, **SETTINGS, schedule="constant", clip=None, seed=seed, progress=False)
    ours, other, before = accuracy(reft[0].basis().detach()), accuracy(pyvene.basis), accuracy(start)
    assert ours.low <= other.value <= ours.high and other.low <= ours.value <= other.high
    assert ours.value > before.high + 0.3  # both learned something
    assert cosines(reft[0].basis().detach(), truth.subspace).min() > 0.9
    assert cosines(reft[0].basis().detach(), pyvene.basis).min() > 0.9
    assert cosines(start, truth.subspace).min() < 0.8 and math.isfinite(pyvene.losses[-1])
