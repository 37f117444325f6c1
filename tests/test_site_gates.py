"""Gates over sites: the formula of hard concrete, planted heads found, and what is left when gates are taken off."""

import math
from functools import cache

import pytest
import torch
from planted import FILLER, VALUES, D, pairs, planted_heads

D_HEAD = 8


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def _data(count=64):
    truth = planted_heads()
    tokens = list(VALUES)
    return truth, *(
        pairs(truth.value, n, s, t, fill=FILLER)[0] for n, s, t in ((count, 1, tokens[:200]), (40, 2, tokens[200:]))
    )


@cache
def _curve():
    import reftlens as rl

    truth, train, test = _data()
    sites = rl.places.every_head(truth.model, "last")
    config = rl.FitConfig(steps=25, lr=6e-2, batch_size=16)
    return rl.places.sparsity(
        sites, lambda: rl.Interchange(D_HEAD), truth.model, train, test, [0.2, 50.0], config, progress=False
    )


def test_the_gate_is_the_papers_stretched_and_cut_concrete_variable(rl):
    gate = rl.interventions.HardConcrete(0.3, start=0.7)
    h = torch.zeros(2, 3, D)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    torch.manual_seed(5)
    u = torch.rand(()).item()
    torch.manual_seed(5)
    gate.train().anneal(0.5)
    s = sigmoid((math.log(u) - math.log(1 - u) + 0.7) / (2 / 3))
    drawn = min(1.0, max(0.0, s * 1.2 - 0.1))
    torch.testing.assert_close(gate.open(h), torch.full((2, 3, 1), drawn))
    torch.testing.assert_close(gate.eval().open(h), torch.full((2, 3, 1), sigmoid(0.7) * 1.2 - 0.1))
    price = 0.3 * sigmoid(0.7 - 2 / 3 * math.log(0.1 / 1.1))
    assert gate.penalty().item() == pytest.approx(price) and rl.interventions.HardConcrete(0.0).penalty() is None
    for ramp, progress, share in ((0.5, 0.0, 0.0), (0.5, 0.1, 0.2), (0.5, 0.9, 1.0), (0, 0.0, 1.0)):
        other = rl.interventions.HardConcrete(0.3, start=0.7, ramp=ramp)
        other.anneal(progress)
        assert other.penalty().item() == pytest.approx(share * price), "the price grows over the ramp"
    torch.manual_seed(0)
    opened = 0
    for _ in range(4000):
        gate.train().anneal(0.0)
        opened += gate.open(h).max().item() > 0
    assert opened / 4000 == pytest.approx(price / 0.3, abs=0.03), "the penalty is the probability to be open"
    for start, value in ((3.0, 1.0), (-3.0, 0.0)):
        assert rl.interventions.HardConcrete(start=start).learned().item() == value, "exactly, beyond 2.4"
    with pytest.raises(ValueError, match="expected a sparsity of 0 or more"):
        rl.interventions.HardConcrete(-1.0)
    with pytest.raises(ValueError, match="ramp=2, expected 0 to 1"):
        rl.interventions.HardConcrete(ramp=2)


def test_planted_heads_are_found_and_nothing_where_it_costs_too_much(rl):
    truth, curve = planted_heads(), _curve()
    cheap, dear, best = curve.points
    planted = {f"blocks.{layer}.attn.hook_z heads [{head}]" for layer, head in truth.heads}
    assert {site.vectors for site in cheap.sites} == planted == {site.vectors for site in best.sites}
    assert cheap.accuracy.value > 0.95 > 0.6 > curve.unedited.accuracy.value
    assert dear.sites == () and dear.loss == curve.unedited.loss
    assert best.loss == cheap.loss, "nothing is trained in an interchange but which"
    frame = curve.to_frame()
    assert frame["open"].tolist() == [0, 2, 0, 2] and frame["way"].tolist() == ["unedited", "gates", "gates", "map"]
    assert "edited sites" in curve.plot().get_xlabel() and "gates at 0.2 nats: 2 sites" in str(curve)


def test_without_its_gates_an_edit_is_the_same(rl):
    _, _, test = _data()
    model, gated = planted_heads().model, _curve().refts[0.2].clone()
    with torch.no_grad():
        for module in gated.distinct:
            module.gate.trained.copy_(module.gate.trained.sign())  # log α of 10 and -10
    plain = rl.places.pruned(gated)
    assert {type(module) for _, module in plain.items()} == {rl.Interchange}
    losses = [rl.evaluate(reft, model, test, progress=False).loss for reft in (gated, plain)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)  # gates are exactly 1 and 0; passes round differently
    with pytest.raises(ValueError, match="every gate of 12 sites is shut"):
        rl.places.pruned(_curve().refts[50.0], tolerance=0.5)
    half = rl.places.gated_sites(gated.sites[:2], lambda: rl.Interchange(D_HEAD))
    with pytest.raises(ValueError, match=r"is 0.50, neither open nor shut to 0.1"):
        rl.places.pruned(half)
    both = rl.places.pruned(half | plain, tolerance=0.5)
    assert len(both) == 4, "what has no gate stays"


def test_gates_train_together_as_alone_and_in_the_cone_as_in_full(rl, tmp_path):
    """The noise of a step is drawn once, from its seed, whatever is computed beside it."""
    truth, train, _ = _data(24)
    sites = rl.places.every_head(truth.model, "last", layers=[1, 2])[2:6]
    config = rl.FitConfig(steps=4, lr=3e-2, batch_size=8)

    def made():
        reft = rl.places.gated_sites(sites, lambda: rl.DAS(D_HEAD, 1), 0.1)
        reft.reset(0)
        return reft

    names = ("alone", "full", "together", "beside")
    refts = {name: made() for name in names}
    rl.fit(refts["alone"], truth.model, train, config, progress=False)
    rl.fit(refts["full"], truth.model, train, config, reuse=False, progress=False)
    rl.fit_many({n: refts[n] for n in names[2:]}, truth.model, train, config, progress=False)
    gates = {n: torch.stack([m.gate.log_alpha for m in reft.distinct]).detach() for n, reft in refts.items()}
    assert gates["alone"].abs().min() > 0.01
    for name in names[1:]:
        torch.testing.assert_close(gates[name], gates["alone"], atol=1e-4, rtol=0)
    rl.save(refts["alone"], tmp_path / "gated", truth.model)
    loaded = rl.load(tmp_path / "gated", truth.model)
    assert torch.equal(torch.stack([m.gate.log_alpha for m in loaded.distinct]), gates["alone"])
