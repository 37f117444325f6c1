"""A search finds what was planted, says honestly how good it is, and spends no more than it was given."""

import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from least_executor import LeastExecutor
from planted import ANSWERS, pairs, planted

QUIET = {"progress": False}


def _rows(seed, count, noise=0.0):
    data = pairs(planted().value, count, seed)[0]
    generator = torch.Generator().manual_seed(seed + 1000)
    answers = torch.tensor(ANSWERS)[torch.randint(0, 4, (count,), generator=generator)]
    tokens = data.tokens.clone()
    wrong = torch.rand(count, generator=generator) < noise
    tokens[wrong, -1] = answers[wrong]
    return data.__class__(**{**vars_of(data), "tokens": tokens})


def vars_of(data):
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


def _search(model=None, noise=0.0, parts=True, among=None, **settings):
    import reftlens as rl

    space = rl.selection.Space(layers=(0, 2), positions=("last", "first"), ranks=(1, 2), lrs=(0.1,))
    data = [_rows(seed, count, noise).among_answers(among) for seed, count in ((1, 64), (2, 60), (3, 40))]
    rows = data if parts else [data[0].join(data)]
    config = rl.FitConfig(steps=9, batch_size=32)
    settings = {"seeds": 1, "config": config, **QUIET, **settings}
    return rl.search(model or planted().model, *rows, space=settings.pop("space", space), **settings)


@cache
def whole():
    return _search()


def test_the_planted_place_and_rank_are_recommended():
    result = whole()
    assert result.candidate.axes["positions"] == "Last(n=1)" and result.candidate.rank == 2
    assert result.test.value > 0.8 > result.unedited_test.value + 0.3
    assert result.gained.value == pytest.approx(result.test.value - result.unedited_test.value)
    assert result.gained.low > 0.3 and "nothing was found" not in str(result)
    assert result.test.count == 40 and result.steps <= result.budget
    assert abs(result.optimism.expected.value) < 0.1 and result.optimism.permuted.value < 0.6
    frame = result.to_frame()
    assert frame["chosen"].sum() == 1 and set(frame["stage"]) == {"first look", "final"}
    importance = result.importance()
    assert list(importance.index) == ["layer", "positions", "rank"] and importance["explained"].between(0, 1).all()
    assert "test" in str(result) and "controls" in result.cannot_tell
    assert "40 rows, not chosen by" in str(result) and result.rows == {"dev": 30, "test": 40}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_shuffled_labels_are_scored_among_the_answers_that_rows_are(metric):
    """The best of a few on shuffled labels scores about as chance does, not zero."""
    result = _search(metric=metric, among=ANSWERS)
    luck = result.optimism.permuted.value
    assert 0.15 < luck < 0.5 if metric == "accuracy" else -20 < luck < -1.0


