"""What rows begin with alike is captured once, and nothing that is scored changes."""

import random
from dataclasses import replace

import pytest
import torch
from test_scorer import DOUBLE, ROUNDING, scored, worst
from test_sites import KINDS, width
from test_sites import site as place

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

    return rl.training.Reuse(verify=False, remember=False, **settings)


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


def test_it_takes_less_room(cheap):
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
        noisy = [t + 1e-9 * torch.randn_like(t) for t in read.pool.tensors()]
        return replace(read, pool=read.pool.rebuilt(noisy))

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
        return replace(read, pool=read.pool.rebuilt([1.5 * t for t in read.pool.tensors()]))

    expected = rl.evaluate(edit(), model, texts(model), reuse=False, progress=False).loss
    monkeypatch.setattr(Capture, "_read", wrong)
    with pytest.warns(UserWarning, match="not reused: on short rows"):
        loss = rl.evaluate(edit(), model, texts(model), progress=False).loss
    assert torch.equal(loss, expected)


# -- which rows share ------------------------------------------------------------------------------------------------


def saved(beginnings, overhead):
    return sum((len(b.rows) - 1) * b.length - overhead for b in beginnings)


def test_a_difference_ends_what_is_shared_exactly_there():
    from reftlens.text.beginnings import Beginning, shared_beginnings

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
    from reftlens.text.beginnings import shared_beginnings

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


# -- beginnings within the cone --------------------------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch):
    """One more pass costs nothing: whatever can be shared is."""
    from reftlens.text import beginnings

    monkeypatch.setitem(beginnings.PASS, "cpu", 0.0)


def edits(positions, dtype=torch.float32, **settings):
    """At every depth, one of them in mid-block."""
    import reftlens as rl

    sites = {rl.resid_pre(0, positions): rl.DiReFT(D, 2), rl.resid_post(2, positions): rl.LoReFT(D, 2, **settings)}
    reft = rl.ReFT({**sites, rl.attn_out(1, positions): rl.LoReFT(D, 2)})
    reft.reset(0)
    return reft.to(dtype)


def in_parts(model, reft, data, settings, jobs):
    """`[sum of losses, gradients…]`, each part backward before the next is computed; and the scorer."""
    from reftlens.cone.plans import Job, Plan
    from reftlens.cone.scorer import Scorer

    scorer, total = Scorer(model, data, [Plan(reft)], settings), 0.0
    reft.zero_grad()
    for group in scorer.score([Job(0, rows) for rows in jobs], whole=False):
        loss = sum(torch.nn.functional.cross_entropy(s.logits, s.batch.target_ids, reduction="sum") for s in group)
        loss.backward()
        total += loss.detach()
    return [total, total, *(p.grad.clone() for p in reft.parameters())], scorer


