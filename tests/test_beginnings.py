"""What rows begin with alike is captured once, and nothing that is scored changes."""

import random

import pytest
import torch
from test_scorer import DOUBLE, ROUNDING, scored, worst

from architectures import ARCHITECTURES, D, bridge

SHOTS = "the cat sat on the mat while a dog ran by the green hill and looked at the moon "
OTHER = "a dog ran over the green hill while the cat looked at the mat and the moon "
TEXTS = [
    (SHOTS + "the cat", " looked"),
    (OTHER + "a dog ran", " by the hill"),
    ("the moon over the hill while a cat", " ran by"),
    (SHOTS + "a dog by the moon over the hill", " sat on the mat"),
    (SHOTS + "and the", " moon"),
    (OTHER + "the moon", " sat"),
]
ALL = tuple(range(len(TEXTS)))


def texts(model, rows=TEXTS):
    import reftlens as rl

    return rl.encode(model, [rl.Example(*row) for row in rows])


def reuse(**settings):
    """Without the check, so that nothing is computed in full behind the test's back."""
    import reftlens as rl

    return rl.Reuse(verify=False, **settings)


def cone(model, data, settings, sites=None):
    from reftlens.cone.plans import Plan
    from reftlens.cone.scorer import Scorer

    reft = edit() if sites is None else sites
    return Scorer(model, data, [Plan(reft)], settings)._cone


def edit(layer=1, positions="last"):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(layer, positions): rl.LoReFT(D, rank=2)})
    reft.reset(0)
    return reft


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_without_it(architecture, layer, padding, doubles):
    """At every depth: above the last block nothing but the stream is captured."""
    from dataclasses import replace

    model, reft = bridge(architecture, torch.float64), edit(layer).to(torch.float64)
    data = texts(model)
    if padding == "left":
        order = data.attention_mask.long().argsort(dim=1, stable=True)
        data = replace(data, **{n: getattr(data, n).gather(1, order) for n in ("tokens", "role", "target_mask")})
    expected, whole = scored(model, reft, data, reuse(beginnings=False), ALL)
    measured, computation = scored(model, reft, data, reuse(), ALL)
    assert worst(measured, expected) < DOUBLE
    assert " distinct of " in computation and " distinct" not in whole


@pytest.mark.parametrize("positions", ["f3+l1", "all", "response"])
def test_an_edit_ends_what_is_shared_where_it_begins(llama, positions):
    """In the first tokens nothing is frozen; before the response all of the prompt is."""
    reft = edit(positions=positions)
    expected, _ = scored(llama, reft, texts(llama), None, ALL)
    measured, _ = scored(llama, reft, texts(llama), reuse(), ALL)
    assert worst(measured, expected) < ROUNDING
    shared = cone(llama, texts(llama), reuse(), reft).capture.beginnings
    assert bool(shared) == (positions == "response")


@pytest.mark.parametrize("settings", [{"half": True}, {"memory": 0}, {"memory": 0, "disk": 0}, {"buckets": 1}], ids=str)
def test_it_is_kept_wherever_rows_are(llama, settings):
    """In bfloat16, on disk, nowhere: as precise as without it."""
    expected, _ = scored(llama, edit(), texts(llama), None, ALL)
    measured, _ = scored(llama, edit(), texts(llama), reuse(**settings), ALL)
    assert worst(measured, expected) < (0.05 if "half" in settings else ROUNDING)


def test_it_takes_less_room():
    model = bridge("llama")
    data, sizes = texts(model), {}
    for beginnings in (True, False):
        store = cone(model, data, reuse(beginnings=beginnings)).store
        store.prepare()
        sizes[beginnings] = store.size
    assert sizes[True] < 0.6 * sizes[False]