def test_the_code_of_the_recommendation_trains_it_again():
    """On the same rows, up to the rounding of shared passes."""
    result = whole()
    names = {"model": planted().model, "train": _rows(1, 64)}
    exec(
        result.code.replace("rl.fit(", "rl.fit(progress=False, reft=").replace(
            "reft=reft, model, train", "reft=reft, model=model, data=train"
        ),
        names,
    )
    for mine, theirs in zip(names["reft"].parameters(), result.recommended.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert names["variant"] == result.variant.strength


def own_kind():
    """A class of this module's, as one of the reader's own."""
    import reftlens as rl

    class Own(rl.LoReFT):
        kind = "Own"

    Own.__qualname__ = "Own"
    globals()["Own"] = Own
    return Own


def test_the_code_spells_gates_with_what_they_were_given_classes_of_ones_own_and_the_objective():
    import reftlens as rl

    class Halved(rl.training.Objective):
        def losses(self, predictions):
            return -predictions.log_probs / 2

    model, own = planted().model, own_kind()
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    kinds = {"own": lambda d, rank: rl.interventions.Gated(own(d, rank), rl.interventions.Threshold(direction))}
    space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1,), lrs=(0.1,), kinds=kinds)
    rows = [replace(_rows(seed, 30), sources={}) for seed in (1, 2, 3)]
    settings = {"space": space, "seeds": 1, "config": rl.FitConfig(steps=3, batch_size=30), "objective": Halved()}
    result = rl.search(model, *rows, **settings, **QUIET)
    found = {"model": model, "train": rows[0], "result": result}
    code = result.code.replace("model, train, ", "model, train, progress=False, ")
    with pytest.raises(NameError, match="objective"):
        exec(code, dict(found))
    found["objective"] = Halved()
    exec(code, found)
    for mine, theirs in zip(found["reft"].state_dict().values(), result.recommended.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert found["reft"][0].gate.direction.any() and found["run"].objective == result.objective.name


def test_a_search_can_be_looked_at():
    for of in ("frontier", "map"):
        assert whole().plot(of=of).get_xlabel()
    with pytest.raises(ValueError, match="expected one of 'frontier', 'map'"):
        whole().plot(of="scores")


def test_with_nothing_to_find_the_test_score_is_that_of_chance():
    result = _search(noise=1.0)
    assert result.test.low <= 0.25 <= result.test.high
    assert result.gained.low <= 0 and "nothing was found: on the test rows" in str(result)
    assert result.dev.value - result.optimism.expected.value == pytest.approx(0.25, abs=0.2)


def _model():
    return planted().model


def test_a_search_goes_on_where_it_was_stopped_and_an_executor_changes_nothing(tmp_path, monkeypatch):
    """Nor does the way to another process: a piece of work is complete in itself."""
    from reftlens.errors import CheckpointMismatch
    from reftlens.selection import work

    real, calls, uninterrupted = work.outcomes_of, [], whole()

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(work, "outcomes_of", failing)
    with pytest.raises(KeyboardInterrupt):
        _search(checkpoint=tmp_path / "search.ckpt")
    calls.clear()
    monkeypatch.setattr(work, "outcomes_of", lambda piece: calls.append(0) or real(pickle.loads(pickle.dumps(piece))))
    with ThreadPoolExecutor(2) as executor:
        same(_search(_model, checkpoint=tmp_path / "search.ckpt", executor=executor), uninterrupted)
        assert len(calls) == 2, "two rungs were there, one and the finals were not"
        with pytest.raises(ValueError, match="an executor needs model="):
            _search(executor=executor)
    with pytest.raises(CheckpointMismatch, match="its seeds differ"):
        _search(checkpoint=tmp_path / "search.ckpt", seed=1)
    (tmp_path / "other").write_text("no search")
    with pytest.raises(CheckpointMismatch, match="no checkpoint that search wrote"):
        _search(checkpoint=tmp_path / "other")


def test_what_submits_work_and_gives_its_result_is_an_executor():
    same(_search(_model, executor=LeastExecutor()), whole())


def test_a_checkpoint_belongs_to_the_settings_of_its_objective(tmp_path, monkeypatch):
    import reftlens as rl
    from reftlens.errors import CheckpointMismatch
    from reftlens.selection import work

    class Scaled(rl.training.Objective):
        def __init__(self, factor):
            self.factor = factor

        def losses(self, predictions):
            return -self.factor * predictions.log_probs

    def interrupted(self, *arguments, put=work.Journal.put):
        put(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(work.Journal, "put", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _search(objective=Scaled(1.0), checkpoint=tmp_path / "search.ckpt")
    with pytest.raises(CheckpointMismatch, match="its objective differ"):
        _search(objective=Scaled(2.0), checkpoint=tmp_path / "search.ckpt")


def test_a_checkpoint_belongs_to_the_settings_of_its_kinds(tmp_path):
    import reftlens as rl
    from reftlens.errors import CheckpointMismatch

    def search(activation):
        kinds = {"LoReFT": partial(rl.LoReFT, activation=activation)}
        space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1,), lrs=(0.1,), kinds=kinds)
        rows = [replace(_rows(seed, 30), sources={}) for seed in (1, 2, 3)]
        settings = {"seeds": 1, "config": rl.FitConfig(steps=1), "checkpoint": tmp_path / "search.ckpt"}
        return rl.search(planted().model, *rows, space=space, **settings, **QUIET)

    same(search("linear"), search("linear"))
    with pytest.raises(CheckpointMismatch, match="its kinds differ"):
        search("relu")


def test_a_checkpoint_belongs_to_what_kinds_are_given_beside_their_settings(tmp_path):
    import reftlens as rl
    from reftlens.errors import CheckpointMismatch

    def search(direction):
        gate = rl.interventions.Threshold(direction)
        kinds = {"gated": lambda d, rank: rl.interventions.Gated(rl.LoReFT(d, rank), gate)}
        space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1,), lrs=(0.1,), kinds=kinds)
        rows = [replace(_rows(seed, 30), sources={}) for seed in (1, 2, 3)]
        settings = {"seeds": 1, "config": rl.FitConfig(steps=1), "checkpoint": tmp_path / "search.ckpt"}
        return rl.search(planted().model, *rows, space=space, **settings, **QUIET)

    first, second = torch.eye(planted().model.cfg.d_model)[:2]
    same(search(first), search(first))
    with pytest.raises(CheckpointMismatch, match="its kinds differ"):
        search(second)


