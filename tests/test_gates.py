"""Gates: an edit behind one is `h' = h + strength · g · code @ basisᵀ`, and nothing at all where it is shut."""

from dataclasses import replace

import pytest
import torch
from test_scorer import off, scored, worst

from architectures import ARCHITECTURES, D, bridge, fresh_bridge, hf_model

EXAMPLES = [
    ("the cat sat on the mat and", " looked at the moon"),
    ("a dog", " ran by the green hill while a dog"),
    ("the moon over the green hill while a cat looked at the mat", " the"),
]
ROUNDING = 1e-5  # float32, sums in another order, as in test_generate.py


def direction():
    return torch.randn(D, generator=torch.Generator().manual_seed(7))


def gates():
    """Every gate and setting: open at some tokens of `EXAMPLES` or some of the way, and shut at others."""
    from reftlens.interventions import HardConcrete, Schedule, Sigmoid, Threshold

    return {
        "threshold per token": lambda: Threshold(direction()),
        "threshold, last": lambda: Threshold(direction(), per="prompt"),
        "threshold, max": lambda: Threshold(direction(), per="prompt", by="max"),
        "threshold, mean": lambda: Threshold(direction(), per="prompt", by="mean"),
        "sigmoid per token": lambda: drawn(Sigmoid(D, temperature=0.5)),
        "sigmoid, mean": lambda: drawn(Sigmoid(D, per="prompt", by="mean")),
        "schedule": lambda: Schedule([1, 0, 0.5, 0.25], prompt=0.5),
        "schedule by a function": lambda: Schedule(lambda step: 1 / (1 + step % 3), prompt=0),
        "hard concrete": lambda: HardConcrete(start=0.5, rate=0.25),
    }


NAMES = (
    "threshold per token",
    *(f"threshold, {rule}" for rule in ("last", "max", "mean")),
    *("sigmoid per token", "sigmoid, mean", "schedule", "schedule by a function", "hard concrete"),
)


@torch.no_grad()
def drawn(gate):
    gate.w.copy_(direction() / 2)
    return gate


def test_the_table_of_this_file_has_every_gate():
    from reftlens.interventions import GATES

    assert tuple(gates()) == NAMES and {make().kind for make in gates().values()} == set(GATES)


def gated(names, model, where="all", sites=None):
    """Edits of the residual stream, or at other sites, each behind a gate.

    Thresholds lie amid what the prompts of `EXAMPLES` have there, and open one at least.
    """
    import reftlens as rl

    torch.manual_seed(3)
    sites = sites or [rl.resid_post(layer, where) for layer in range(len(names))]
    made = {}
    for site, name in zip(sites, names, strict=True):
        gate = gates()[name]() if isinstance(name, str) else name
        if name in gates() and isinstance(gate, rl.interventions.Threshold):
            low, *_, high = sorted(scores(gate, model, site))
            gate.above = (low + high) / 2
        made[site] = rl.interventions.Gated(rl.LoReFT(D, 3), gate)
    return rl.ReFT(made).to(next(model.original_model.parameters()).dtype).eval()


def every_gate(model, where="all"):
    """All gates at once, each at a site of its own."""
    import reftlens as rl

    sites = [make(i, where) for i in range(3) for make in (rl.attn_out, rl.mlp_out, rl.resid_post)]
    return gated(NAMES, model, sites=sites[: len(NAMES)])


def scores(gate, model, site):
    """Of each prompt of `EXAMPLES`, or of each of its tokens, by the definition."""
    import reftlens as rl

    data, site = encoded(model), rl.Site(site.hook, "prompt")
    every = gate.score(rl.activations(model, data, site, progress=False)).split(data.prompt_mask.sum(dim=1).tolist())
    rule = {"last": lambda x: x[-1], "max": torch.max, "mean": torch.mean, None: lambda x: x}[gate.by]
    return torch.cat([rule(x).view(-1) for x in every]).tolist()


def shut(d=D):
    import reftlens as rl

    return rl.interventions.Threshold(direction()[:d], 1e9)


def encoded(model):
    import reftlens as rl

    return rl.encode(model, [rl.Example(*example) for example in EXAMPLES])


