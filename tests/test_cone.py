"""The geometry of the light cone: blocks, spans of tokens, and groups of rows."""

import itertools
import random

import pytest
import torch

from architectures import bridge


def _cost(lengths, keys, groups, overhead):
    from reftlens.cone.spans import _KEYS_PER_TOKEN

    def one(rows):
        longest, deepest = max(lengths[r] for r in rows), max(keys[r] for r in rows)
        return len(rows) * longest * (1 + (deepest + longest) / _KEYS_PER_TOKEN) + overhead

    return sum(one(rows) for rows in groups)


@pytest.mark.parametrize(
    "hook, first",
    [
        ("blocks.3.hook_in", 3),
        ("blocks.3.hook_out", 4),
        ("blocks.3.attn.hook_out", 3),
        ("blocks.3.mlp.hook_out", 3),
        ("blocks.11.ln2.hook_in", 11),
        ("embed.hook_out", 0),
        ("pos_embed.hook_out", 0),
        ("ln_final.hook_out", 12),
        ("blocks.3.attn.hook_pattern", None),
        ("blocks.3.attn.hook_attn_scores", None),
        ("unembed.hook_in", None),
    ],
)
def test_the_first_block_that_a_hook_can_change(hook, first):
    from reftlens.cone.spans import first_block

    assert first_block(hook, 12) == first


def test_a_span_runs_from_the_first_edited_or_scored_token_to_the_last_scored_one():
    import reftlens as rl
    from reftlens.cone.spans import spans

    model = bridge("gpt2")
    data = rl.encode(model, [rl.Example("the cat sat", " on the mat"), rl.Example("a", " dog ran by the green hill")])
    prompts, ends = data.prompt_mask.sum(dim=1).tolist(), data.attention_mask.sum(dim=1).tolist()
    for positions, starts in [
        (rl.positions.Last(), [p - 1 for p in prompts]),
        (rl.positions.First(), [0, 0]),
        (rl.positions.Response(), [p - 1 for p in prompts]),  # the last prompt token predicts the first target
        (rl.positions.Last(2), [prompts[0] - 2, max(0, prompts[1] - 2)]),
    ]:
        found = spans(data, positions.mask(data.view), tokens=True)
        assert [(c.start, c.stop) for c in found] == [(s, e - 1) for s, e in zip(starts, ends, strict=True)]
    whole = spans(data, rl.positions.Last().mask(data.view), tokens=False)
    assert [(c.start, c.stop) for c in whole] == [(0, e) for e in ends]


def _partitions(count, most):
    """Every way of putting `count` things into at most `most` groups."""
    for labels in itertools.product(range(most), repeat=count):
        yield [[i for i in range(count) if labels[i] == k] for k in sorted(set(labels))]


def _ranges(lengths, most):
    """Of those of rows, the ones whose groups are ranges of lengths."""
    steps = sorted(set(lengths))
    for count in range(min(most, len(steps))):
        for cuts in itertools.combinations(range(1, len(steps)), count):
            parts = itertools.pairwise([0, *cuts, len(steps)])
            yield [[i for i, length in enumerate(lengths) if length in steps[a:b]] for a, b in parts]


@pytest.mark.parametrize("seed", range(12))
def test_groups_are_the_cheapest_of_all(seed):
    """Oracle: every partition is tried where attention reads as many keys for each row, and else every one into ranges.

    Of rows with different keys a group that is no range of lengths may be cheaper, and is not looked for.
    """
    from reftlens.cone.spans import buckets

    dice = random.Random(seed)
    n, most, overhead = dice.randint(3, 6), dice.randint(2, 3), dice.choice([0.0, 5.0, 200.0])
    lengths = [dice.randint(1, 90) for _ in range(n - 1)]
    lengths.append(dice.choice(lengths))  # two rows are of one length
    deep = dice.choice([300, 30_000])  # of the latter, reading the keys is most of the work
    equal, different = [dice.randint(0, deep)] * n, [dice.randint(0, deep) for _ in range(n)]
    for keys, every in ((equal, _partitions(n, most)), (different, _ranges(lengths, most))):
        found = buckets(lengths, keys, most, overhead)
        assert sorted(i for group in found for i in group) == list(range(n))
        assert 1 <= len(found) <= most and all(group == sorted(group) for group in found)
        least = min(_cost(lengths, keys, groups, overhead) for groups in every)
        assert _cost(lengths, keys, found, overhead) == pytest.approx(least, rel=1e-12)


def test_one_long_row_is_computed_apart_and_equal_rows_together():
    from reftlens.cone.spans import buckets

    assert buckets([10] * 7, [5] * 7, 3, 16.0) == [list(range(7))]
    assert buckets([10, 200, 11, 9], [5] * 4, 3, 16.0) == [[0, 2, 3], [1]]
    assert buckets([10, 200, 11, 9], [5] * 4, 3, 1e6) == [[0, 1, 2, 3]]


def test_a_window_shows_the_cones_of_its_rows():
    from reftlens.cone.spans import Span, window

    win = window([Span(2, 5), Span(0, 1)])
    values = torch.arange(12).view(2, 6)
    assert win.real.tolist() == [[True] * 3, [True, False, False]]
    assert win.cut(values)[win.real].tolist() == [2, 3, 4, 6]