def same(a, b):
    assert a.trials == b.trials and a.settings == b.settings and a.test == b.test
    assert all(torch.equal(x, y) for x, y in zip(a.recommended.parameters(), b.recommended.parameters(), strict=True))


def test_the_budget_is_kept_or_refused():
    from reftlens.selection.halving import schedule_of

    for budget in (3500, 5000, 20000, None):
        plan = schedule_of(budget, 60, 1152, 96, 2)
        assert plan.steps <= (budget or 1e9) and 96 <= plan.first <= 1152
    with pytest.raises(ValueError, match=r"budget=100 optimizer steps, expected \d+ or more: 96 places"):
        schedule_of(100, 60, 1152, 96, 2)
    assert schedule_of(None, 60, 5, 5, 1).second == 0
    with pytest.raises(ValueError, match="expected 10 or more"):
        schedule_of(9, 3, 2, 1, 1)
    assert schedule_of(10, 3, 2, 1, 1).steps == 10, "trying both at once takes less than one first"


def test_a_part_of_the_space_is_tried_evenly():
    import reftlens as rl
    from reftlens.selection.space import drawn

    space = rl.selection.Space(layers=(0, 1, 2), positions=("last", "first"), ranks=(1, 2, 4), lrs=(1e-3, 1e-2, 1e-1))
    model, data = planted().model, _rows(1, 8)
    every = space.filled(model, data).candidates(rl.hooks(model))
    assert len(every) == 54 and drawn(every, 99, 0) == every
    some = drawn(every, 18, 0)
    assert len(set(some)) == 18
    for axis in ("layer", "positions", "rank", "lr"):
        values = [candidate.axes[axis] for candidate in some]
        counts = [values.count(value) for value in set(values)]
        assert max(counts) - min(counts) <= 1, axis
    assert all(len({c.rank for c in some if c.sites == place}) == 3 for place in {c.sites for c in some})


def test_what_the_space_does_not_say_follows_from_model_and_data():
    import reftlens as rl

    model, data = planted().model, _rows(1, 8)
    filled = rl.selection.Space().filled(model, data)
    assert filled.layers == (0, 1, 2) and [str(p) for p in filled.positions] == [f"Nth(k={k})" for k in range(4)]
    assert list(filled.kinds) == ["DAS"] and filled.strengths == (1.0,)
    text = rl.encode(
        model, [rl.Example("the cat sat on the mat", " a"), rl.Example("a dog and a cat ran by the green mat", " a")]
    )
    plain = rl.selection.Space().filled(model, text)
    assert [str(p.left.text) for p in plain.positions[3:]] == ["mat", "cat"]
    assert list(plain.kinds) == ["LoReFT"] and {1.0, -1.0} < set(plain.strengths)
    exchange = {"all": lambda d, rank: rl.Interchange(d), "some": rl.DAS}
    assert rl.selection.Space(kinds=exchange).filled(model, data).strengths == (1.0,)
    with_another = rl.selection.Space(kinds=exchange | {"other": rl.LoReFT}).filled(model, data)
    assert with_another.strengths == plain.strengths
    with pytest.raises(ValueError, match="with resid_post, which has none: attn_q"):
        rl.selection.Space(heads=[0])
    with pytest.raises(ValueError, match="strengths hold 0"):
        rl.selection.Space(strengths=(0.0, 1.0))


def test_positions_that_cannot_be_exchanged_are_not_suggested():
    import reftlens as rl

    model = planted().model
    rows = rl.encode(model, [rl.Example("the cat sat here", " a"), rl.Example("the cat ran by a mat here", " a")])
    longer = rl.encode_prompts(model, ["the cat and a dog sat here", "the cat ran by all of my mats here"])
    positions = rl.selection.Space().filled(model, rows.with_sources(longer)).positions
    assert "Prompt()" not in map(str, positions) and "Last(n=1)" in map(str, positions)
    assert [p.left.text for p in positions[2:]] == ["here"], "up to the cat all rows read alike"