def logits_of(reft, model, batch, strength=1.0):
    import reftlens as rl

    variant = strength if isinstance(strength, rl.Variant) else rl.Variant(strength)
    with torch.no_grad(), reft.on(model, batch, variant):
        return model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)


# -- the formula ----------------------------------------------------------------------------------------------------


def test_a_threshold_is_open_where_the_projection_is_over_it_and_the_direction_is_of_any_length():
    import reftlens as rl

    h, v = torch.randn(50, D).double(), direction()
    expected = (h @ (v / v.norm()).double() > 0.3).double()[:, None]
    for scale in (1.0, 1e-3, 50.0):
        gate = rl.interventions.Threshold(scale * v, 0.3)
        assert torch.equal(gate.open(h), expected)
    assert 0.1 < expected.mean() < 0.9


@pytest.mark.parametrize("strength", [1.0, -0.5, torch.tensor([2.0, 0.0, 1.0])], ids=["1", "-0.5", "per direction"])
def test_a_gate_multiplies_the_code_and_where_it_is_shut_h_stays_bit_for_bit(strength):
    import reftlens as rl

    h, inner, gate = torch.randn(50, D), rl.LoReFT(D, 3), rl.interventions.Threshold(direction(), 0.3)
    h[:, 0] = -0.0
    g, out = gate.open(h), rl.interventions.Gated(inner, gate)(h, strength)
    with torch.no_grad():
        expected = h + g * (inner(h, strength) - h)
    torch.testing.assert_close(out, expected)
    closed = (g == 0)[:, 0]
    assert torch.equal(out[closed].view(torch.int32), h[closed].view(torch.int32))  # -0.0 too
    assert torch.equal(out[~closed], inner(h, strength)[~closed]) and not torch.equal(out[~closed], h[~closed])


def test_a_sigmoid_is_its_formula_and_its_threshold_is_open_where_it_is_more_than_half_open():
    import reftlens as rl

    gate, h = drawn(rl.interventions.Sigmoid(D, temperature=0.3)), torch.randn(50, D)
    with torch.no_grad():
        gate.b.fill_(0.4)
    g = gate.open(h).detach()
    torch.testing.assert_close(g, torch.sigmoid((h @ gate.w.detach() + 0.4) / 0.3)[:, None])
    assert torch.equal(gate.as_threshold().open(h) == 1, g > 0.5) and 0.1 < (g > 0.5).double().mean() < 0.9
    gate.reset()
    assert (gate.open(h) == 0.5).all()


def test_a_schedule_is_one_factor_for_each_step_and_the_last_one_from_there_on():
    import reftlens as rl

    origin = rl.interventions.Origin(torch.zeros(6, dtype=torch.long), torch.tensor([-1, -1, 0, 1, 2, 7]))
    factors, h = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.0, 0.0])[:, None], torch.randn(6, D)
    assert torch.equal(rl.interventions.Schedule([1, 0.25, 0], prompt=0.5).open(h, origin), factors)
    by_function = rl.interventions.Schedule(lambda step: [1, 0.25, 0][min(step, 2)], prompt=0.5)
    assert torch.equal(by_function.open(h, origin), factors)


def test_an_edit_that_is_not_finite_does_nothing_behind_a_shut_gate():
    import reftlens as rl

    inner, h = rl.SteeringVector(D, torch.ones(D)), torch.randn(5, D)
    with torch.no_grad():
        inner.vector.fill_(torch.inf)
    assert torch.equal(rl.interventions.Gated(inner, shut())(h), h)


def test_an_exchange_takes_a_gate_as_any_kind_does():
    import reftlens as rl

    das, gate, (h, source) = rl.DAS(D, 2), rl.interventions.Threshold(direction()), torch.randn(2, 20, D)
    module, source = rl.interventions.Gated(das, gate), source[:, None]
    assert module.variables == das.variables
    expected = torch.where(gate.open(h) > 0, das(h, source=source), h)
    assert torch.equal(module(h, source=source), expected) and not torch.equal(expected, das(h, source=source))


# -- on a model -----------------------------------------------------------------------------------------------------


