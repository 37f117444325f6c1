"""Maps: the planted place is found, cells are those of separate runs, and a map goes on where it was stopped."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from least_executor import LeastExecutor
from planted import VALUES, pairs, planted

CONFIG = dict(steps=15, lr=5e-2, batch_size=64)


def _loaded():
    return planted().model


def _map(model=None, positions=("last", "first"), layers=(0, 2), **kwargs):
    import reftlens as rl

    value = planted().value
    train, test = pairs(value, 128, 1, list(VALUES)[:200])[0], pairs(value, 60, 2, list(VALUES)[200:])[0]
    settings = dict(layers=layers, positions=positions, ranks=(0, 2), shuffles=99, progress=False)
    config = rl.FitConfig(**CONFIG)
    return rl.interchange_map(model or planted().model, train, test, config=config, **{**settings, **kwargs})


def test_the_variable_is_at_the_last_token_and_nowhere_else():
    grid = _map()
    cell, accuracy = grid.best
    assert cell.position == "last" and accuracy.value > 0.8
    frame = grid.to_frame().set_index(["layer", "position", "rank"])
    for layer in (0, 2):
        assert frame.loc[(layer, "last", 0), "accuracy"] == 1.0
        assert frame.loc[(layer, "last", 2), "p_holm"] < 0.1
        for rank in (0, 2):
            assert frame.loc[(layer, "first", rank), "accuracy"] == pytest.approx(grid.unedited, abs=0.2)
            assert frame.loc[(layer, "first", rank), "p_holm"] > 0.1
    assert grid.accuracy(2).shape == (2, 2)
    assert grid.plot().get_xlabel() == "position"


def test_a_cell_is_what_a_separate_run_gives():
    import reftlens as rl

    grid = _map(positions=("last",), layers=(1,), ranks=(2,), seeds=(3,))
    (cell,) = grid.cells
    truth = planted()
    train, test = (
        pairs(truth.value, n, s, t)[0] for n, s, t in ((128, 1, list(VALUES)[:200]), (60, 2, list(VALUES)[200:]))
    )
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(32, 2, generator=torch.Generator().manual_seed(3))})
    rl.fit(das, truth.model, train, **CONFIG, seed=3, progress=False)
    scores = rl.causal.interchange_scores(das, truth.model, test, progress=False)
    assert cell.choose == tuple(scores.hits[::2].tolist()) and cell.report == tuple(scores.hits[1::2].tolist())
    assert grid.unedited == pytest.approx(scores.unedited_hits[1::2].float().mean().item(), abs=1e-7)


def test_the_unedited_model_is_scored_on_the_pairs_that_cells_are_reported_on():
    import reftlens as rl

    truth = planted()
    test = pairs(truth.value, 60, 2, list(VALUES)[200:])[0]
    exchange = rl.ReFT({rl.resid_post(1, "last"): rl.Interchange(32)})
    hits = rl.causal.interchange_scores(exchange, truth.model, test, progress=False).unedited_hits
    right, wrong = (rows.nonzero().flatten().tolist() for rows in (hits, ~hits))
    for halves, share in (((right, wrong), 0.0), ((wrong, right), 1.0)):
        order = [row for both in zip(*halves, strict=False) for row in both]
        assert len(order) >= 8
        grid = rl.interchange_map(truth.model, test, test[order], layers=[1], ranks=[0], shuffles=99, progress=False)
        assert grid.unedited == share and len(grid.cells[0].report) == len(order) // 2


def test_a_map_goes_on_from_its_folder(tmp_path):
    whole = _map()
    assert _map(layers=(0,), folder=tmp_path).cells == whole.cells[:4]
    before = (tmp_path / "layer_000.json").stat().st_mtime_ns
    assert _map(folder=tmp_path).cells == whole.cells
    assert (tmp_path / "layer_000.json").stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="other data or settings"):
        _map(folder=tmp_path, ranks=(1,))


def test_two_runs_may_fill_one_folder(tmp_path):
    """Each writes its file whole, under a name that no other uses until it is finished."""
    from reftlens.analysis.causal.map_results import Cell
    from reftlens.analysis.causal.maps import read_cells, write_cells

    cells = [Cell(3, "last", rank, 0, (True,) * 500, (False,) * 500, 0.5) for rank in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_cells(tmp_path, 3, "equal settings", cells), range(64)))
    assert [path.name for path in tmp_path.iterdir()] == ["layer_003.json"]
    assert read_cells(tmp_path, 3, "equal settings") == cells


def test_what_submits_work_and_gives_its_result_is_an_executor():
    from reftlens.bridge.protocol import loader_of

    assert _map(_loaded, executor=LeastExecutor(), layers=(2,), ranks=(0,)) == _map(layers=(2,), ranks=(0,))
    with pytest.raises(TypeError, match=r"executor is a int, expected one with submit\(f, x\)"):
        loader_of(_loaded, 4)


@pytest.mark.slow
def test_any_executor_gives_the_same_cells():
    with pytest.raises(ValueError, match="a function that loads"):
        _map(executor=ProcessPoolExecutor(1))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert _map(_loaded, executor=pool) == _map()


def test_too_few_pairs_are_refused():
    import reftlens as rl

    data = pairs(planted().value, 8, 1)[0]
    with pytest.raises(ValueError, match="expected 4 or more"):
        rl.interchange_map(planted().model, data, data[:3])
    with pytest.raises(ValueError, match=r"ranks=\[1, 1\], expected one or more, each of them once"):
        rl.interchange_map(planted().model, data, data, ranks=[1, 1])


def test_more_cells_than_shuffles_can_tell_apart_are_warned_of():
    with pytest.warns(UserWarning, match=r"4 cells and 19 shuffles.*pass shuffles=160 or more"):
        _map(layers=(0, 2), ranks=(0,), shuffles=19)
    with pytest.raises(ValueError, match="positions is empty"):
        _map(positions=())


def _cell(layer, chosen, reported, p):
    from reftlens.analysis.causal.map_results import Cell

    return Cell(layer, "last", 1, 0, tuple(i < chosen for i in range(10)), tuple(i < reported for i in range(10)), p)


def test_ties_at_the_best_are_told_and_better_than_shuffled_is_told_from_right():
    from reftlens.analysis.causal.map_results import InterchangeMap

    cells = [_cell(0, 0, 0, 0.001), _cell(1, 10, 9, 0.001), _cell(2, 10, 10, 0.001), _cell(3, 2, 2, 0.9)]
    tied = InterchangeMap(tuple(cells), 0.0)
    assert tied.best[0] is cells[1] and tied.ties == cells[1:3]
    assert "(1 other cell(s) are as good there)" in str(tied)
    assert "3 cell(s) differ from shuffled labels (Holm, 5 %); 2 of them answer most pairs right" in str(tied)
    marks = {line.get_ydata()[0]: line.get_markerfacecolor() for line in tied.plot().lines if line.get_marker() == "o"}
    assert marks == {0: "none", 1: "white", 2: "white"}
    alone = InterchangeMap((cells[0], cells[1], cells[3]), 0.0)
    assert alone.ties == [cells[1]] and "as good there" not in str(alone)