def test_rows_that_share_a_prompt_stay_together():
    import reftlens as rl
    from reftlens.selection.splitting import check_apart

    data = _rows(1, 50)
    twice = data.join([data, data])
    split = rl.selection.split(twice, seed=3)
    parts = [split.train, split.dev, split.test]
    assert sorted(row for part in parts for row in part) == list(range(100)) and split.groups == 50
    assert [len(part) for part in parts] == [60, 20, 20]
    for part in parts:
        assert {row % 50 for row in part} == {row for row in part if row < 50}
    assert rl.selection.split(twice, seed=4).train != split.train
    with pytest.warns(UserWarning, match="50 row"):
        check_apart({"train": data, "dev": data[:10].join([data, data]), "test": _rows(9, 4)})


def test_too_few_rows_to_choose_by_are_refused():
    import reftlens as rl

    model, data = planted().model, _rows(1, 64)
    with pytest.raises(ValueError, match=r"1\d dev row\(s\) in 1\d group\(s\) .*, expected 30 or more"):
        rl.search(model, data, **QUIET)
    same = [0] * 40
    with pytest.raises(ValueError, match=r"40 dev row\(s\) in 1 group\(s\)"):
        rl.search(model, data, _rows(2, 30)[same], _rows(3, 30), **QUIET)
    with pytest.raises(ValueError, match=r"40 test row\(s\) that share one prompt"):
        rl.search(model, data, _rows(2, 30), _rows(3, 30)[same], **QUIET)
    with pytest.raises(ValueError, match=r"0 dev row\(s\) in 0 group\(s\)"):
        rl.search(model, data[same], **QUIET)
    with pytest.raises(ValueError, match="sites hold an entry without a site"):
        rl.selection.Space(sites=[rl.resid_post(0, "last"), ()])
    with pytest.raises(ValueError, match="one of dev and test is missing"):
        rl.search(model, data, data, **QUIET)
    with pytest.raises(ValueError, match="metric='precision', expected one of"):
        rl.search(model, data, _rows(2, 30), _rows(3, 30), metric="precision", **QUIET)
    with pytest.raises(ValueError, match=r"DPO.* groups of 2, and candidates are compared by how likely"):
        rl.search(model, data, _rows(2, 30), _rows(3, 30), objective=rl.training.DPO(), **QUIET)


def _options(options, rows, seed, effect=0.0, repeat=1):
    from reftlens.selection import Options

    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, rows + 500, generator=generator, dtype=torch.float64)
    scores = 0.7 * common + 0.7 * torch.randn(options, rows + 500, generator=generator, dtype=torch.float64)
    scores[0] += effect
    dev = scores[:, :rows].repeat_interleave(repeat, dim=1)
    group = torch.arange(rows).repeat_interleave(repeat)
    size = torch.arange(options) % 4
    return Options(dev, dev, torch.zeros_like(dev), torch.inf, size, group), scores[:, rows:].mean(dim=1)


@pytest.mark.parametrize("effect", [0.0, 3.0], ids=["all alike", "one is better"])
def test_optimism_is_how_much_too_good_the_choice_looks(effect):
    """On average over tasks; without it the score is too good where there is nothing to find, and right else."""
    from reftlens.selection import optimism

    naive, honest = [], []
    for seed in range(50):
        options, truth = _options(16, 30, seed, effect)
        chosen = options.chosen(torch.ones(30, dtype=torch.float64))
        naive.append((options.first[chosen].mean() - truth[chosen]).item())
        honest.append(naive[-1] - optimism(options, resamples=40).value)
    assert abs(sum(honest) / 50) < 0.06
    assert (sum(naive) / 50 > 0.1) == (effect == 0.0)


def test_rows_of_one_group_count_once():
    from reftlens.selection import optimism

    once, twice = (_options(8, 30, 5, repeat=n)[0] for n in (1, 2))
    assert optimism(once, resamples=50).value == pytest.approx(optimism(twice, resamples=50).value)


def test_a_budget_of_divergence_is_kept_where_it_can_be():
    import reftlens as rl

    free = whole()
    kl = next(s.kl for s in free.settings if s.chosen)
    space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(2,), lrs=(0.1,), strengths=(0.2, 1.0))
    bound = _search(space=space, within={"kl": kl / 4}, seeds=2)
    assert next(s.kl for s in bound.settings if s.chosen) <= kl / 4 and bound.variant.strength == 0.2
    assert "nothing keeps the budget" not in str(bound)
    over = _search(space=space, within={"kl": kl / 1e6}, seeds=1)
    assert f"nothing keeps the budget: this is what costs least, {over.settings[0].kl:.3g}" in str(over)
    assert over.settings[0].chosen and not any(s.within for s in over.settings)
    with pytest.raises(ValueError, match="within: name='bits'"):
        _search(within={"bits": 1.0})


