"""Objectives on pairs of completions: their formulas from plain passes, their draws, resuming, and what they learn."""

import math

import pytest
import torch

PAIRS = [
    ("the cat sat on", " the mat", " a dog"),
    ("a dog ran by the", " green hill while", " moon"),
    ("the moon over the green", " hill", " dog and a cat"),
    ("the", " cat", " moon over"),
]
FACTORS = (0.5, 2.0)


@pytest.fixture
def rl():
    import reftlens

    return reftlens


OBJECTIVES = {
    "DPO": lambda rl: rl.training.DPO(0.3),
    "SimPO": lambda rl: rl.training.SimPO(1.5, 0.4),
    "BiPO": lambda rl: rl.training.BiPO(0.3),
    "RePS": lambda rl: rl.training.RePS(FACTORS),
}
KINDS = {
    "SteeringVector": lambda rl: (rl.SteeringVector(32, vector=0.2 * torch.randn(32)), "all"),
    "LoReFT": lambda rl: (rl.LoReFT(32, rank=2), "f1+l1"),
    "ReFTr1": lambda rl: (rl.interventions.ReFTr1(32, k=2, sparsity=0), "l3"),
}


def edit(rl, kind, layer=1):
    module, where = KINDS[kind](rl)
    return rl.ReFT({rl.resid_post(layer, where): module})


def log_probs(model, rows, context):
    """log p of each row's completion, summed, and its length, by torch alone."""
    with context:
        logits = model(rows.tokens, attention_mask=rows.attention_mask.long(), use_cache=False).log_softmax(-1)
    sums, lengths = [], []
    for row in range(len(rows)):
        places = rows.target_mask[row].nonzero()[:, 0].tolist()
        sums.append(sum(logits[row, place - 1, rows.tokens[row, place]] for place in places))
        lengths.append(len(places))
    return torch.stack(sums), torch.tensor(lengths)


def losses_by_hand(rl, model, reft, data, name, plans):
    """The mean loss of a step: `plans` are what was drawn, `{number of the plan: rows}`."""
    terms = []
    for plan, numbers in plans.items():
        rows = data[list(numbers)]
        strength = {"DPO": [1.0], "SimPO": [1.0], "BiPO": [1.0, -1.0], "RePS": [*FACTORS, *(-f for f in FACTORS)]}[
            name
        ][plan]
        acting = rl.Variant(strength)
        if strength < 0 and name == "RePS" and not isinstance(next(iter(reft.items()))[1], rl.LoReFT):
            ((site, module),) = reft.items()
            w, where = module.basis()[:, 0], site.positions.mask(rows.view)

            def null(h, hook, w=w, where=where):
                out = h - torch.relu(h @ w)[..., None] * w / w.norm() ** 2
                return torch.where(where[..., None], out, h)

            context = model.hooks(fwd_hooks=[("blocks.1.hook_out", null)])
        else:
            context = reft.on(model, rows, acting)
        (edited, lengths), (reference, _) = log_probs(model, rows, context), log_probs(model, rows, torch.no_grad())
        for plus, minus in ((i, i + 1) for i in range(0, len(rows), 2)):
            if name == "RePS":
                win, lose = (plus, minus) if strength > 0 else (minus, plus)
                scale = max(reference[lose] - reference[win], torch.ones(()))
                margin = scale / lengths[win] * edited[win] - edited[lose] / lengths[lose]
            elif name == "SimPO":
                margin = 1.5 * (edited[plus] / lengths[plus] - edited[minus] / lengths[minus]) - 0.4
            else:
                direction = strength if name == "BiPO" else 1.0
                margin = 0.3 * direction * (edited[plus] - reference[plus] - (edited[minus] - reference[minus]))
            terms.append(torch.logaddexp(torch.zeros(()), -margin))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("name", "kind", "reuse"),
    [(n, k, True) for n in OBJECTIVES for k in (KINDS if n == "RePS" else ["LoReFT"])]
    + [("BiPO", "LoReFT", False), ("RePS", "ReFTr1", False)],
)
def test_the_first_step_is_the_formula_with_its_gradient(rl, llama, name, kind, reuse):
    from reftlens.training.config import derived_seed

    data, objective, reft = rl.training.preference_pairs(llama, PAIRS), OBJECTIVES[name](rl), edit(rl, kind)
    generator = torch.Generator().manual_seed(derived_seed(3, "plans", 0))
    plans = objective.drawn(range(len(data)), generator)
    assert sorted(set(sum(plans.values(), ()))) == list(range(8))
    assert len(plans) == {"DPO": 1, "SimPO": 1, "BiPO": 2, "RePS": 4}[name]
    reft.train()
    expected = losses_by_hand(rl, llama, reft, data, name, plans)
    gradients = torch.autograd.grad(expected, [p for p in reft.parameters()])
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    settings = {"steps": 1, "batch_size": 4, "shuffle": False, "seed": 3, "objective": objective, "progress": False}
    run = rl.fit(reft, llama, data, reuse=reuse, clip=None, **settings)
    assert run.losses[0] == pytest.approx(expected.item(), rel=2e-5)
    assert run.gradient_norms[0] == pytest.approx(norm, rel=1e-4) and norm > 1e-4
    assert run.objective == repr(objective) and run.computation.startswith("light" if reuse else "full")