def test_strength_zero_and_a_shut_gate_are_the_model_itself_bit_for_bit(any_model):
    import reftlens as rl

    reft, closed, batch = every_gate(any_model), gated([shut(), shut()], any_model), encoded(any_model)
    with torch.no_grad():
        base = any_model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
    assert torch.equal(logits_of(reft, any_model, batch, 0.0), base)
    assert torch.equal(logits_of(closed, any_model, batch), base)
    assert not torch.equal(logits_of(reft, any_model, batch), base)
    texts, decoding = [p for p, _ in EXAMPLES], rl.Decoding(max_new_tokens=3)
    plain, found = (rl.generate(r, any_model, texts, decoding, keep_logits=True) for r in (None, closed))
    assert plain.ids == found.ids and all(map(torch.equal, plain.logits, found.logits))


@pytest.mark.parametrize("rule", ["last", "max", "mean"])
def test_a_prompt_decides_for_its_whole_row_by_the_rule_and_a_row_that_is_shut_is_the_models_own(any_model, rule):
    import reftlens as rl

    reft, batch = gated([f"threshold, {rule}"], any_model), encoded(any_model)
    over = [score > reft[0].gate.above for score in scores(reft[0].gate, any_model, reft.sites[0])]
    assert 0 < sum(over) < len(over)
    with torch.no_grad():
        base = any_model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
    same = logits_of(reft, any_model, batch) == base
    assert [not row.all() for row in same] == over
    only = rl.ReFT({rl.resid_post(0, "all"): reft[0].inner})  # and an open row is edited at all of its tokens
    assert torch.equal(logits_of(reft, any_model, batch)[over], logits_of(only, any_model, batch)[over])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cone_equals_the_full_computation(architecture, doubles):  # a gradient of 3e-5 is 1e-4 off in float32
    import reftlens as rl

    model = fresh_bridge(architecture, dtype=torch.float64)
    data, rows = encoded(model), (2, 0, 1)
    for reft in (every_gate(model), every_gate(model, "last+response"), gated(["threshold, max"], model)):
        expected, _ = scored(model, reft, data, None, rows=rows)
        for reuse in (off(), rl.training.Reuse(remember=False)):
            found, said = scored(model, reft, data, reuse, rows=rows)
            assert said.startswith("light cone") and worst(found, expected) < 1e-9
        base, _ = scored(model, reft, data, off(), rows=rows, variant=rl.Variant(0.0))
        assert not torch.allclose(base[1], expected[1], atol=1e-3)


