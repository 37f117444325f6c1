"""What one call captured serves the next, and is never that of another model, batch or setting."""

import os
from dataclasses import replace

import pytest
import torch

from architectures import D, bridge, fresh_bridge

ROWS = [
    ("the cat sat on the mat and", " looked at the moon"),
    ("a dog", " ran by the green hill while a dog"),
    ("the moon over the green hill while a cat looked at the mat", " the"),
]


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    """Counts the rows that are captured; nothing is remembered from before."""
    import reftlens as rl
    from reftlens.cone.capture import Capture

    rl.training.forget()
    rows, call = [], Capture.__call__

    def counted(self, numbers):
        rows.extend(numbers)
        return call(self, numbers)

    monkeypatch.setattr(Capture, "__call__", counted)
    yield rows
    rl.training.forget()


def data_of(model, rows=ROWS):
    import reftlens as rl

    return rl.encode(model, [rl.Example(*row) for row in rows])


def edit(layer=1, positions="last"):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(layer, positions): rl.LoReFT(D, rank=2)})
    reft.reset(0)
    return reft


def own(logits, batch):
    """An objective of the user's own, whose scores are not kept."""
    from reftlens.scoring.objectives import cross_entropy

    return cross_entropy(logits, batch)


own.per_target = True


def losses(model, data, reft=None, objective=own, **settings):
    import reftlens as rl

    reuse = rl.training.Reuse(verify=False, **settings) if settings.pop("reuse", True) else False
    return rl.evaluate(reft or edit(), model, data, [0, 1], objective=objective, reuse=reuse, progress=False)


def fresh(model, data, reft=None):
    """Without a memory."""
    return losses(model, data, reft, remember=False)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_the_next_call_captures_nothing_and_has_the_same_numbers(architecture, captured):
    import reftlens as rl

    model, data = bridge(architecture), data_of(bridge(architecture))
    rl.fit(edit(), model, data, steps=2, reuse=rl.training.Reuse(verify=False), progress=False)
    assert sorted(set(captured)) == [0, 1, 2]
    captured.clear()
    rl.fit(edit(), model, data, steps=2, reuse=rl.training.Reuse(verify=False), progress=False)
    assert sorted(set(captured)) == [0, 1, 2]  # training takes none: its bits depend on no earlier call
    captured.clear()
    for part in (data, data[[2, 0]], replace(data), data_of(model)[[1]]):
        result = losses(model, part)
        assert close(result.loss, fresh_loss(model, part, captured)) and captured == []
        assert f"{len(part)} rows of it from earlier calls" in result.computation
    later = edit(positions="response")  # begins after what was captured ends
    assert close(losses(model, data, later).loss, fresh(model, data, later).loss) and captured


def close(measured, expected):
    """But for rounding: a row that was extended was not computed in the company that it has when captured anew."""
    return torch.allclose(measured, expected, rtol=1e-6, atol=0)


def fresh_loss(model, data, captured):
    before = list(captured)
    loss = fresh(model, data).loss
    captured[:] = before
    return loss


def places(*places):
    """Sites after blocks, or before the first one (-1), at positions."""
    import reftlens as rl

    return [rl.resid_pre(0, where) if layer < 0 else rl.resid_post(layer, where) for layer, where in places]


def scores(model, data, sites, **settings):
    """Losses under edits at some sites together, and under each of several alone."""
    import reftlens as rl

    reft = rl.ReFT({site: rl.LoReFT(D, rank=2) for site in sites})
    reft.reset(0)
    alone = [rl.Variant(sites=[i]) for i in range(len(sites))]
    reuse = rl.training.Reuse(verify=False, **settings)
    reft = reft.to(model.cfg.dtype)
    variants = [1, *alone[: len(sites) * (len(sites) > 1)]]
    return rl.evaluate(reft, model, data, variants, objective=own, reuse=reuse, progress=False)


TWO = (0, "l3"), (1, "last")
NEEDS = {
    "both": ([(0, "l3")], TWO, "extended"),
    "keys of later tokens": ([(0, "l3")], [(0, "last")], "extended"),
    "a stream higher up": ([(0, "l3")], [(1, "l3")], "extended"),
    "a stream between two": ([(0, "l3"), (2, "l3")], [(1, "l3")], "extended"),
    "the stream that the final norm takes": ([(0, "l3")], [(2, "last")], "extended"),
    "from the embedding": ([(-1, "l3")], TWO, "extended"),
    "nothing before": ([(0, [0])], TWO, "extended"),
    "one of two sites": (TWO, TWO[1:], "held"),
    "a lower block": ([(1, "l2")], [(0, "l2")], "captured"),
    "earlier tokens": ([(0, "l2")], [(0, "l3")], "captured"),
}


