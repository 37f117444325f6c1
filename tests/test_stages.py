"""What prompts begin alike is read once, and nothing that is written changes."""

import random
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch

from architectures import ARCHITECTURES, D, fresh_bridge

SHOTS = "the cat sat on the mat while a dog ran by the green hill and looked at the moon "
PROMPTS = [
    SHOTS + "the cat",
    "a dog ran over the green hill while the cat looked",
    SHOTS + "a dog by the moon over the hill",
    SHOTS + "the cat",
    "a dog",
]
EDITED = ["last", "f3", "all", "response", "l3", "f2+l1"]


@cache
def double(architecture):
    """Of its own: what is known of it was seen with norms in float64."""
    return fresh_bridge(architecture, dtype=torch.float64)


def edit(positions="last", module=None):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, positions): module or rl.LoReFT(D, 2, generator=torch.Generator().manual_seed(0))})
    return reft.to(torch.float64)


def sharing(monkeypatch, overhead):
    """None: not at all."""
    from reftlens.generation.session import Session
    from reftlens.generation.stages import OVERHEAD

    monkeypatch.setitem(OVERHEAD, "cpu", 0.0 if overhead is None else overhead)
    if overhead is None:
        monkeypatch.setattr(Session, "share", lambda *_: None)


def written(model, reft, prompts=PROMPTS, variant=None, **decoding):
    """Without the check, so that nothing is computed in full behind the test's back."""
    import reftlens as rl

    settings = rl.Decoding(**{"max_new_tokens": 3, "verify": False, **decoding})
    variant = [0.0, 1.0, rl.Variant((0.5, -3.0))] if variant is None else variant
    keep_logits = settings.beams == 1
    return rl.generate(reft, model, prompts, settings, variant=variant, keep_logits=keep_logits)


def both(monkeypatch, *arguments, **settings):
    """With every beginning shared, and with none."""
    from reftlens.generation.stages import Stage

    handed, shifted = [], Stage._shifted
    with monkeypatch.context() as patch:
        sharing(patch, 0.0)
        patch.setattr(Stage, "_shifted", lambda *stored: handed.append(1) or shifted(*stored))
        found = written(*arguments, **settings)
    with monkeypatch.context() as patch:
        sharing(patch, None)
        expected = written(*arguments, **settings)
    assert handed, "nothing was shared"
    return found, expected


