"""The search over a method's settings: what is tried, chosen and paid, and that it goes on when killed."""

from itertools import product

import pytest
from test_methods import _config, _data, _subject


@pytest.fixture
def parts():
    subject = _subject()
    data = _data(subject, rows=9)
    return subject, data[:6], data[6:]


def test_the_spaces_of_lora_and_reft_cost_the_same():
    from reftlens.experiments.methods import Reft
    from reftlens.experiments.methods.spaces import lora_space, reft_space

    assert lora_space().trials == 9
    for name, depth in product(("LoReFT", "DiReFT", "RED", "ConsReFT"), (None, 2, 30)):
        space = reft_space(Reft(name), depth)
        settings = list(space.settings(lambda some: some[-1]))
        assert space.trials == len(settings) == 9
        assert len({repr(sorted(each.items(), key=str)) for each in settings}) == 9
    grid = list(lora_space().settings(lambda some: some[0]))
    assert {(each["rank"], each["lr"]) for each in grid} == {(r, lr) for r in (2, 8, 32) for lr in (1e-4, 3e-4, 1e-3)}


def test_a_staged_search_keeps_the_best_value_of_each_field():
    from reftlens.experiments.methods import Reft
    from reftlens.experiments.methods.spaces import Space

    space = Space(Reft(), {"lr": (1, 2, 3), "positions": ("a", "b"), "rank": (4, 8)}, staged=True)
    worth = {"lr": {1: 0, 2: 5, 3: 1}, "positions": {"a": 0, "b": 2}, "rank": {4: 3, 8: 0}}
    tried = []

    def best(some):
        assert all(each in tried for each in some)
        return max(some, key=lambda each: sum(worth[name][value] for name, value in each.items()))

    for setting in space.settings(best):
        tried.append(setting)
    assert [tuple(each.values()) for each in tried] == [(1, "a", 4), (2, "a", 4), (3, "a", 4), (2, "b", 4), (2, "b", 8)]


def test_the_setting_that_scores_most_on_dev_rows_is_chosen_and_trains_again(parts):
    from reftlens.experiments import search_settings
    from reftlens.experiments.methods import Lora, Space

    pytest.importorskip("peft")
    subject, data, dev = parts
    arguments = (Space(Lora(), {"rank": (1, 4), "lr": (1e-5, 1e-2)}), subject, data, dev, _config(steps=5))
    found = search_settings(*arguments, seed=2, progress=False)
    assert len(found.trials) == 4 and found.row_updates == 4 * 5 * 2 and found.dev_rows == 3
    assert found.best.worth == max(t.worth for t in found.trials)
    rank, lr = found.best.setting["rank"], found.best.setting["lr"]
    again = Lora(rank=rank).fit(subject, data, _config(steps=5, lr=lr), seed=2, progress=False)
    score = (again.log_probs(dev).sum() / dev.target_mask.sum()).item()
    assert score == pytest.approx(found.best.score, abs=1e-6)
    assert f"{found.row_updates:,} row-updates" in str(found) and len(found.to_frame()) == 4
    smallness = {"score": lambda trained: -trained.parameters, "measure": "smallness"}
    worst = search_settings(*arguments, seed=2, **smallness, progress=False)
    assert worst.best.setting == {"rank": 1, "lr": 1e-5} and "smallness of each" in str(worst)


def test_a_search_that_was_killed_goes_on_and_a_finished_one_is_read(parts, tmp_path, monkeypatch):
    import reftlens as rl
    from reftlens.experiments import search_settings
    from reftlens.experiments.methods import Reft, Space

    subject, data, dev = parts
    space = Space(Reft(rank=1), {"lr": (1e-3, 1e-2), "layers": ((0,), (0, 1))}, staged=True)
    whole = search_settings(space, subject, data, dev, _config(), progress=False)
    fits, fit = [], Reft.fit

    def killed(self, *args, **settings):
        fits.append(1)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return fit(self, *args, **settings)

    monkeypatch.setattr(Reft, "fit", killed)
    arguments = (space, subject, data, dev, _config())
    with pytest.raises(KeyboardInterrupt):
        search_settings(*arguments, folder=tmp_path, progress=False)
    again = search_settings(*arguments, folder=tmp_path, progress=False)
    assert len(fits) == 4 and [t.score for t in again.trials] == [t.score for t in whole.trials]
    assert str(search_settings(*arguments, folder=tmp_path, progress=False)) == str(whole) and len(fits) == 4
    with pytest.raises(rl.errors.StoreMismatch, match=r"search.json is of another search \(seed: 0 there, 5 now\)"):
        search_settings(*arguments, seed=5, folder=tmp_path, progress=False)
    wider = Space(Reft(rank=1), {"lr": (1e-3, 1e-2, 1e-1), "layers": ((0,), (0, 1))}, staged=True)
    with pytest.raises(rl.errors.StoreMismatch, match=r"another search .space: "):
        search_settings(wider, *arguments[1:], folder=tmp_path, progress=False)
    (tmp_path / "search.json").write_text('{"tried": [{"score": 1.0}]}')
    with pytest.raises(rl.errors.StoreMismatch, match=r"search\.json is no search .*'setting'"):
        search_settings(*arguments, folder=tmp_path, progress=False)


def test_settings_that_there_are_not_and_scores_that_are_no_numbers_are_refused(parts):
    import reftlens as rl
    from reftlens.experiments import search_settings
    from reftlens.experiments.methods import Lora, Reft, Space

    subject, data, dev = parts
    with pytest.raises(ValueError, match="LoRA has no setting 'positions', expected of rank"):
        Space(Lora(), {"positions": ("l1",), "lr": (1,)})
    with pytest.raises(ValueError, match="choices name no lr"):
        Space(Lora(), {"rank": (1,)})
    space = Space(Reft(rank=1), {"lr": (1e-3,)})
    with pytest.raises(rl.errors.NotFinite, match="none of 1 settings has a finite score"):
        search_settings(space, subject, data, dev, _config(steps=1), score=lambda t: float("nan"), progress=False)
