"""Scores equal scikit-learn's and SciPy's own; their intervals hold what they should, and paired differences pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_rows import question

NAMES = ("no", "maybe", "yes")


def answers(count, seed, names=NAMES, noise=0.4, absent=0.0):
    """Gold answers, and answers that agree with them more often than chance."""
    g = np.random.default_rng(seed)
    gold = [str(x) for x in g.choice(names, count)]
    found = [str(g.choice(names)) if g.random() < noise else x for x in gold]
    return [None if g.random() < absent else x for x in found], gold


def numbers(count, seed):
    g = np.random.default_rng(seed)
    gold = g.uniform(0, 5, count).round(1)
    found = (gold + g.normal(0, 1, count)).round(1)  # with ties
    return [str(x) for x in found], [str(x) for x in gold]


@pytest.mark.parametrize("seed", range(5))
def test_values_are_scikit_learns_and_scipys(seed):
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    from reftlens.experiments.answers import scores

    found, gold = answers(60, seed)
    right = torch.tensor([a == b for a, b in zip(found, gold, strict=True)])
    assert scores.accuracy(right).value == pytest.approx(accuracy_score(gold, found), abs=1e-12)
    f1 = f1_score(gold, found, labels=["yes"], average="macro")
    assert scores.f1(found, gold, "yes").value == pytest.approx(f1, abs=1e-12)
    assert scores.matthews(found, gold).value == pytest.approx(matthews_corrcoef(gold, found), abs=1e-12)
    x, y = numbers(40, seed)
    a, b = np.array(x, float), np.array(y, float)
    assert scores.pearson(x, y).value == pytest.approx(pearsonr(a, b)[0], abs=1e-12)
    assert scores.spearman(x, y).value == pytest.approx(spearmanr(a, b)[0], abs=1e-12)


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_intervals_are_those_of_the_score_computed_on_rows_drawn_again(name):
    """Ours comes from means over rows; here scikit-learn and SciPy score each draw."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    from reftlens.experiments.answers import scores

    x, y = numbers(80, 1) if name in ("pearson", "spearman") else answers(80, 1, ("no", "yes"), absent=0.05)
    g, draws = np.random.default_rng(0), []
    for _ in range(600):
        rows = g.integers(80, size=80)
        a, b = ([v[i] for i in rows] for v in (x, y))
        if name == "f1":
            draws.append(f1_score([v == "yes" for v in b], [v == "yes" for v in a]))
        elif name == "matthews":
            draws.append(matthews_corrcoef(b, ["" if v is None else v for v in a]))
        else:
            draws.append({"pearson": pearsonr, "spearman": spearmanr}[name](*np.array([a, b], float))[0])
    score = getattr(scores, name)
    found = score(x, y, "yes") if name == "f1" else score(x, y)
    width = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    # 600 and 2,000 draws: their quantiles are off by a few hundredths of the width.
    assert found.low == pytest.approx(np.quantile(draws, 0.025), abs=0.12 * width)
    assert found.high == pytest.approx(np.quantile(draws, 0.975), abs=0.12 * width)
    assert found.low < found.value < found.high and found.count == 80


def test_wilsons_interval_is_the_closed_form_and_holds_the_truth():
    from reftlens.experiments.answers.scores import accuracy

    for k, n in ((0, 10), (7, 10), (100, 100), (60, 100)):
        z, p = 1.959963984540054, k / n
        centre, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n**2) ** 0.5
        found = accuracy(torch.arange(n) < k)
        assert found.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9)
        assert found.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)
    g = torch.Generator().manual_seed(0)
    for interval in ("wilson", "bootstrap"):
        found = [accuracy(torch.rand(100, generator=g) < 0.3, interval) for _ in range(200)]
        assert 0.9 <= sum(e.low <= 0.3 <= e.high for e in found) / 200 <= 0.99


def test_no_answer_is_wrong_and_no_number_is_asked_about():
    from reftlens.experiments.answers import scores

    found, gold = ["yes", None, "no"], ["yes", "yes", "no"]
    assert scores.f1(found, gold, "yes").value == pytest.approx(2 / 3)
    assert scores.matthews([None, None], ["no", "yes"]).value == 0
    with pytest.raises(ValueError, match="1 of 3 rows have no number, the first is row 1"):
        scores.pearson(["1", None, "2"], ["1", "2", "3"])
    assert scores.pearson(["1", None, "3"], ["1", "2", "3"], missing=2).value == pytest.approx(1)
    alike = scores.pearson(["2", "2", "2"], ["1", "2", "3"])
    assert np.isnan(alike.value) and "no interval" in str(alike)


def test_a_task_is_scored_by_its_metrics():
    from hub_rows import GLUE

    from reftlens.experiments.answers.scores import answers_in, hits, scores
    from reftlens.experiments.rows.loading import TASKS, load_rows

    expected = {"cola": ["matthews", "accuracy"], "stsb": ["pearson", "spearman"], "qqp": ["accuracy", "f1"]}
    for name, metrics in expected.items():
        rows = load_rows(name, "test", data=GLUE[name][0])
        texts = [row.completion for row in rows]
        found = answers_in(TASKS[name], rows, texts)
        assert hits(TASKS[name], rows, found).all()
        scored = scores(TASKS[name], rows, found)
        assert list(scored) == metrics and all(e.value == pytest.approx(1) for e in scored.values())
        worse = scores(TASKS[name], rows, [found[0], None, *found[2:]])
        assert all(e.value < 1 for e in worse.values())
        with pytest.raises(ValueError, match="10 rows and 9 texts"):
            answers_in(TASKS[name], rows, texts[1:])


