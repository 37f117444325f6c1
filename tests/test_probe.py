"""What is wrong only in some ways of computing is caught before it is used, whatever the first batch was."""

import warnings

import pytest
import torch

from architectures import D, bridge, fresh_bridge

ROWS = [
    ("the cat sat on the mat and the dog ran over the green hill", " the moon"),
    ("a bird", " in the tree and over the river, far away from the house"),
    ("the dog ran", " on"),
    ("over the hill the moon", " was green and the cat sat there"),
]


def reft(broken=None):
    """Where what is broken is used: positions are read at the embedding, the last block is trimmed in long cones."""
    import reftlens as rl

    sites = {wrong_positions: rl.embeddings("last"), early_ends: rl.resid_post(1, "first")}
    site = sites.get(broken, rl.resid_post(1, "last"))
    return rl.ReFT({site: rl.LoReFT(D, rank=2)})


def data(model, rows=ROWS):
    import reftlens as rl

    return rl.encode(model, [rl.Example(*row) for row in rows])


def scorer_of(model, module, rows=ROWS, reuse=None):
    import reftlens as rl
    from reftlens.cone.plans import Plan
    from reftlens.cone.scorer import Scorer

    return Scorer(model, data(model, rows), [Plan(module)], rl.Reuse.of(True if reuse is None else reuse))


def logits(scorer, rows):
    from reftlens.cone.plans import Job

    return torch.cat([scored.logits.detach() for group in scorer.score([Job(0, rows)]) for scored in group])


def shifted_mask(monkeypatch):
    """Stored keys: one too many is masked."""
    from reftlens.cone import light_cone

    assemble = light_cone.assemble

    def wrong(*arguments):
        stream, mask, layers = assemble(*arguments)
        mask = mask.clone()
        mask[:, :1] = False
        return stream, mask, layers

    monkeypatch.setattr(light_cone, "assemble", wrong)


def stale_prefix(monkeypatch):
    """Stored keys are those of another row."""
    from reftlens.cone.prefix import Captured

    cut = Captured.cut

    def wrong(self, *arguments):
        whole = cut(self, *arguments)
        return Captured(whole.streams, tuple(k.roll(1, dims=1) for k in whole.keys), whole.values)

    monkeypatch.setattr(Captured, "cut", wrong)


def wrong_positions(monkeypatch):
    """Position ids begin one too late."""
    from reftlens.cone import light_cone

    forward = light_cone.forward_inside
    monkeypatch.setattr(
        light_cone,
        "forward_inside",
        lambda model, tokens, mask, places, cache=None: forward(model, tokens, mask, places + 1, cache),
    )


def early_ends(monkeypatch):
    """The trimmed last block takes a wrong token, in rows that have fewer targets than others."""
    from reftlens.cone import trim

    columns = trim._columns

    def wrong(*arguments):
        which, real = columns(*arguments)
        short = real.sum(dim=1) < real.shape[1]
        return torch.where(short[:, None] & real, (which - 1).clamp(min=0), which), real

    monkeypatch.setattr(trim, "_columns", wrong)


def half_called_exact(monkeypatch):
    """What was captured is rounded to bfloat16, and nobody says so."""
    from reftlens.cone.store import RowStore

    captured = RowStore._captured

    def wrong(self, rows):
        return [row.rebuilt([t.bfloat16().to(t.dtype) for t in row.tensors()]) for row in captured(self, rows)]

    monkeypatch.setattr(RowStore, "_captured", wrong)


BROKEN = [shifted_mask, stale_prefix, wrong_positions, early_ends, half_called_exact]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_what_is_broken_is_caught_before_it_is_used(architecture, broken, monkeypatch):
    """A first batch of one row, then mixed ones: what follows is the full computation, to the last bit."""
    model, module = fresh_bridge(architecture), reft(broken)
    full = scorer_of(model, module, reuse=False)
    broken(monkeypatch)
    scorer = scorer_of(model, module)
    with pytest.warns(UserWarning, match="is not reused: .* differ"):
        results = [logits(scorer, rows) for rows in ((2,), (0, 1, 2, 3))]
    assert not scorer.reuses and "differ" in scorer.computation
    assert torch.equal(results[1], logits(full, (0, 1, 2, 3)))


def test_what_is_right_is_not_suspected(any_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = scorer_of(any_model, reft())
        for rows in ((2,), (0, 1, 2, 3)):
            logits(scorer, rows)
    assert scorer.reuses


@pytest.mark.parametrize("kind", ["Interchange", "DAS", "SteeringVector", "Ablation"])
def test_every_kind_is_probed_with_sources_of_its_own(kind):
    import reftlens as rl

    model, settings = bridge("llama"), {"rank": 2} if kind in ("DAS", "Ablation") else {}
    module = rl.ReFT({rl.resid_post(1, "last"): getattr(rl, kind)(D, **settings)})
    batch = data(model)
    if any(m.variables for _, m in module.items()):
        batch = batch.resampled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.evaluate(module, model, batch, progress=False).computation.startswith("light cone")


def test_nothing_is_compared_where_nobody_asks(monkeypatch):
    import reftlens as rl
    from reftlens.cone import probe

    monkeypatch.setattr(probe.Probe, "check", lambda *arguments: pytest.fail("compared"))
    logits(scorer_of(fresh_bridge("gpt2"), reft(), reuse=rl.Reuse(verify=False)), (0, 1))
