"""Objectives that see hidden states: the same values and gradients from the light cone as from plain passes."""

import pytest
import torch

from architectures import bridge

TEXTS = [
    ("the cat sat on the mat and", " looked at the moon"),
    ("a dog", " ran by"),
    ("the green hill while", " a dog"),
]


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def sites_for(rl):
    """Above the edit, below it, at its hook, within a block, before the edited token and after the last target."""
    return {
        "late": rl.resid_post(2, "last"),
        "edited": rl.resid_post(1, "l2"),
        "below": rl.resid_pre(1, "f1"),
        "neurons": rl.mlp_post(2, "all"),
        "head": rl.attn_z(2, "last", heads=(1, 3)),
        "norm": rl.final_norm("last"),
    }


def objective_for(rl, sites):
    class Small(rl.training.Objective):
        """Cross-entropy, and the mean square of what is seen, row by row."""

        def __init__(self, weight):
            self.weight = weight

        def losses(self, predictions):
            total = -predictions.by_row(predictions.log_probs)
            for name, states in predictions.activations.items():
                assert len(states) == len(predictions.activation_rows[name])
                squares = states.square().mean(dim=1)
                total = total.index_add(0, predictions.activation_rows[name], self.weight * squares)
            return total

    Small.sites = sites
    return Small(0.3)


def by_hand(model, reft, data, sites, weight):
    """The same from a plain pass with hooks of TransformerLens."""
    seen = {}
    hooks = [(site.hook, lambda h, hook, name=name: seen.update({name: h})) for name, site in sites.items()]
    with reft.on(model, data), model.hooks(fwd_hooks=hooks):
        logits = model(data.tokens, attention_mask=data.attention_mask.long(), use_cache=False)
    log_probs = logits[data.predicting].log_softmax(dim=-1).gather(1, data.target_ids[:, None])[:, 0]
    total = torch.zeros(len(data), dtype=log_probs.dtype).index_add(0, data.target_rows, -log_probs)
    for name, site in sites.items():
        h = seen[name] if site.heads is None else seen[name][:, :, list(site.heads)]
        mask = site.positions.mask(data.view)
        squares = h.flatten(2).square().mean(dim=2) * mask
        total = total + weight * squares.sum(dim=1)
    return total


@pytest.mark.parametrize(
    ("architecture", "reuse"), [("gpt2", True), ("neox", True), ("gemma3", True), ("gemma3", False)]
)
def test_values_and_gradients_are_those_of_a_plain_pass(rl, architecture, reuse, doubles):
    model, sites = bridge(architecture, torch.float64), sites_for(rl)
    data = rl.encode(model, [rl.Example(*row) for row in TEXTS])
    reft = rl.ReFT({rl.resid_post(1, "l2"): rl.LoReFT(32, 2)}).to(torch.float64)
    expected = by_hand(model, reft, data, sites, 0.3)
    gradient = torch.autograd.grad(expected.mean(), list(reft.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    objective = objective_for(rl, sites)
    losses = rl.evaluate(reft, model, data, [1], objective=objective, reuse=reuse, progress=False)
    assert torch.allclose(losses.loss[0], expected.detach(), atol=1e-9)
    settings = {"steps": 1, "batch_size": 3, "clip": None, "shuffle": False, "progress": False, "validation": data}
    run = rl.fit(reft, model, data, objective=objective, reuse=reuse, **settings)
    assert run.losses[0] == pytest.approx(expected.mean().item(), abs=1e-9)
    assert run.gradient_norms[0] == pytest.approx(norm, rel=1e-9) and norm > 0
    assert run.computation.startswith("light cone" if reuse else "full") and "late: blocks.2" in run.objective


def test_the_cone_grows_to_what_is_looked_at_and_no_further(rl, llama):
    data = rl.encode(llama, [rl.Example(*row) for row in TEXTS])
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)})
    settings = {"steps": 1, "progress": False}
    inside = rl.fit(reft, llama, data, objective=objective_for(rl, {"late": rl.resid_post(2, "last")}), **settings)
    below = rl.fit(reft, llama, data, objective=objective_for(rl, {"early": rl.resid_pre(0, "f1")}), **settings)
    plain = rl.fit(reft, llama, data, **settings)
    assert inside.computation == plain.computation and "blocks 2 to 2" in plain.computation
    assert "blocks 0 to 2" in below.computation


def test_several_runs_side_by_side_see_their_own(rl, llama):
    data = rl.encode(llama, [rl.Example(*row) for row in TEXTS])
    reft, objective = rl.ReFT({rl.resid_post(0, "l2"): rl.LoReFT(32, 2)}), objective_for(rl, sites_for(rl))
    settings = {"steps": 2, "batch_size": 2, "objective": objective, "progress": False}
    many, alone = reft.seeds([0, 1]), reft.seeds([0, 1])
    together = rl.fit_many(many, llama, data, **settings)
    for name, each in alone.items():
        run = rl.fit(each, llama, data, seed=each.seed, **settings)
        assert together[name].losses == pytest.approx(run.losses, rel=1e-5)


def test_a_site_that_is_none_chooses_nothing_or_is_not_there_is_refused(rl, llama, tmp_path):
    data = rl.encode(llama, [rl.Example(*row) for row in TEXTS])
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, 2)})
    settings = {"steps": 1, "progress": False}
    nowhere = rl.resid_post(1, rl.positions.Nth(40, missing="skip"))
    for site, words, kind in (
        ("blocks.1.hook_out", "Site", TypeError),
        (rl.Site("blocks.9.hook_out", "last"), "has no hook", rl.errors.HookNotFound),
        (nowhere, "chooses no token in any of 3 row", ValueError),
    ):
        with pytest.raises(kind, match=words):
            rl.fit(reft, llama, data, objective=objective_for(rl, {"it": site}), **settings)
    first, other = (objective_for(rl, {"it": rl.resid_post(2, where)}) for where in ("last", "all"))
    rl.fit(reft, llama, data, objective=first, checkpoint=tmp_path / "run.pt", **settings)
    with pytest.raises(rl.errors.CheckpointMismatch, match="its objective differ"):
        rl.fit(reft, llama, data, objective=other, checkpoint=tmp_path / "run.pt", **settings)