def test_differences_are_paired_over_rows_and_runs():
    from reftlens.experiments.answers.scores import difference

    g = torch.Generator().manual_seed(1)
    hard = torch.rand(200, generator=g)
    base = hard < 0.5
    runs = torch.stack([(hard < 0.6) | (torch.rand(200, generator=g) < 0.02) for _ in range(3)])
    paired, alone = difference(runs, base), difference(runs[0], base)
    assert alone.value == pytest.approx((runs[0].double() - base.double()).mean().item())
    assert paired.value == pytest.approx((runs.double() - base.double()).mean().item())
    assert paired.low > 0 and alone.low > 0
    # Two rates of .5 and .6 on 200 rows that were not paired differ by more than chance in few cases.
    assert paired.high - paired.low < 0.5 * 2 * 1.96 * (2 * 0.25 / 200) ** 0.5 * 2
    assert difference(base, runs).value == pytest.approx(-paired.value)
    with pytest.raises(ValueError, match="the same rows and as many runs"):
        difference(runs, base[1:])
    with pytest.raises(ValueError, match="the same rows and as many runs"):
        difference(runs, runs[:2])


# -- letters -------------------------------------------------------------------------------------------------


def arc_rows():
    from hub_rows import obqa

    from reftlens.experiments.rows.loading import load_rows

    return load_rows("obqa", "test", data=obqa())


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "spearman"])
def test_of_few_runs_that_differ_no_interval_goes_beyond_what_the_score_can_be(metric):
    from reftlens.experiments.answers.scores import score_over_runs

    gold = ["1", "0"] * 20
    right, mixed = list(gold), ["1", "1", "0", "0"] * 10
    found = score_over_runs(metric, [right, mixed], gold, ("0", "1"))
    assert (found.low, found.high) == ({"accuracy": 0, "f1": 0}.get(metric, -1), 1)
    close = score_over_runs(metric, [mixed, mixed], gold, ("0", "1"))
    assert -0.5 < close.low < close.value < close.high < 1, "one that is well within stays as it is"


def test_rotated_rows_ask_the_same_with_the_options_elsewhere():
    from hub_rows import COMMONSENSE

    from reftlens.experiments.answers.letters import rotations
    from reftlens.experiments.rows.families.commonsense import rotated
    from reftlens.experiments.rows.loading import load_rows

    for name in ("piqa", "winogrande", "hellaswag", "siqa", "obqa"):
        rows = load_rows(name, "test", data=COMMONSENSE[name][0])
        turned = rotations(rows)
        assert turned[0] == rows and len(turned) == len(rows[0].choices)
        for by, part in enumerate(turned):
            for row, one in zip(rows, part, strict=True):
                option = row.fields["options"][row.choices.index(row.answer)]
                assert one.fields["options"][one.choices.index(one.answer)] == option
                assert one.fields["options"][0] == row.fields["options"][by]
                assert f"{one.answer.capitalize()}: {option}" in one.prompt and one.question == row.question
                assert one.completion.endswith(one.answer) and rotated(one, len(turned) - by).prompt == row.prompt
    with pytest.raises(ValueError, match="has no options that could change places"):
        rotations(load_rows("boolq", data=[question(1)]))
    with pytest.raises(ValueError, match=r"rows with \[0\] choices, expected rows with some"):
        rotations([replace(row, choices=()) for row in arc_rows()])


def test_a_liking_for_a_name_is_told_from_knowing_the_option():
    from reftlens.experiments.answers.letters import bias_of, letter_bias, rotations

    turned = rotations(arc_rows())
    always = letter_bias(turned, [["answer1"] * 10] * 4)
    assert always.shares["answer1"].value == 1 and always.shares["answer2"].value == 0 == always.consistent.value
    assert sum(e.value for e in always.accuracies) == pytest.approx(1)
    knows = letter_bias(turned, [[row.answer for row in part] for part in turned])
    assert knows.consistent.value == 1 and all(e.value == 1 for e in knows.accuracies)
    assert all(share.value == pytest.approx(0.25) for share in knows.shares.values())
    silent = letter_bias(turned, [[None] * 10] * 4)
    assert silent.consistent.value == 0 and not any(share.value for share in silent.shares.values())
    assert always.accuracy.value == pytest.approx(0.25) and knows.accuracy.value == 1
    assert len(always.to_frame()) == 10 and "the same option each time: 0.00" in str(always)
    mixed = bias_of(turned[0][0].choices, [[["answer1"] * 10] * 4, [[row.answer for row in part] for part in turned]], [
        [row.answer for row in part] for part in turned
    ])  # fmt: skip
    assert (mixed.accuracy.value, mixed.consistent.value) == (pytest.approx(0.625), 0.5), "two runs, one of each"
    assert mixed.accuracy.low < always.accuracy.value < knows.accuracy.value < mixed.accuracy.high
    with pytest.raises(ValueError, match="all rotations of some rows"):
        letter_bias(turned[:2], [["answer1"] * 10] * 2)