def test_they_train_as_without_reuse_and_beside_others_as_alone(gpt2_double):
    import reftlens as rl

    data, config = encoded(gpt2_double), rl.FitConfig(steps=3, lr=1e-2, batch_size=2)
    alone, full, first, second, start = (every_gate(gpt2_double) for _ in range(5))
    rl.fit(alone, gpt2_double, data, config, progress=False)
    rl.fit(full, gpt2_double, data, config, reuse=False, progress=False)
    rl.training.fit_many({"a": first, "b": second}, gpt2_double, data, config, progress=False)
    for a, *others in zip(*(r.parameters() for r in (alone, full, first, second, start)), strict=True):
        for b in others[:3]:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
        assert not torch.equal(a, others[3])


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_transformers_model_computes_the_same_padded_on_either_side(llama, name):
    import reftlens as rl

    plain, reft, batch = hf_model("llama"), gated([name, name], llama), encoded(llama)
    expected, real = logits_of(reft, llama, batch), batch.attention_mask
    shift = [int((~row).sum()) for row in real]
    tokens, mask = (torch.stack([r.roll(n) for r, n in zip(x, shift, strict=True)]) for x in (batch.tokens, real))
    with torch.no_grad(), rl.attach(reft, plain, batch=batch):
        right = plain(batch.tokens, attention_mask=real.long()).logits
        left = plain(tokens, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(right[real], expected[real], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(left[mask], expected[real], atol=ROUNDING, rtol=0)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_gate_cannot_be_is_said():
    import reftlens as rl
    from reftlens.interventions import Gated, Origin, Schedule, Sigmoid, Threshold

    steps = torch.zeros(1, dtype=torch.long)

    for make, message in (
        (lambda: Gated(Threshold(direction()), rl.LoReFT(D)), "expected an Intervention"),
        (lambda: Gated(rl.LoReFT(D), direction()), "expected a Gate"),
        (lambda: Gated(rl.LoReFT(D + 1), Threshold(direction())), f"width {D}, and LoReFT was made for d={D + 1}"),
        (lambda: Threshold(torch.zeros(D)), "direction is zero"),
        (lambda: Threshold(), "needs a direction"),
        (lambda: Threshold(direction(), "high"), "above="),
        (lambda: Threshold(direction(), by="max"), 'per="token" judges each token: drop it'),
        (lambda: Threshold(direction(), per="row"), "per='row'"),
        (lambda: Sigmoid(D, temperature=0), "temperature=0"),
        (lambda: Sigmoid(D).as_threshold(), "direction is zero"),
        (lambda: Schedule([]), "factors="),
        (lambda: Schedule([1, 1.5]), r"factors\[1\]=1.5, expected 0 to 1"),
        (lambda: Schedule(lambda step: -1).open(torch.ones(1, D), Origin(steps, steps)), r"factors\(0\)=-1"),
        (lambda: Schedule([1]).open(torch.ones(1, D)), "was not told where the tokens stand"),
        (lambda: Threshold(direction(), per="prompt").open(torch.ones(1, D)), "was not told where the tokens stand"),
        (
            lambda: Threshold(direction(), per="prompt").open(torch.ones(1, D), Origin(steps, steps)),
            "tokens of the prompt",
        ),
    ):
        with pytest.raises(Exception, match=f"{message}|Type-check error"):
            make()


# -- generation: the cache, batches, padding, beams and beginnings change nothing -------------------------------------


def in_full(monkeypatch, *arguments, **kwargs):
    """Each row alone, from its first token, at each step."""
    import reftlens as rl
    from reftlens.generation import probe

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="written in full"):
        patch.setattr(probe, "_verdict", lambda session: "this is the reference")
        return rl.generate(*arguments, **kwargs)


WAYS = {
    "in a batch": ({"max_new_tokens": 4}, 1.0),
    "rows that end": ({"max_new_tokens": 9}, 1.0),
    "at several strengths": ({"max_new_tokens": 3}, [-0.5, 0.0, 3.0]),
    "by beams": ({"max_new_tokens": 3, "beams": 2}, 3.0),
    "with one beginning": ({"max_new_tokens": 3}, 1.0),
}
WRITTEN = [*((a, "in a batch") for a in ARCHITECTURES), *(("llama", way) for way in [*WAYS][1:])]


@pytest.mark.parametrize("architecture, way", WRITTEN)
def test_what_is_written_is_what_each_row_alone_and_from_its_first_token_gives(architecture, monkeypatch, way):
    import reftlens as rl
    from reftlens.generation import session

    model, (settings, variant), where = bridge(architecture), WAYS[way], "all"
    texts = [p for p, _ in EXAMPLES]
    texts += [texts[0] + " looked", texts[1]]  # equal rows are computed once
    if way == "rows that end":  # at any time: every third token is a stop token
        monkeypatch.setattr(session, "stop_tokens", lambda model, prompts: set(range(0, 400, 3)))
    elif way == "with one beginning":
        where, texts = "last+generated", [f"{'the cat sat on the mat and ' * 9}{text}" for text in texts]
    reft, logits = every_gate(model, where), "beams" not in settings
    arguments = reft, model, texts, rl.Decoding(**settings)
    found = rl.generate(*arguments, variant=variant, keep_logits=logits)
    full = in_full(monkeypatch, *arguments, variant=variant, keep_logits=logits)
    plain = rl.generate(None, model, texts, rl.Decoding(**settings), keep_logits=logits)
    for a, b in zip(found, full, strict=True) if isinstance(found, list) else [(found, full)]:
        assert a.ids == b.ids and a.edited == b.edited
        for x, y in zip(a.logits or (), b.logits or (), strict=True):
            torch.testing.assert_close(x, y, atol=ROUNDING, rtol=0)
    last = found[-1] if isinstance(found, list) else found
    assert last.ids != plain.ids or not all(map(torch.equal, last.logits, plain.logits))


SHARED = ("threshold per token", "threshold, last", "schedule")  # the prompts' maximum and mean lie in the beginning


@pytest.mark.parametrize("name, times", [(n, 0) for n in NAMES] + [(n, 9) for n in SHARED])
def test_tokens_are_marked_where_the_gate_is_open_which_is_where_the_hidden_states_are_others(llama, name, times):
    import reftlens as rl

    reft, texts = gated([name], llama), ["the cat sat on the mat and " * times + p for p, _ in EXAMPLES]
    texts.append(texts[0] + " looked")
    found, states = rl.generate(reft, llama, texts, rl.Decoding(max_new_tokens=4)), []
    batch, point = found.batch(), llama.hook_dict["blocks.1.hook_resid_pre"]
    handle = point.add_hook(lambda h, hook: states.append(h))
    try:
        logits_of(reft, llama, batch)
        logits_of(reft, llama, batch, 0.0)
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)
    for marks, row, real in zip(found.edited, (states[0] != states[1]).any(dim=-1), batch.attention_mask, strict=True):
        assert marks[:-1] == tuple(row[real][:-1].tolist()) and not marks[-1]
    flat = [mark for marks in found.edited for mark in marks[:-1]]
    assert any(flat) and (all(flat) == (name in ("sigmoid per token", "sigmoid, mean", "hard concrete")))