def worst(found, expected):
    assert [(g.ids, g.edited, g.prompt_ids) for g in found] == [(g.ids, g.edited, g.prompt_ids) for g in expected]
    pairs = ((a, b) for g, h in zip(found, expected, strict=True) for a, b in zip(g.logits, h.logits, strict=True))
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("positions", EDITED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_texts_are_those_without_it(architecture, positions, doubles, monkeypatch):
    found, expected = both(monkeypatch, double(architecture), edit(positions))
    assert worst(found, expected) < 1e-10
    assert positions == "response" or found[0].ids != found[2].ids, "strength matters"


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_a_batch_is_padded_does_not_matter(side, doubles, monkeypatch):
    from test_generate import batch_of

    rows = [double("llama").tokenizer(text)["input_ids"] for text in PROMPTS]
    found, expected = both(monkeypatch, double("llama"), edit(), batch_of(rows, side))
    assert worst(found, expected) < 1e-10


@pytest.mark.parametrize(
    "decoding", [{"temperature": 1.0, "seed": 3}, {"beams": 3}, {"repetition_penalty": 1.3}], ids=str
)
def test_samples_and_beams_are_those_without_it(decoding, doubles, monkeypatch):
    found, expected = both(monkeypatch, double("gpt2"), edit("l2"), **decoding)
    assert [(g.ids, g.edited) for g in found] == [(g.ids, g.edited) for g in expected]


def test_the_unedited_model_shares_too(doubles, monkeypatch):
    found, expected = both(monkeypatch, double("neox"), None, variant=[1.0])
    assert worst(found, expected) < 1e-10


def test_tokens_that_are_pooled_are_computed_together(doubles, monkeypatch):
    """The code of a pooled token depends on later ones, so that it is no beginning that rows could share."""
    import reftlens as rl

    module = rl.interventions.ReFTr1(D, k=2, generator=torch.Generator().manual_seed(0))
    reft = edit(rl.positions.Prompt() - rl.positions.First(4), module)
    found, expected = both(monkeypatch, double("gpt2"), reft, variant=[0.0, 1.0, 4.0])
    assert worst(found, expected) < 1e-10 < (found[0].logits[0] - found[2].logits[0]).abs().max()


def passes(monkeypatch, model, reft, prompts, **settings):
    """`(rows, columns)` of each pass over prompts."""
    from reftlens.generation import runner

    seen, run = [], runner.forward_inside

    def noted(model, tokens, *arguments):
        seen.append(tuple(tokens.shape))
        return run(model, tokens, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward_inside", noted)
        written(model, reft, prompts, max_new_tokens=1, **settings)
    return seen


def test_strengths_share_the_prompt_before_the_edit_and_equal_prompts_all_of_it(gpt2, monkeypatch):
    sharing(monkeypatch, 0.0)
    reft, variant = edit().to(torch.float32), [1.0, 2.0, 3.0]
    length = len(gpt2.tokenizer(SHOTS)["input_ids"])
    assert passes(monkeypatch, gpt2, reft, [SHOTS] * 2, variant=variant) == [(1, length - 1), (3, 1)]
    assert passes(monkeypatch, gpt2, edit("response").to(torch.float32), [SHOTS] * 2, variant=variant) == [(1, length)]
    assert passes(monkeypatch, gpt2, edit("f1").to(torch.float32), [SHOTS] * 2, variant=variant) == [(3, length)]


def test_without_a_common_beginning_or_where_it_does_not_pay_nothing_changes(gpt2, monkeypatch):
    from test_generate import batch_of

    reft, apart = edit().to(torch.float32), batch_of([[7, 8, 9], [8, 8, 9]])
    sharing(monkeypatch, 0.0)
    assert passes(monkeypatch, gpt2, reft, apart, variant=[1.0]) == [(2, 3)]
    sharing(monkeypatch, 1e9)
    ((rows, _),) = passes(monkeypatch, gpt2, reft, [SHOTS + "the", SHOTS + "a"], variant=[1.0, 2.0])
    assert rows == 4


def test_noise_of_one_in_a_billion_in_what_is_handed_on_is_seen(doubles, monkeypatch):
    from reftlens.generation.stages import Stage

    shifted = Stage._shifted
    _, expected = both(monkeypatch, double("llama"), edit())
    monkeypatch.setattr(Stage, "_shifted", lambda self, x: shifted(self, x) + 1e-9 * torch.randn_like(shifted(self, x)))
    found, _ = both(monkeypatch, double("llama"), edit())
    assert 1e-13 < worst(found, expected) < 1e-6


@pytest.mark.parametrize("positions", ["last", "f2", "all"])
def test_a_beginning_that_is_not_the_rows_is_caught_before_it_is_used(positions, monkeypatch):
    """The check of the way of generating shares beginnings, too."""
    from reftlens.generation.stages import Stage

    model, reft, shifted = fresh_bridge("llama"), edit(positions).to(torch.float32), Stage._shifted
    with monkeypatch.context() as patch:
        sharing(patch, None)
        expected = written(model, reft)
    sharing(monkeypatch, 0.0)
    monkeypatch.setattr(Stage, "_shifted", lambda self, x: 1.5 * shifted(self, x))
    with pytest.warns(UserWarning, match="prompts that begin alike are read one by one: on short rows, logits differ"):
        found = written(model, reft, verify=True)
    assert worst(found, expected) == 0.0


@pytest.mark.parametrize("positions", ["last", "l4", "f1"])
def test_prefilled_prompts_are_read_once_where_they_begin_alike(positions, doubles, monkeypatch):
    import reftlens as rl
    from reftlens.generation.rows import Rows

    model, reft = double("gpt2"), edit(positions)
    sharing(monkeypatch, 1e9)
    apart = rl.generation.prefill(reft, model, PROMPTS[:3])
    sharing(monkeypatch, 0.0)
    alike = rl.generation.prefill(reft, model, PROMPTS[:3])
    assert "distinct" not in apart.computation
    assert ("tokens were distinct" in alike.computation) == (positions != "f1"), "nothing lies before the first token"
    real = Rows.of(alike.prompts, torch.device("cpu")).real
    for a, b in zip(_stored(alike), _stored(apart), strict=True):
        torch.testing.assert_close(a[real], b[real], atol=1e-12, rtol=0)
    found, expected = (written(model, reft, prompts, verify=True) for prompts in (alike, apart))
    assert worst(found, expected) < 1e-10


@pytest.mark.parametrize("positions", ["f3", "f2+l1", "all", "l4"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_what_follows_prefilled_columns_is_shared_too(architecture, positions, doubles, monkeypatch):
    """Strengths apart, texts edited in their beginning share it; the check covers it and does not object."""
    import reftlens as rl

    model, reft = double(architecture), edit(positions)
    found, expected = both(monkeypatch, model, reft, rl.generation.prefill(reft, model, PROMPTS), verify=True)
    assert worst(found, expected) < 1e-10
    with monkeypatch.context() as patch:
        sharing(patch, None)
        assert worst(found, written(model, reft)) < 1e-10


def _stored(prefilled):
    return [stored.transpose(1, 2) for stored in (*prefilled.states.keys, *prefilled.states.values)]


# -- which columns are computed for which rows -----------------------------------------------------------------------


def padded(texts):
    width = max(map(len, texts))
    tokens = torch.tensor([[-1] * (width - len(text)) + list(text) for text in texts])
    return tokens, tokens >= 0


def cost(stages, rows, overhead):
    sizes = [rows if s.rows is None else len(s.rows) for s in stages]
    return sum(n * (s.stop - s.start) + overhead for n, s in zip(sizes, stages, strict=True))


def test_a_difference_ends_what_is_shared_exactly_there():
    from reftlens.generation.stages import stages

    tokens = torch.arange(12).repeat(4, 1)
    tokens[:, 11] = torch.arange(4)
    real = torch.ones_like(tokens, dtype=torch.bool)
    assert [(s.start, s.stop) for s in stages(tokens, real, limit=12, overhead=0)] == [(0, 11), (11, 12)]
    tokens[2, 7] = 99
    cut = [(s.start, s.stop, s.rows) for s in stages(tokens, real, limit=12, overhead=0)]
    assert [(a, b) for a, b, _ in cut] == [(0, 7), (7, 11), (11, 12)]
    assert [None if rows is None else rows.tolist() for _, _, rows in cut] == [[0], [0, 2], None]


@pytest.mark.parametrize("overhead", [0.0, 2.5])
def test_stages_are_sound_and_the_cheapest(overhead):
    """Beside every set of cuts, with as many rows up to each as there are texts that none of them continues."""
    from reftlens.generation.stages import stages

    dice = random.Random(0)
    for _ in range(60):
        texts = [[int(dice.random() < 0.15) for _ in range(dice.randint(1, 8))] for _ in range(dice.randint(1, 6))]
        tokens, real = padded(texts)
        width = tokens.shape[1]
        limit = dice.choice([width, dice.randint(0, width)])
        result = stages(tokens, real, limit=limit, overhead=overhead)
        assert [s.start for s in result] == [0, *(s.stop for s in result[:-1])] and result[-1].stop == width
        assert all(s.stop <= limit for s in result[:-1])
        for stage, after in zip(result, [*result[1:], None], strict=True):
            own = list(range(len(texts))) if stage.rows is None else stage.rows.tolist()
            going = list(range(len(texts))) if after is None or after.rows is None else after.rows.tolist()
            owners = range(len(going)) if stage.owners is None else stage.owners.tolist()
            for row, owner in zip(going, owners, strict=True):
                begins = texts[row][: max(0, len(texts[row]) - width + stage.stop)]
                assert texts[own[owner]][: len(begins)] == begins
                assert after is not None or texts[own[owner]] == texts[row]
        cuts = (c for n in range(width) for c in combinations(range(1, min(limit, width - 1) + 1), n))
        whole = (pairwise([0, *some, width]) for some in cuts)
        best = min(sum(_needed(texts, width, b) * (b - a) + overhead for a, b in each) for each in whole)
        assert cost(result, len(texts), overhead) == pytest.approx(best)


def _needed(texts, width, stop):
    begins = {tuple(text[: max(0, len(text) - width + stop)]) for text in texts}
    if stop == width:
        return len(begins)
    return sum(not any(other != one and other[: len(one)] == one for other in begins) for one in begins)