def test_draws_are_of_the_seed_and_the_step_and_a_run_that_was_interrupted_ends_alike(rl, llama, tmp_path):
    data, objective = rl.training.preference_pairs(llama, PAIRS), rl.training.RePS(FACTORS)
    settings = {"steps": 4, "batch_size": 2, "lr": 0.05, "objective": objective, "validation": data, "progress": False}
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(32, 2)})
    start = {name: p.clone() for name, p in reft.state_dict().items()}
    whole = rl.fit(reft, llama, data, **settings)
    drawn = [objective.drawn(range(8), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and any(other != drawn[0] for other in drawn[2:])

    class Interrupted(Exception):
        pass

    def stop(step):
        if step.step == 3:
            raise Interrupted

    again, path = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(32, 2)}), tmp_path / "run.pt"
    again.load_state_dict(start)
    with pytest.raises(Interrupted):
        rl.fit(again, llama, data, checkpoint=path, checkpoint_every=2, on_step=stop, **settings)
    resumed = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(32, 2)})
    run = rl.fit(resumed, llama, data, checkpoint=path, checkpoint_every=2, **settings)
    assert run.losses == whole.losses and run.validation == whole.validation
    for name, value in reft.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    with pytest.raises(rl.errors.CheckpointMismatch, match="its objective differ"):
        rl.fit(resumed, llama, data, checkpoint=path, **settings | {"objective": rl.training.RePS((0.5,))})


@pytest.mark.parametrize("name", ["DPO", "RePS"])
def test_a_plan_foresees_the_passes_and_the_record_names_the_objective(rl, llama, name):
    data, objective, reft = rl.training.preference_pairs(llama, PAIRS), OBJECTIVES[name](rl), edit(rl, "SteeringVector")
    settings = {"epochs": 2, "batch_size": 2, "objective": objective}
    plan, run = rl.training.plan(reft, llama, data, **settings), rl.fit(reft, llama, data, progress=False, **settings)
    assert plan.computation == run.computation and len(plan.steps) == len(run.losses) == 4
    alone = rl.training.plan(reft, llama, data, epochs=2, batch_size=4)  # in steps of as many rows, each of them once
    assert (plan.step.padded > 1.5 * alone.step.padded) == (name == "RePS")
    assert f"by {objective!r}" in str(run) and name in run.plot().get_ylabel()


def test_runs_side_by_side_are_those_of_each_alone(rl, llama):
    data, objective = rl.training.preference_pairs(llama, PAIRS), rl.training.BiPO()
    settings = {"steps": 3, "batch_size": 2, "lr": 0.05, "objective": objective, "progress": False}
    reft = edit(rl, "LoReFT")
    many, alone = reft.seeds([0, 1]), reft.seeds([0, 1])
    together = rl.fit_many(many, llama, data, **settings)
    for name, each in alone.items():
        run = rl.fit(each, llama, data, seed=each.seed, **settings)
        assert together[name].losses == pytest.approx(run.losses, rel=1e-5)


@pytest.mark.parametrize("name", ["RePS"])
def test_what_was_planted_is_learned_and_nothing_where_nothing_was(rl, llama, name):
    """At the final norm the logit of a token is linear in the edit, so the direction is known: that of two columns."""
    tokens = [llama.tokenizer(word).input_ids[-1] for word in (" cat", " dog")]
    better = llama.W_U[:, tokens[0]] - llama.W_U[:, tokens[1]]
    prompts = ["the moon over the", "a", "the dog ran by the", "and looked at the"]
    planted = [(prompt, " cat", " dog") for prompt in prompts]
    nothing = planted[:2] + [(prompt, " dog", " cat") for prompt in prompts[:2]]
    settings = {"steps": 15, "lr": 0.05, "batch_size": 4, "objective": OBJECTIVES[name](rl), "progress": False}
    towards = {}
    for what, pairs in {"planted": planted, "nothing": nothing}.items():
        vector = rl.SteeringVector(32, vector=0.01 * torch.randn(32))
        reft = rl.ReFT({rl.final_norm("last"): vector})
        rl.fit(reft, llama, rl.training.preference_pairs(llama, pairs, end=False), **settings)
        towards[what] = (vector.vector.detach() @ better / better.norm()).item(), vector.vector.norm().item()
    length, size = towards["planted"]
    assert length > 0.7 * size and length > 3 * abs(towards["nothing"][0])