CASES = [("llama", name) for name in NEEDS] + [(other, "both") for other in ("gpt2", "neox", "gemma3")]


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_a_row_is_extended_from_what_is_known_or_captured_beside_it(architecture, name, captured, doubles):
    from reftlens.cone.memory import MEMORY

    model = bridge(architecture, torch.float64)
    data = data_of(model, [*ROWS, (ROWS[0][0] + " the", " cat"), (ROWS[0][0] + " a", " dog ran")])  # some begin alike
    before, after, how = places(*NEEDS[name][0]), places(*NEEDS[name][1]), NEEDS[name][2]
    expected = scores(model, data, after, remember=False)
    scores(model, data, before)
    captured.clear()
    measured = scores(model, data, after)
    assert (measured.loss - expected.loss).abs().max() < 1e-10
    assert ("5 rows of it from earlier calls, 5 of them extended" in measured.computation) == (how == "extended")
    assert captured == ([0, 1, 2, 3, 4] if how == "captured" else [])
    for sites in (before, after):  # both are known now
        assert scores(model, data, sites).computation.endswith("5 rows of it from earlier calls")
    assert len(captured) == (5 if how == "captured" else 0) and MEMORY.size == bytes_in(MEMORY)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_the_unedited_model_goes_through_no_block_twice(architecture, captured, doubles):
    """What the final norm takes at the targets is kept, and serves whatever is beside the unedited model next."""
    import reftlens as rl

    model = bridge(architecture, torch.float64)
    data, quiet = data_of(model), {"reuse": rl.training.Reuse(verify=False), "progress": False, "objective": own}
    some, other = edit(0, "l2").to(torch.float64), edit(1).to(torch.float64)
    expected = rl.evaluate(some, model, data, [0], reuse=False, progress=False).loss
    rl.evaluate(some, model, data, **quiet)
    captured.clear()
    result = rl.evaluate(other, model, data, [0], **quiet)
    assert captured == [] and (result.loss - expected).abs().max() < 1e-10
    assert result.computation.startswith("light cone: no block, 16 of") and "extended" not in result.computation


def bytes_in(memory):
    """All tensors that are kept, each once."""
    parts = [part for several in memory._rows.values() for known in several for part in known.captured.parts]
    tensors = {t.data_ptr(): t for part in parts for t in part.pool.tensors() if t.numel()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def by_data(model, data):
    model.original_model.lm_head.weight.data[3, 1] += 0.5


def by_place(model, data):
    with torch.no_grad():
        model.original_model.model.layers[0].mlp.original_component.up_proj.weight.mul_(2)


def by_tokens(model, data):
    data.tokens[0, 1] = data.tokens[0, 2]


def by_dtype(model, data):
    model.original_model.to(torch.bfloat16)


def by_attention(model, data):
    model.original_model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("change", [by_data, by_place, by_tokens, by_dtype, by_attention])
def test_what_was_changed_in_place_is_captured_anew(change, captured):
    model = fresh_bridge("llama")
    data = data_of(model)
    losses(model, data, edit(0, "l2"))
    captured.clear()
    before = losses(model, data).loss
    assert captured == []  # extended
    change(model, data)
    after = losses(model, data).loss
    assert captured == ([0] if change is by_tokens else [0, 1, 2])
    assert (close if change is by_tokens else torch.equal)(after, fresh(model, data).loss)
    if change is not by_attention:
        assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-6)


def test_a_hook_of_the_users_own_is_seen(captured):
    model = fresh_bridge("llama")
    data = data_of(model)
    losses(model, data)
    model.original_model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: 2 * out)
    result = losses(model, data)
    assert "another hook is active" in result.computation


@pytest.fixture
def scored(monkeypatch):
    """Collects how many rows are scored under each strength."""
    from reftlens.cone.scorer import Scorer

    rows, score = [], Scorer.score

    def counted(self, jobs, **settings):
        jobs = list(jobs)
        rows.extend((self.plans[job.plan].variant.strength, len(job.rows)) for job in jobs)
        return score(self, jobs, **settings)

    monkeypatch.setattr(Scorer, "score", counted)
    return rows


def asked(model, data, reft, strengths=(0.5, 1), **settings):
    """What each strength does."""
    import reftlens as rl
    from reftlens.cone.plans import plans_of
    from reftlens.scoring.responses import responses

    plans, reuse = (
        plans_of(reft, {str(s): rl.Variant(s) for s in strengths}),
        rl.training.Reuse(verify=False, **settings),
    )
    return responses(model, data, plans, reuse=reuse, progress=False)