def test_without_a_common_beginning_nothing_changes(llama):
    data = texts(llama, [(f"{word} and the cat sat on the mat", " ran") for word in ("moon", "hill", "dog", "green")])
    assert cone(llama, data, reuse()).capture.beginnings == []
    expected, _ = scored(llama, edit(), data, reuse(beginnings=False), (0, 1, 2, 3))
    measured, _ = scored(llama, edit(), data, reuse(), (0, 1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(measured, expected, strict=True))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_noise_of_one_in_a_billion_in_what_is_shared_is_seen(architecture, doubles, monkeypatch):
    from reftlens.cone.capture import Capture

    model, reft = bridge(architecture, torch.float64), edit().to(torch.float64)
    exact, _ = scored(model, reft, texts(model), reuse(), ALL)
    beginning = Capture._read

    def noisy(self, number):
        read = beginning(self, number)
        return read.rebuilt([t + 1e-9 * torch.randn_like(t) for t in read.tensors()], None)

    monkeypatch.setattr(Capture, "_read", noisy)
    measured, _ = scored(model, reft, texts(model), reuse(), ALL)
    assert 1e-13 < worst(measured, exact) < 1e-6


def test_a_beginning_that_is_not_the_rows_is_caught_before_it_is_used(monkeypatch):
    """The check of the way of computing shares beginnings, too."""
    import reftlens as rl
    from architectures import fresh_bridge
    from reftlens.cone.capture import Capture

    model, beginning = fresh_bridge("llama"), Capture._read

    def wrong(self, number):
        read = beginning(self, number)
        return read.rebuilt([1.5 * t for t in read.tensors()], None)

    expected = rl.evaluate(edit(), model, texts(model), reuse=False, progress=False).loss
    monkeypatch.setattr(Capture, "_read", wrong)
    with pytest.warns(UserWarning, match="not reused: on short rows"):
        loss = rl.evaluate(edit(), model, texts(model), progress=False).loss
    assert torch.equal(loss, expected)


# -- which rows share ------------------------------------------------------------------------------------------------


def saved(beginnings, overhead):
    return sum((len(b.rows) - 1) * b.length - overhead for b in beginnings)


def test_a_difference_ends_what_is_shared_exactly_there():
    from reftlens.cone.beginnings import Beginning, shared_beginnings

    tokens = torch.arange(12).repeat(4, 1)
    tokens[2, 7] = 99
    assert shared_beginnings(tokens, [10, 10, 10, 10], overhead=0) == [Beginning((0, 1, 2, 3), 7)]
    tokens[2, 1] = 99
    assert shared_beginnings(tokens, [10, 10, 10, 10], overhead=0) == [Beginning((0, 1, 3), 10)]
    assert shared_beginnings(tokens, [10, 10, 10, 8], overhead=0) == [Beginning((0, 1, 3), 8)]
    assert shared_beginnings(tokens, [10, 0, 10, 10], overhead=10) == []


@pytest.mark.parametrize("overhead", [0.0, 2.5])
def test_groups_are_sound_and_near_the_best(overhead):
    """Beside every partition of up to six rows: the best of them all, in nearly every table."""
    from reftlens.cone.beginnings import shared_beginnings

    dice, sums = random.Random(0), [0.0, 0.0]
    for _ in range(80):
        rows = [[int(dice.random() < 0.15) for _ in range(8)] for _ in range(dice.randint(1, 6))]
        limits = [dice.randint(0, 8) for _ in rows]
        beginnings = shared_beginnings(torch.tensor(rows), limits, overhead=overhead)
        for beginning in beginnings:
            assert len({tuple(rows[r][: beginning.length]) for r in beginning.rows}) == 1
            assert all(limits[r] >= beginning.length for r in beginning.rows)
        assert len({r for b in beginnings for r in b.rows}) == sum(len(b.rows) for b in beginnings)
        texts = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
        best = max(sum(max(0.0, (len(g) - 1) * alike(g) - overhead) for g in groups) for groups in partitions(texts))
        assert saved(beginnings, overhead) <= best + 1e-9
        sums[0], sums[1] = sums[0] + saved(beginnings, overhead), sums[1] + best
    assert sums[0] > 0.95 * sums[1] > 0


def alike(texts):
    """How many tokens all of these begin with."""
    return next((n for n, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1), min(map(len, texts)))


def partitions(items):
    """Every way to cut a list into groups."""
    if not items:
        yield []
        return
    for groups in partitions(items[1:]):
        yield [[items[0]], *groups]
        for n, group in enumerate(groups):
            yield [*groups[:n], [items[0], *group], *groups[n + 1 :]]