def test_an_edit_that_is_nulled_takes_its_direction_out_and_shares_its_parameters_so_it_is_not_saved(
    rl, llama, tmp_path
):
    vector = rl.SteeringVector(8, vector=3 * torch.randn(8))
    reft = rl.ReFT({rl.resid_post(0, "all"): vector})
    ((_, null),), h = rl.training.nulled(reft).items(), torch.randn(50, 8)
    before, after = h @ vector.vector, null(h) @ vector.vector
    assert torch.allclose(after, before.clamp(max=0), atol=1e-5) and torch.equal(null(h)[before < 0], h[before < 0])
    assert next(null.parameters()) is vector.vector
    with pytest.raises(ValueError, match=r"is nulled cannot be stored: .* store that, and take nulled"):
        rl.save(rl.training.nulled(reft), tmp_path / "nulled", llama)
    assert not (tmp_path / "nulled").exists()
    with pytest.raises(ValueError, match="is zero, and has no direction"):
        rl.training.nulled(rl.ReFT({rl.resid_post(0, "all"): rl.SteeringVector(8)}))
    with pytest.raises(TypeError, match=r"LoReFT at .* has no one direction"):
        rl.training.nulled(rl.ReFT({rl.resid_post(0, "all"): rl.LoReFT(8)}))


def test_data_of_another_form_and_settings_out_of_range_are_refused(rl, llama):
    data, reft = rl.training.preference_pairs(llama, PAIRS), edit(rl, "LoReFT")
    odd, mixed = "data has 3 rows, expected groups of 2", "rows 0 and 1 of data have different prompts"
    for rows, words in ((data[:3], odd), (data[[0, 2]], mixed)):
        with pytest.raises(ValueError, match=words):
            rl.fit(reft, llama, rows, objective=rl.training.DPO(), progress=False)
    for kind, bad in (
        (rl.training.DPO, 0),
        (rl.training.BiPO, -1),
        (rl.training.SimPO, 0),
        (rl.training.RePS, []),
        (rl.training.RePS, [1, -1]),
    ):
        with pytest.raises(ValueError, match="above 0"):
            kind(bad)
    with pytest.raises(TypeError, match="pair"):
        rl.training.preference_pairs(llama, ["the cat"])


def test_an_objective_of_ones_own_sees_the_unedited_model(rl, llama, monkeypatch):
    """Its log-probabilities are computed once, not at each step; evaluated, strength 0 changes nothing."""
    from reftlens.scoring import criterion

    sweeps, real = [], criterion.reference_log_probs
    monkeypatch.setattr(criterion, "reference_log_probs", lambda *a: sweeps.append(1) or real(*a))

    class Moved(rl.training.Objective):
        reference = per_target = True

        def losses(self, predictions):
            return (predictions.log_probs - predictions.reference).square()

    data, reft = rl.training.preference_pairs(llama, PAIRS), edit(rl, "LoReFT")
    evaluated = rl.evaluate(reft, llama, data, [0, 1], objective=Moved(), progress=False)
    assert evaluated.loss[0].abs().max() < 1e-9 < evaluated.loss[1].min()
    with torch.no_grad():
        logs = [log_probs(llama, data, c)[0] for c in (reft.on(llama, data), torch.no_grad())]
    single = data.target_mask.sum(dim=1) == 1
    assert torch.allclose(evaluated.loss[1][single], (logs[0] - logs[1]).square().double()[single], rtol=1e-3)
    run = rl.fit(reft, llama, data, objective=Moved(), steps=15, lr=0.02, batch_size=8, progress=False)
    assert len(sweeps) == 2 and run.losses[-1] < 0.7 * run.losses[0] and run.objective.endswith("Moved()")


def test_intervals_are_of_pairs_not_of_their_rows(rl, llama):
    """Both rows of a pair have the loss of the pair: counted as two examples, intervals were too narrow by the root."""
    data, reft = rl.training.preference_pairs(llama, PAIRS), edit(rl, "LoReFT")
    found = rl.evaluate(reft, llama, data, [1], objective=rl.training.DPO(), progress=False)
    (loss,), (accuracy,) = (found.estimate(measure) for measure in ("loss", "accuracy"))
    assert loss.count == accuracy.count == len(PAIRS) and f"{2 * len(PAIRS)} examples in groups of 2" in str(found)
    assert loss.value == pytest.approx(found.loss.mean().item())
    assert rl.evaluate(reft, llama, data, [1], progress=False).estimate("loss")[0].count == 2 * len(PAIRS)