# -- how often it is open -------------------------------------------------------------------------------------------


def test_openings_count_the_rows_that_open_and_cost_nothing_where_the_gate_is_shut(llama):
    import reftlens as rl

    reft, data = gated(["threshold, max"], llama), encoded(llama)
    over = [score > reft[0].gate.above for score in scores(reft[0].gate, llama, reft.sites[0])]
    right = rl.strength.openings(reft, llama, data, over, batch_size=2, progress=False)
    wrong = rl.strength.openings(reft, llama, data, [not x for x in over], progress=False)
    assert (right.true().value, right.false().value, wrong.true().value, wrong.false().value) == (1, 0, 0, 1)
    assert right.cost["kl"].value == right.cost["log_prob"].value == 0 < wrong.cost["kl"].value
    assert right.true().count == sum(over) and right.sites == (str(reft.sites[0]),)
    assert right.tokens(right.sites[0], expected=True).value == 1
    assert right.to_frame()["expected"].tolist() == over
    assert right.by_site()["false"].tolist() == [0] and "where it should not" in " ".join(str(right).split())
    assert right.plot().get_ylabel().startswith("share of rows")
    for result in (
        rl.evaluate(reft, llama, data, progress=False),
        rl.strength.dose_response(reft, llama, data, [0, 1], progress=False),
    ):
        text = f"Threshold at {reft.sites[0]}: open in {sum(over) / 3:.0%} of 3 rows"
        assert text in " ".join(str(result).split()) and "open in" not in str(replace(result, gates=()))
    (per_token,) = rl.strength.openings(gated(["threshold per token"], llama), llama, data, over, progress=False).gates
    assert 0 < per_token.share.mean() < 1 and (per_token.widest == 1).any()


def test_openings_need_a_gate_and_labels_of_both_sorts(llama):
    import reftlens as rl

    data = encoded(llama)
    for reft, labels in ((gated(["schedule"], llama), [True] * 3), (gated(["schedule"], llama), [True, False])):
        with pytest.raises(ValueError, match="expected= has"):
            rl.strength.openings(reft, llama, data, labels, progress=False)
    with pytest.raises(ValueError, match="no Gated intervention acts"):
        bare = rl.ReFT({rl.resid_post(0, "all"): rl.LoReFT(D)})
        rl.strength.openings(bare, llama, data, [True, False, True], progress=False)