def test_divergence_is_over_all_tokens_whatever_rows_are_scored_among():
    from reftlens.cone.plans import Plan
    from reftlens.cone.reuse import Reuse
    from reftlens.selection.metrics import measures

    rows, plans, settings = _rows(2, 8), [Plan(whole().recommended)], {"batch_size": 8, "reuse": Reuse()}
    every = measures(planted().model, rows, plans, **settings)
    few = measures(planted().model, rows.among_answers(ANSWERS), plans, **settings)
    torch.testing.assert_close(every[2], few[2])
    assert (every[0] < few[0]).all()


def test_what_is_written_can_be_scored():
    import reftlens as rl

    model = planted().model
    rows = [_rows(seed, 30) for seed in (1, 2, 3)]
    rows = [batch.__class__(**{**vars_of(batch), "sources": {}}) for batch in rows]
    space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1,), lrs=(1e-2,), strengths=(-1.0, 1.0))
    settings = {"config": rl.FitConfig(steps=3), "seeds": 1, "decoding": rl.Decoding(max_new_tokens=2), **QUIET}
    result = rl.search(model, *rows, space=space, metric=lambda text: float(len(text) > 0), **settings)
    assert 0 <= result.test.value <= 1 and result.optimism.permuted is None
    assert "what is written" in str(result)


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, "good"])
def test_a_score_of_a_text_that_is_no_number_is_refused(value):
    """It would be compared with others, and the edit of the first text that has none recommended."""
    import reftlens as rl

    rows = [replace(_rows(seed, 30), sources={}) for seed in (1, 2, 3)]
    space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1,), lrs=(1e-2,), strengths=(1.0,))
    settings = {"config": rl.FitConfig(steps=1), "seeds": 1, "decoding": rl.Decoding(max_new_tokens=2), **QUIET}
    with pytest.raises(ValueError, match=r"the score of '.*' is .*, expected a finite number"):
        rl.search(planted().model, *rows, space=space, metric=lambda text: value, **settings)


def test_a_budget_of_perplexity_is_kept_by_the_last_choice_which_is_the_first_to_write():
    import reftlens as rl

    model, rows = planted().model, [_rows(seed, 30) for seed in (1, 2, 3)]
    rows = [batch.__class__(**{**vars_of(batch), "sources": {}}) for batch in rows]
    space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1,), lrs=(0.1,), strengths=(-1.0, 0.2, 4.0))
    settings = {"config": rl.FitConfig(steps=9), "seeds": 1, "decoding": rl.Decoding(max_new_tokens=3), **QUIET}
    settings |= {"space": space, "metric": lambda text: -float(len(text))}
    free = rl.search(model, *rows, within={"perplexity": 1e9}, **settings)
    costs = sorted(setting.cost for setting in free.settings)
    limit = (costs[0] + costs[-1]) / 2
    bound = rl.search(model, *rows, within={"perplexity": math.exp(limit)}, **settings)
    assert [s.within for s in bound.settings] == [s.cost <= limit for s in bound.settings]
    assert costs[0] < limit and not all(s.within for s in bound.settings) and all(s.within for s in free.settings)
    assert next(s for s in bound.settings if s.chosen).within
    assert bound.trials == free.trials, "before it, those that are written with were compared without"


def test_a_factory_that_gives_another_rank_than_it_is_asked_for_is_asked_for_the_same_again():
    """Two variables of rank 1 are an edit of rank 2, which is trained as such."""
    import reftlens as rl

    def two(batch):
        source = batch.sources["source"]
        return batch.with_sources({name: (source.batch, source.rows) for name in "ab"})

    kinds = {"DAS": lambda d, rank: rl.DAS(d, variables={"a": rank, "b": rank})}
    space = rl.selection.Space(layers=(2,), positions=("last",), ranks=(1, 2), lrs=(0.1,), kinds=kinds)
    rows = [two(_rows(seed, 30)) for seed in (1, 2, 3)]
    result = rl.search(planted().model, *rows, space=space, seeds=1, config=rl.FitConfig(steps=1), **QUIET)
    assert {trial.candidate.rank for trial in result.trials} == {2, 4}
    assert result.candidate.rank == result.recommended[0].rank == result.candidate.asked * 2