def assert_same(a, b, *, rows=slice(None), alone=False):
    """To the bit; a row computed in other company differs by rounding."""
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if alone else {"rtol": 0, "atol": 0}
    for name in ("log_prob", "effect", "accuracy", "kl", "unedited_accuracy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name)[..., rows], **tolerance)


def by_parameter(model, data, reft):
    with torch.no_grad():
        reft[0].b[1] += 1e-3


def by_target(model, data, reft):
    data.target_mask[0, data.attention_mask[0].sum() - 1] = False


def by_configuration(model, data, reft):
    model.original_model.config.rms_norm_eps = 1e-5


CHANGES = {
    by_parameter: [(0, 3), (0.5, 3), (1, 3)],
    by_configuration: [(0, 3), (0.5, 3), (1, 3)],
    by_target: [(0, 1), (0.5, 1), (1, 1)],
    by_tokens: [(0, 1), (0.5, 1), (1, 1)],
    by_data: [(0, 3), (0.5, 3), (1, 3)],
    by_dtype: [(0, 3), (0.5, 3), (1, 3)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_scores_are_read_until_something_that_decides_them_changes(change, scored):
    model = fresh_bridge("llama")
    data, reft = data_of(model), edit()
    first = asked(model, data, reft)
    assert scored == [(0, 3), (0.5, 3), (1, 3)] and "earlier" not in first.computation
    assert_same(first, asked(model, data, reft, remember=False))
    scored.clear()
    again, some = asked(model, data, edit()), asked(model, data[[2, 0]], reft)
    assert scored == [] and again.computation == "9 of 9 scores from earlier calls" and again.reused
    assert_same(again, first)
    assert_same(some, first, rows=[2, 0])
    change(*(model, data, reft)[: change.__code__.co_argcount])
    changed = asked(model, data, reft)
    assert scored == CHANGES[change]
    assert_same(changed, asked(model, data, reft, remember=False), alone=len(data) > scored[0][1])


def test_losses_are_read_as_well_unless_the_objective_is_the_users_own(scored):
    from reftlens.scoring.objectives import cross_entropy

    model = bridge("llama")
    data = data_of(model)
    for objective, again in ((cross_entropy, []), (own, [(0, 3), (1, 3)])):
        first = losses(model, data, objective=objective)
        scored.clear()
        second = losses(model, data, objective=objective)
        assert scored == again and ("6 of 6 scores" in second.computation) == (not again)
        assert torch.equal(first.loss, second.loss) and torch.equal(first.accuracy, second.accuracy)


def test_only_what_is_not_known_is_scored_and_never_what_was_scored_otherwise(scored):
    import reftlens as rl

    model = bridge("llama")
    data, reft = data_of(model), edit()
    asked(model, data[:2], reft)
    scored.clear()
    asked(model, data, reft)
    assert scored == [(0, 1), (0.5, 1), (1, 1)]
    asked(model, data, reft, [1, -2, 0, 0.5])  # the unedited model, which divergence is from, is computed with the new
    assert scored[3:] == [(0, 3), (-2, 3)]
    for settings in ({"half": True}, {"plain": False}):
        scored.clear()
        result = asked(model, data, reft, **settings)
        assert scored == [(0, 3), (0.5, 3), (1, 3)]
        assert_same(result, asked(model, data, reft, remember=False, **settings))
    scored.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        asked(model, data, reft)
    rl.training.forget()
    asked(model, data, reft)
    assert scored == [(0, 3), (0.5, 3), (1, 3)] * 2


def test_rows_in_which_two_variants_are_one_computation_are_scored_once(scored):
    """A token that only some rows have: in the others leaving it out is the whole edit, and it alone is nothing."""
    import reftlens as rl

    model, data, reft = bridge("gpt2"), data_of(bridge("gpt2")), edit(positions="all")
    far = rl.positions.Nth(-10, missing="skip")
    result = rl.effects(
        reft, model, data, positions={"far": far}, reuse=rl.training.Reuse(remember=False), progress=False
    )
    long = int((data.prompt_mask.sum(dim=1) >= 10).sum())
    assert 0 < long < 3 and [n for _, n in scored] == [3, 3, long, long]
    short = data.prompt_mask.sum(dim=1) < 10
    assert (result.alone[0, short] == 0).all() and torch.equal(result.left_out[0, short], result.whole[short])


def test_nothing_is_kept_of_what_cannot_be_vouched_for(scored):
    import reftlens as rl

    class Doubled(rl.LoReFT):
        kind = "Doubled"

    def own(reft):
        return rl.ReFT({reft.sites[0]: Doubled(D, rank=2)})

    def hooked(reft):
        reft[0].register_forward_hook(lambda module, inputs, out: out)
        return reft

    def patched(reft):
        reft[0].code = lambda h, basis: torch.zeros_like(h[..., :2])
        return reft

    model = fresh_bridge("llama")
    data = data_of(model)
    exchange = rl.ReFT({rl.resid_post(1, "last"): rl.Interchange(D)})
    asked(model, data, edit())
    for reft, rows in (
        (own(edit()), data),
        (hooked(edit()), data),
        (patched(edit()), data),
        (exchange, data.resampled()),
    ):
        for _ in range(2):
            scored.clear()
            asked(model, rows, reft, [1])
            assert scored == [(0, 3), (1, 3)]
    asked(model, data, edit())
    model.original_model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: 2 * out)
    scored.clear()
    asked(model, data, edit())
    assert scored == [(0, 3), (0.5, 3), (1, 3)]


def test_nothing_is_kept_of_a_model_that_is_gone(captured):
    import gc

    from reftlens.cone.memory import MEMORY

    model = fresh_bridge("llama")
    losses(model, data_of(model))
    assert MEMORY.size > 0
    del model
    gc.collect()
    assert MEMORY.size == 0


def test_two_models_do_not_mix(captured):
    one, other = fresh_bridge("llama"), fresh_bridge("llama")
    with torch.no_grad():
        other.original_model.lm_head.weight.mul_(2)
    data = data_of(one)
    first, second = losses(one, data).loss, losses(other, data).loss
    assert captured == [0, 1, 2] * 2 and not torch.allclose(first, second)
    assert torch.equal(losses(one, data).loss, first) and torch.equal(losses(other, data).loss, second)
    assert len(captured) == 6


def test_the_budget_holds_and_what_was_not_used_for_longest_goes_first(captured):
    import reftlens as rl
    from reftlens.cone.memory import MEMORY

    model, words = bridge("llama"), ["the", "cat", "sat", "on"]
    batches = [data_of(model, [(f"{a} {b} the moon", " ran")]) for a in words for b in words]
    losses(model, batches[0])
    room = 4 * MEMORY.size
    for batch in batches:
        losses(model, batch, memory=room)
        assert 0 < MEMORY.size <= room
        losses(model, batches[0], memory=room)  # used all the time, so it stays
    captured.clear()
    losses(model, batches[0], memory=room)
    losses(model, batches[-1], memory=room)
    assert captured == []
    losses(model, batches[1], memory=room)
    assert captured == [0]
    rl.training.forget()
    assert MEMORY.size == 0
    losses(model, batches[0], memory=0)
    assert MEMORY.size == 0 and captured == [0, 0]


def test_beginnings_are_counted_once_and_kept_as_long_as_a_row_of_them(captured):
    from reftlens.cone.memory import MEMORY

    model = bridge("llama")
    shots = "the cat sat on the mat while a dog ran by the green hill and looked at the moon the cat sat on the hill "
    data = data_of(model, [(shots + end, " ran") for end in ("a dog", "the cat", "the moon", "and the hill")])
    result = losses(model, data)
    assert " distinct of " in result.computation
    shared = MEMORY.size
    captured.clear()
    assert torch.equal(losses(model, data).loss, fresh_loss(model, data, captured)) and captured == []
    losses(model, data, beginnings=False)
    assert captured == []
    MEMORY.clear()
    losses(model, data, beginnings=False)
    assert shared < 0.6 * MEMORY.size


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as figures:
        return int(figures.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_two_hundred_analyses_of_two_hundred_batches_take_no_more_than_the_budget():
    """Measured of the process: within 7 MB, and no more once it is full; 60 more with room for all hold more."""
    from random import Random

    from reftlens.cone.memory import MEMORY

    model, words, draw = bridge("llama"), ROWS[2][0].split(), Random(0)

    def growth(analyses, budget):
        before = resident()
        for n in range(analyses):
            data = data_of(model, [(" ".join(draw.choices(words, k=110)), " ran") for _ in range(4)])
            losses(model, data, edit(0, "l2"), memory=budget)
            if n % 20 == 0:
                losses(model, data, edit(1), memory=budget)  # extended
            assert MEMORY.size <= budget
        return resident() - before

    losses(model, data_of(model))
    first = growth(50, 3_000_000)
    assert first < 10_000_000 and MEMORY.size > 2_700_000
    rest = growth(150, 3_000_000)
    growth(60, 1_000_000_000)  # not measured of the process: it may have free memory of earlier tests
    assert rest < 3_000_000 and MEMORY.size > 6_000_000, (first, rest)


def test_rows_of_a_check_are_not_rows_of_an_earlier_call():
    """The first call on a model, which is checked, computes what the next one does, and says so."""
    import reftlens as rl

    model = fresh_bridge("llama")
    data = rl.encode(model, [rl.Example(f"the cat sat on {i} and", " the moon") for i in range(6)])
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, rank=1)})
    first = rl.evaluate(reft, model, data, [1], progress=False)
    rl.training.forget()
    again = rl.evaluate(reft, model, data, [1], progress=False)
    assert "light cone" in first.computation and "earlier calls" not in first.computation
    assert torch.equal(first.loss, again.loss)