# -- a gate from two sets of prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["last", "max", "mean"])
def test_a_threshold_between_two_sorts_of_prompts_opens_for_others_of_its_sort(llama, by):
    import reftlens as rl

    def prompts(animal, words):
        return rl.encode_prompts(llama, [f"the {animal} {word} {animal}" for word in words])

    words = [
        "sat on the mat",
        "ran by",
        "looked at the moon over",
        "sat while a",
        "and the",
        "over the hill by",
        "a",
        "on",
    ]
    site = rl.resid_post(0, "prompt")
    fit = rl.subspaces.threshold_between(llama, prompts("cat", words), prompts("moon", words), site, by=by)
    assert fit.gate.by == by and (fit.true.value, fit.false.value) == (1, 0) and fit.separation > 1
    new = [rl.Example(f"the {animal} by the {animal}", " ran") for animal in ("cat", "moon", "cat", "moon")]
    reft = rl.ReFT({site: rl.interventions.Gated(rl.LoReFT(D, 2), fit.gate)})
    result = rl.strength.openings(reft, llama, rl.encode(llama, new), [True, False] * 2, progress=False)
    assert (result.true().value, result.false().value, result.cost["kl"].value) == (1, 0, 0)


def test_a_threshold_where_there_is_nothing_between_is_refused(llama):
    import reftlens as rl

    same = rl.encode_prompts(llama, ["the cat sat", "a dog ran", "the moon", "the hill by"])
    site = rl.resid_post(0, "last")
    with pytest.raises(ValueError, match="expected four or more"):
        rl.subspaces.threshold_between(llama, same[:2], same, site)
    with pytest.raises(Exception, match=r"by=|Type-check error"):
        rl.subspaces.threshold_between(llama, same, same, site, by="first")
    with pytest.raises(ValueError, match="differ along 0"):
        rl.subspaces.threshold_between(llama, same[[0, 0, 0, 0]], same[[0, 0, 0, 0]], site)


@pytest.mark.parametrize("where, among", [("response", None), ("all", "response")])
def test_a_prompt_of_which_nothing_is_edited_cannot_decide(llama, where, among):
    """It was taken for shut, in writing alone: the edit never acted."""
    import reftlens as rl

    gate = rl.interventions.Threshold(direction(), -1e9, per="prompt")
    reft = rl.ReFT({rl.resid_post(0, where): rl.interventions.Gated(rl.LoReFT(D, 3), gate)})
    variant, decoding = rl.Variant(among=among), rl.Decoding(max_new_tokens=3)
    for call in (
        lambda: rl.evaluate(reft, llama, encoded(llama), [variant], progress=False),
        lambda: rl.generate(reft, llama, [p for p, _ in EXAMPLES], decoding, variant=variant),
        lambda: "".join(rl.generation.stream(reft, llama, "a dog", decoding, variant=variant)),
    ):
        with pytest.raises(ValueError, match="decides by tokens of the prompt, and none is edited"):
            call()


def test_positions_behind_a_gate_that_the_prompt_decides_for_what_follows_are_one_part(llama, tmp_path):
    """The response alone has nothing to decide by: `effects` and `report` ended in an error."""
    import reftlens as rl

    reft = gated(["threshold, mean"], llama)
    found = rl.effects(reft, llama, encoded(llama), of="positions", progress=False)
    assert found.parts == ("prompt and response",)
    assert found.effect("prompt and response").value == pytest.approx(found.whole.mean().item())
    settings = {"strengths": [0.5, 1.0], "decoding": rl.Decoding(max_new_tokens=2), "progress": False}
    rl.report(reft, llama, encoded(llama), tmp_path / "report.html", **settings)
    assert "prompt and response" in (tmp_path / "report.html").read_text()
    apart = rl.effects(
        gated(["threshold, mean"], llama, "prompt"), llama, encoded(llama), of="positions", progress=False
    )
    assert len(apart.parts) > 3


def test_directions_that_are_shut_are_left_out_behind_a_gate_too():
    """An overlap, and random subspaces of equal rank, counted those that a mask behind a gate had shut."""
    import reftlens as rl
    from reftlens.analysis.causal.variable import basis_of, movement_of

    mask = rl.interventions.MaskedDAS(D, 4)
    with torch.no_grad():
        mask.logits.copy_(torch.tensor([9.0, -9.0, -9.0, 9.0]))
    behind = rl.interventions.Gated(mask, rl.interventions.Sigmoid(D))
    assert mask.learned_rank == 2 and torch.equal(basis_of(behind), basis_of(mask))
    assert torch.equal(movement_of(behind), movement_of(mask))
    found = rl.subspaces.overlap({"alone": mask, "behind": behind})
    assert found.ranks == (2, 2) and found.overlap[0, 1] == pytest.approx(1.0)