@pytest.mark.parametrize("positions", ["f2", "f3+l2", "l2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_beginning_within_the_cone_runs_once_with_its_gradient(architecture, positions, doubles, cheap):
    """Edits that end in it, that go on after it, and none in it."""
    model, reft = bridge(architecture, torch.float64), edits(positions, torch.float64)
    expected, whole = scored(model, reft, texts(model), reuse(beginnings=False), ALL)
    measured, computation = scored(model, reft, texts(model), reuse(), ALL)
    assert worst(measured, expected) < DOUBLE
    assert ("so far" in computation) == (positions != "l2") and "so far" not in whole
    parts, scorer = in_parts(model, reft, texts(model), reuse(), [ALL[:4], ALL[4:]])
    expected, _ = in_parts(model, reft, texts(model), None, [ALL])
    assert worst(parts, expected) < DOUBLE and scorer.reuses


@pytest.mark.parametrize("site", [kind for kind in KINDS if kind != "final_norm"])
def test_at_every_kind_of_site_of_every_block(site, doubles, cheap):
    """In the last block too, where what follows its keys and values is not computed for the beginning."""
    import reftlens as rl

    model, one = bridge("llama", torch.float64), place(site, "f3")
    for block in (0, 2):
        at = rl.Site(one.hook.replace("blocks.1.", f"blocks.{block}."), one.positions, one.heads)
        reft = rl.ReFT({at: rl.LoReFT(width("llama", site), 2)}).to(torch.float64)
        reft.reset(0)
        expected, _ = in_parts(model, reft, texts(model), None, [ALL])
        measured, scorer = in_parts(model, reft, texts(model), reuse(), [ALL])
        assert worst(measured, expected) < DOUBLE
        assert ("so far" in scorer.computation) == ((block, site) != (2, "resid_post"))  # after which no block comes


def shared_of(model, reft, data, variant=None):
    """Of each row how many tokens it shares with which rows."""
    from reftlens.cone.plans import Plan
    from reftlens.cone.scorer import Scorer
    from reftlens.cone.sharing import shared_cones
    from reftlens.editing.variant import Variant

    cone = Scorer(model, data, [Plan(reft, variant or Variant())], reuse())._cone
    rows = [(0, n, cone.planner._sharing[id(cone.plans[0])]) for n in range(len(data))]
    return {row: (b.length, b.rows) for b in shared_cones(rows, 0.0) for row in b.rows}


def test_a_difference_ends_it_exactly_there_and_so_does_another_edit(llama):
    """Seven common tokens; then one row's token differs, or the edit of one row, or an edit of the row's own."""
    import reftlens as rl

    def of(rows, reft, **settings):
        return shared_of(llama, reft, texts(llama, [(row, " the mat") for row in rows]), **settings)

    common, all_of_it = "the cat sat on the mat and", "the cat sat on the mat and a dog ran"
    reft = edits("f2")
    assert of([all_of_it, all_of_it], reft)[0][0] == 10  # BOS, and up to what the first target is predicted from
    assert of([all_of_it, common + " the dog ran"], reft)[0][0] == 8
    assert of([all_of_it, "the cat looked on the mat and a dog ran"], reft)[0][0] == 3
    assert of(["a dog ran", all_of_it], reft)[0][0] == 1
    last = edits("f2+l2")  # the last tokens of a shorter prompt are inner ones of the longer
    assert of([all_of_it, common + " a dog"], last)[0][0] == 8
    assert of([all_of_it, common + " a dog"], reft)[0][0] == 9
    dropout = edits("f1", dropout=0.5)
    assert of([all_of_it, all_of_it], dropout) == {}
    dropout.eval()
    assert of([all_of_it, all_of_it], dropout)[0][0] == 10
    pooled = rl.ReFT({rl.resid_pre(0, rl.positions.Nth(4)): rl.interventions.ReFTr1(D)})
    assert of([all_of_it, all_of_it], pooled) == {}  # its cone begins where it is its own
    taken = rl.ReFT({rl.resid_pre(0, rl.positions.At(3)): rl.DAS(D, 2), rl.resid_pre(0, "f1"): rl.LoReFT(D, 2)})
    data = texts(llama, [(all_of_it, " the mat")] * 2)
    assert shared_of(llama, taken, data.with_sources({"source": data}))[0][0] == 3


def test_where_it_does_not_pay_rows_stay_together(llama):
    """Twenty common tokens of six rows are fewer than two passes cost."""
    _, computation = scored(llama, edits("f2"), texts(llama), reuse(), ALL)
    assert "so far" not in computation


def test_training_shares_and_learns_the_same(doubles, cheap):
    """An objective that compares rows gets them all, and the gradient through what is shared is the same."""
    import reftlens as rl

    model, losses = bridge("llama", torch.float64), {}
    sizes = []

    def compared(logits, batch):
        sizes.append(len(batch))
        values = rl.scoring.objectives.cross_entropy(logits, batch)
        return values + 0.1 * (values - values.mean()).square()

    for name, objective, settings in (
        ("parts", rl.scoring.objectives.cross_entropy, reuse()),
        ("in full", rl.scoring.objectives.cross_entropy, None),
        ("whole", compared, reuse()),
        ("whole in full", compared, None),
    ):
        reft = edits("f3+l1", torch.float64)
        run = rl.fit(
            reft,
            model,
            texts(model),
            steps=3,
            batch_size=6,
            objective=objective,
            reuse=settings or False,
            progress=False,
        )
        losses[name] = run.losses
    assert losses["parts"] == pytest.approx(losses["in full"], rel=1e-9) and set(sizes) == {6}
    assert losses["whole"] == pytest.approx(losses["whole in full"], rel=1e-9)
    assert losses["parts"] != pytest.approx(losses["whole"], rel=1e-3)


def test_noise_in_what_is_shared_within_the_cone_is_seen(doubles, cheap, monkeypatch):
    from reftlens.cone.light_cone import Cone

    model, reft = bridge("llama", torch.float64), edits("f3", torch.float64)
    exact, _ = scored(model, reft, texts(model), reuse(), ALL)
    begin = Cone._begin

    def noisy(self, beginning, captured):
        return [tuple(t + 1e-9 * torch.randn_like(t) for t in pair) for pair in begin(self, beginning, captured)]

    monkeypatch.setattr(Cone, "_begin", noisy)
    measured, _ = scored(model, reft, texts(model), reuse(), ALL)
    assert 1e-13 < worst(measured, exact) < 1e-6


def test_a_wrong_beginning_is_caught_before_it_is_used(cheap, monkeypatch):
    import reftlens as rl
    from architectures import fresh_bridge
    from reftlens.cone.light_cone import Cone

    model, begin = fresh_bridge("llama"), Cone._begin

    def wrong(self, beginning, captured):
        return [tuple(1.5 * t for t in pair) for pair in begin(self, beginning, captured)]

    expected = rl.evaluate(edits("f3"), model, texts(model), [1], reuse=False, progress=False).loss
    monkeypatch.setattr(Cone, "_begin", wrong)
    with pytest.warns(UserWarning, match="not reused: on short rows"):
        loss = rl.evaluate(edits("f3"), model, texts(model), [1], progress=False).loss
    assert torch.equal(loss, expected)
