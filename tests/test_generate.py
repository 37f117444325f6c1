"""Generation on the cache says what a full forward pass per token says, and edits the tokens it is told to."""

import html
import warnings
from functools import cache

import pytest
import torch

from architectures import ARCHITECTURES, CONTEXT, D_HEAD, D, bridge, fresh_bridge, hf_model, tokenizer

PROMPTS, STEPS, LENGTHS = 100, 6, (1, 2, 5, 9, 17, 26)  # the last two are longer than the window of gemma2 and gemma3
# float32, logits up to 5: the same sums in another order, over padded keys and cached ones. Measured per
# architecture: 1.2e-6 to 2.4e-6; gpt2 and neox in float64 differ by less than 1e-14 (see below).
ROUNDING = 1e-5


@cache
def prompts():
    """A hundred random rows of six lengths, mixed."""
    generator = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    sizes = [LENGTHS[number(0, len(LENGTHS))] for _ in range(PROMPTS)]
    return [torch.randint(5, len(tokenizer()), (size,), generator=generator).tolist() for size in sizes]


def batch_of(rows, side="right", pad=2):
    """A `Batch` of prompts built by hand."""
    from reftlens.text.batch import Batch
    from reftlens.text.template import Example
    from reftlens.text.view import TokenRole

    longest = max(map(len, rows))

    def padded(row, value):
        filling = [value] * (longest - len(row))
        return filling + row if side == "left" else row + filling

    tokens = torch.tensor([padded(row, pad) for row in rows])
    role = torch.tensor([padded([int(TokenRole.PROMPT)] * len(row), int(TokenRole.PAD)) for row in rows])
    examples = tuple(Example("") for _ in rows)
    return Batch(tokens, role, torch.zeros_like(role, dtype=torch.bool), examples, tokenizer())


@cache
def oracle(architecture, dtype=torch.float32):
    """Greedy continuations by plain transformers: one full forward pass per token, no cache, no padding."""
    model, rows = hf_model(architecture).to(dtype), prompts()
    ids = [[] for _ in rows]
    logits = [[] for _ in rows]
    for length in LENGTHS:
        group = [i for i, row in enumerate(rows) if len(row) == length]
        tokens = torch.tensor([rows[i] for i in group])
        for _ in range(STEPS):
            with torch.no_grad():
                last = model(input_ids=tokens, use_cache=False).logits[:, -1]
            chosen = last.argmax(dim=-1)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            for row, i in enumerate(group):
                if not ids[i] or ids[i][-1] != tokenizer().eos_token_id:
                    ids[i].append(int(chosen[row]))
                    logits[i].append(last[row])
    return [tuple(row) for row in ids], [torch.stack(row) for row in logits]


@cache
def generated(architecture, side="right"):
    import reftlens as rl

    return rl.generate(
        None, bridge(architecture), batch_of(prompts(), side), rl.Decoding(max_new_tokens=STEPS), keep_logits=True
    )


def assert_same(found, rows, ids, logits, tolerance=ROUNDING):
    """Equal tokens and, to rounding, equal logits; a row with a tie within rounding may go either way."""
    ties = 0
    for i, row in enumerate(rows):
        top = logits[row].topk(2, dim=-1).values
        if (top[:, 0] - top[:, 1]).min() < tolerance:
            ties += 1
            continue
        assert found.ids[i] == ids[row]
        torch.testing.assert_close(found.logits[i], logits[row], atol=tolerance, rtol=0)
    assert ties <= len(rows) // 50


# -- unedited: the cache, batches, padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_in_a_batch_equals_a_full_forward_per_token(architecture):
    ids, logits = oracle(architecture)
    assert_same(generated(architecture), range(PROMPTS), ids, logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_least_half_of_the_continuations_are_distinct(architecture):
    assert len(set(generated(architecture).ids)) >= PROMPTS / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_padded_on_the_left_give_what_prompts_padded_on_the_right_give(architecture):
    right, left = generated(architecture, "right"), generated(architecture, "left")
    assert right == left
    assert all(torch.equal(a, b) for a, b in zip(right.logits, left.logits, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_alone_gives_what_it_gives_in_a_batch(architecture):
    """One of each length."""
    import reftlens as rl

    ids, logits = oracle(architecture)
    for row in [next(i for i, row in enumerate(prompts()) if len(row) == length) for length in LENGTHS]:
        alone = rl.generate(
            None, bridge(architecture), batch_of([prompts()[row]]), rl.Decoding(max_new_tokens=STEPS), keep_logits=True
        )
        top = logits[row].topk(2, dim=-1).values
        if (top[:, 0] - top[:, 1]).min() >= ROUNDING:
            assert alone.ids == (ids[row],)
            torch.testing.assert_close(alone.logits[0], logits[row], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])  # the others compute norms and rotations in float32 always
def test_what_differs_is_rounding_and_vanishes_in_float64(architecture):
    import reftlens as rl

    ids, logits = oracle(architecture, torch.float64)
    model = bridge(architecture, torch.float64)
    found = rl.generate(None, model, batch_of(prompts()), rl.Decoding(max_new_tokens=STEPS), keep_logits=True)
    assert found.logits[0].dtype == torch.float64
    assert_same(found, range(PROMPTS), ids, logits, tolerance=1e-13)


# -- edited: the same as the teacher-forced forward pass of the text ---------------------------------------------------

WHERE = {
    "prompt": ("f2+l2", "prompt", "last"),
    "generated": ("generated", "response", "generated"),
    "both": ("all", "last+generated", "f1+response"),
}
VARIANTS = {
    "as trained": {},
    "negative": {"strength": -0.7},
    "per direction": {"strength": [2.0, 0.0, -1.0]},
    "one site": {"sites": [1]},
    "among": {"among": "f1+l1+generated"},
}


def sites_at(where):
    """Three sites of different shape, in different layers."""
    import reftlens as rl

    torch.manual_seed(4)
    first, second, third = WHERE[where]
    return rl.ReFT(
        {
            rl.resid_post(0, first): rl.LoReFT(D, rank=3),
            rl.attn_z(1, second, [1, 2]): rl.LoReFT(2 * D_HEAD, rank=3),
            rl.mlp_out(2, third): rl.LoReFT(D, rank=3),
        }
    )


@cache
def some():
    """Eight prompts, of every length and some twice."""
    rows = prompts()
    return [next(r for r in rows if len(r) == n) for n in LENGTHS] + [rows[0], rows[1]]


def forced(reft, model, found, variant):
    """Per row the logits that a forward pass over the finished text gives where each token was chosen."""
    batch = found.batch()
    with torch.no_grad(), reft.on(model, batch, variant):
        logits = model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
    starts = [len(p) - 1 for p in found.prompt_ids]
    return [logits[i, s : s + len(ids)] for i, (s, ids) in enumerate(zip(starts, found.ids, strict=True))]


@pytest.mark.parametrize(
    "where, variant", [*((w, "as trained") for w in WHERE), *(("both", v) for v in VARIANTS if v != "as trained")]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edited_generation_equals_the_teacher_forced_forward_of_the_same_text(architecture, variant, where):
    import reftlens as rl

    model, reft, variant = bridge(architecture), sites_at(where), rl.Variant(**VARIANTS[variant])
    found = rl.generate(
        reft, model, batch_of(some(), "left"), rl.Decoding(max_new_tokens=4), variant=variant, keep_logits=True
    )
    for row, expected in enumerate(forced(reft, model, found, variant)):
        torch.testing.assert_close(found.logits[row], expected, atol=ROUNDING, rtol=0)
    base = generated_some(architecture)
    first = [not torch.equal(a[0], b[0]) for a, b in zip(found.logits, base.logits, strict=True)]
    later = [not torch.equal(a[1:3], b[1:3]) for a, b in zip(found.logits, base.logits, strict=True)]
    assert all(first) if where != "generated" else not any(first)  # the first token is chosen from the prompt alone
    assert all(later)


@cache
def generated_some(architecture):
    import reftlens as rl

    return rl.generate(
        None, bridge(architecture), batch_of(some()), rl.Decoding(max_new_tokens=STEPS), keep_logits=True
    )


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_what_differs_from_the_teacher_forced_forward_vanishes_in_float64(architecture):
    import reftlens as rl

    model, reft = bridge(architecture, torch.float64), sites_at("both").double()
    found = rl.generate(reft, model, batch_of(some()), rl.Decoding(max_new_tokens=STEPS), keep_logits=True)
    for row, expected in enumerate(forced(reft, model, found, rl.Variant())):
        torch.testing.assert_close(found.logits[row], expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_edits_far_beyond_the_sliding_window_equal_the_teacher_forced_forward(architecture):
    import reftlens as rl

    model, reft = bridge(architecture), sites_at("both")
    rows = [prompts()[0] * 3, some()[-1] + some()[-2], some()[0]]
    found = rl.generate(reft, model, batch_of(rows), rl.Decoding(max_new_tokens=40), keep_logits=True)
    assert max(map(len, found.ids)) > 20  # more than the window of 16, prompt not counted
    for row, expected in enumerate(forced(reft, model, found, rl.Variant())):
        torch.testing.assert_close(found.logits[row], expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("then", ["at", "after"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_edits_where_what_was_written_matches_equal_the_teacher_forced_forward(architecture, then):
    """What most continuations hold, and not all begin with: some rows are edited early, some late, some never."""
    import reftlens as rl

    model, where = bridge(architecture), rl.positions.Written("[>Y]|sat|og", regex=True, then=then)
    reft = rl.ReFT({rl.resid_post(1, where): rl.SteeringVector(D, torch.full((D,), 1.5))})
    found = rl.generate(reft, model, batch_of(some(), "left"), rl.Decoding(max_new_tokens=STEPS), keep_logits=True)
    for row, expected in enumerate(forced(reft, model, found, rl.Variant())):
        torch.testing.assert_close(found.logits[row], expected, atol=ROUNDING, rtol=0)
    batch = found.batch()
    mask = where.mask(batch.view)
    for row, marks in enumerate(found.edited):
        assert list(marks[:-1]) == mask[row][batch.attention_mask[row]].tolist()[:-1]
    assert mask.any(dim=1).sum() >= len(mask) / 2 and not mask[batch.role >= 2].all()
    alone = rl.generate(reft, model, batch_of(some()[3:4]), rl.Decoding(max_new_tokens=STEPS))
    assert alone.ids == found.ids[3:4] and alone.edited == found.edited[3:4]


# -- which tokens are edited -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions, prompt, written",
    [
        ("f1", [1, 0, 0, 0, 0], [0, 0, 0]),
        ("l2", [0, 0, 0, 1, 1], [0, 0, 0]),
        ("f2+l2", [1, 1, 0, 1, 1], [0, 0, 0]),
        ("prompt", [1, 1, 1, 1, 1], [0, 0, 0]),
        ("generated", [0, 0, 0, 0, 0], [1, 1, 0]),
        ("l1+response", [0, 0, 0, 0, 1], [1, 1, 0]),
        ("all", [1, 1, 1, 1, 1], [1, 1, 0]),
        ([1, 6], [0, 1, 0, 0, 0], [0, 1, 0]),
    ],
)
@pytest.mark.parametrize("company", ["alone", "with a longer row, left", "with a longer row, right", "with many"])
def test_what_is_edited_follows_from_the_positions_and_not_from_batch_or_padding(positions, prompt, written, company):
    import reftlens as rl

    row, longer = [10, 11, 12, 13, 14], list(range(20, 43))
    rows = {"alone": [row], "with many": [[30, 31, 32, 33, 34, 35, 36], row, longer]}.get(company, [row, longer])
    side = "left" if company.endswith("left") else "right"
    reft = rl.ReFT({rl.resid_post(1, positions): rl.LoReFT(D)})
    found = rl.generate(reft, bridge("llama"), batch_of(rows, side), rl.Decoding(max_new_tokens=3))
    place = rows.index(row)
    assert len(found.ids[place]) == 3
    assert found.edited[place] == tuple(map(bool, prompt + written))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_edited_is_what_the_hook_sees_changed(architecture):
    import reftlens as rl

    model, seen = bridge(architecture), []
    reft = rl.ReFT({rl.resid_post(1, "f1+l2+generated"): rl.SteeringVector(D, torch.full((D,), 1000.0))})
    point = model.hook_dict["blocks.1.hook_resid_post"]
    rows = batch_of([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26, 27]])
    late = model.hook_dict["blocks.2.hook_resid_pre"]
    handle = late.add_hook(lambda h, hook: seen.append(h[..., 0] > 500))
    try:
        found = rl.generate(reft, model, rows, rl.Decoding(max_new_tokens=4))
    finally:
        handle.hook.remove()
        late.fwd_hooks.remove(handle)
    assert [tuple(s.shape) for s in seen] == [(2, 8)] + [(2, 1)] * (len(seen) - 1)
    through = torch.cat(seen, dim=1)
    for row in range(2):
        padding = 8 - len(found.prompt_ids[row])
        count = len(found.edited[row]) - 1  # the last token never goes in
        assert tuple(through[row, padding : padding + count].tolist()) == found.edited[row][:count]
        assert not through[row, :padding].any() and found.edited[row][count] is False
    assert not point.fwd_hooks


def test_five_positions_of_an_eight_token_prompt_are_five_and_of_one_token_one():
    import reftlens as rl

    for positions in ("f5", "l5"):
        reft = rl.ReFT({rl.resid_post(1, positions): rl.LoReFT(D)})
        found = rl.generate(reft, bridge("llama"), batch_of([list(range(10, 18)), [30]]), rl.Decoding(max_new_tokens=2))
        assert [sum(row) for row in found.edited] == [5, 1]


def test_the_last_token_is_the_last_token_of_the_prompt():
    import reftlens as rl

    model = bridge("gpt2")
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    found = rl.generate(reft, model, ["the cat", "the dog ran by the hill"], rl.Decoding(max_new_tokens=2))
    for row, marks in enumerate(found.edited):
        assert [i for i, hit in enumerate(marks) if hit] == [len(found.prompt_ids[row]) - 1]


@pytest.mark.parametrize("variant", [0, 0.0, (0.0, 0.0, 0.0)])
def test_at_strength_zero_no_token_is_edited_and_none_is_marked(llama, variant):
    import reftlens as rl

    reft, rows, decoding = sites_at("both"), batch_of(some()), rl.Decoding(max_new_tokens=3)
    variant, plain = rl.Variant(variant), rl.generate(None, llama, rows, decoding)
    assert rl.generate(reft, llama, rows, decoding, variant=variant) == plain
    off, on = rl.generate(reft, llama, rows, decoding, variant=[variant, 1])
    assert off == plain and all(any(marks) for marks in on.edited)


def test_a_site_that_can_only_act_on_the_prompt_and_chooses_nothing_there_is_refused(llama):
    import reftlens as rl

    with pytest.raises(ValueError, match="chooses no token in any of 2 row"):
        rl.generate(
            rl.ReFT({rl.resid_post(1, "f2"): rl.LoReFT(D)}),
            llama,
            batch_of([[9, 8, 7], [7, 8]]),
            rl.Decoding(max_new_tokens=2),
            variant=rl.Variant(among=[50]),
        )


def test_a_site_whose_turn_never_came_warns(llama):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, [20]): rl.LoReFT(D), rl.resid_post(0, "last"): rl.LoReFT(D)})
    with pytest.warns(UserWarning, match=r"blocks\.1\.hook_resid_post .* chose no token: the continuations ended"):
        rl.generate(reft, llama, batch_of([[9, 8, 7]]), rl.Decoding(max_new_tokens=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.generate(reft, llama, batch_of([list(range(10, 40))]), rl.Decoding(max_new_tokens=3))


def test_the_same_tokens_in_other_company_are_edited_alike(any_model):
    import reftlens as rl

    reft = sites_at("both")
    together = rl.generate(reft, any_model, batch_of(some()), rl.Decoding(max_new_tokens=3), keep_logits=True)
    for row in (0, 4):
        one = rl.generate(reft, any_model, batch_of([some()[row]]), rl.Decoding(max_new_tokens=3), keep_logits=True)
        assert (one.ids[0], one.edited[0]) == (together.ids[row], together.edited[row])
        torch.testing.assert_close(one.logits[0], together.logits[row], atol=ROUNDING, rtol=0)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_sampling_follows_its_seed_and_leaves_the_global_random_state_alone(llama):
    import reftlens as rl

    rows, state = batch_of(some()), torch.get_rng_state()
    draw = [rl.generate(None, llama, rows, rl.Decoding(max_new_tokens=8, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    torch.manual_seed(99)
    again = rl.generate(None, llama, rows, rl.Decoding(max_new_tokens=8, temperature=1.0, seed=1))
    assert draw[0] == draw[1] == again and draw[0] != draw[2]
    torch.set_rng_state(state)
    rl.generate(None, llama, rows, rl.Decoding(max_new_tokens=2, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_whole_numbers_and_the_coldest_temperature_are_settings_too(llama):
    import reftlens as rl

    for whole, same in (
        ({"temperature": 1, "top_p": 1}, {"temperature": 1.0, "top_p": 1.0}),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),
        ({"temperature": 1e-30}, {}),
    ):
        one, other = (
            rl.generate(None, llama, batch_of(some()), rl.Decoding(max_new_tokens=4, **settings))
            for settings in (whole, same)
        )
        assert one.texts == other.texts


def test_equal_prompts_in_a_batch_are_sampled_apart_and_as_often_as_the_softmax_says(llama):
    import reftlens as rl

    n, temperature = 4000, 0.7
    row = some()[2]
    found = rl.generate(
        None, llama, batch_of([row] * n), rl.Decoding(max_new_tokens=1, temperature=temperature), keep_logits=True
    )
    expected = (found.logits[0][0] / temperature).softmax(dim=-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in found.ids]), minlength=len(expected))
    off = (counts - n * expected) / (n * expected * (1 - expected)).sqrt()
    assert off.abs().max() < 5  # standard deviations; about 300 tokens
    assert off.abs().max() > 0.5  # and sampled, not dealt out


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-3}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}]
)
def test_sampling_with_no_freedom_is_greedy(llama, settings):
    import reftlens as rl

    assert (
        rl.generate(None, llama, batch_of(some()), rl.Decoding(max_new_tokens=STEPS, **settings)).ids
        == generated_some("llama").ids
    )


@pytest.mark.parametrize("settings, share", [({"top_k": 3}, None), ({"top_p": 0.4}, 0.4)])
def test_a_sample_comes_from_the_top(llama, settings, share):
    import reftlens as rl

    found = rl.generate(
        None,
        llama,
        batch_of(prompts()[:60]),
        rl.Decoding(max_new_tokens=3, temperature=1.0, **settings),
        keep_logits=True,
    )
    outside = ranks = 0
    for ids, logits in zip(found.ids, found.logits, strict=True):
        for token, row in zip(ids, logits, strict=True):
            probabilities = row.softmax(dim=-1)
            above = probabilities > probabilities[token]
            outside += int(above.sum() >= 3 if share is None else probabilities[above].sum() >= share + 1e-6)
            ranks = max(ranks, int(above.sum()))
    assert outside == 0 and ranks > 0


def test_an_edited_sample_is_drawn_from_the_edited_logits(llama):
    import reftlens as rl

    reft = sites_at("both")
    found = rl.generate(reft, llama, batch_of(some()), rl.Decoding(max_new_tokens=4, temperature=1.0), keep_logits=True)
    for row, expected in enumerate(forced(reft, llama, found, rl.Variant())):
        torch.testing.assert_close(found.logits[row], expected, atol=ROUNDING, rtol=0)


# -- penalties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, penalty, ngram",
    [("gpt2", 1.4, 0), ("gpt2", 1.0, 2), *((a, 1.2, 1) for a in ARCHITECTURES)],
)
def test_penalties_equal_those_of_transformers_alone_and_in_a_batch(architecture, penalty, ngram):
    import reftlens as rl

    model, steps = hf_model(architecture), 8
    ours = dict(repetition_penalty=penalty, no_repeat_ngram=ngram)
    theirs = dict(repetition_penalty=penalty, no_repeat_ngram_size=ngram, pad_token_id=2)
    rows = [some()[2], some()[4]]
    found = rl.generate(None, bridge(architecture), batch_of(rows), rl.Decoding(max_new_tokens=steps, **ours))
    for row, ids in zip(rows, found.ids, strict=True):
        tokens = torch.tensor([row])
        whole = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=steps, **theirs
        )[0, len(row) :].tolist()
        assert list(ids) == whole
    plain = rl.generate(None, bridge(architecture), batch_of(rows), rl.Decoding(max_new_tokens=steps))
    assert plain.ids != found.ids


def test_a_penalty_does_not_see_padding(llama):
    # transformers penalises the pad token of padded rows; where pad is eos, such rows would end later
    import reftlens as rl

    target = generated_some("llama").ids[0][0]
    short, longer = some()[0], list(range(20, 40))
    decoding = rl.Decoding(max_new_tokens=1, repetition_penalty=5.0)
    padded = rl.generate(None, llama, batch_of([longer, short], pad=target), decoding)
    assert padded.ids[1] == rl.generate(None, llama, batch_of([short]), decoding).ids[0]


# -- the end of a continuation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [True, False])
def test_a_row_ends_with_its_stop_token_and_the_others_go_on(as_list, monkeypatch):
    import reftlens as rl
    from reftlens.generation.runner import Runner

    model, plain = fresh_bridge("llama"), generated_some("llama")
    stop = next(ids[2] for ids in plain.ids if ids[2] not in ids[:2])
    model.original_model.generation_config.eos_token_id = [stop] if as_list else stop
    computed, step = [], Runner.step
    monkeypatch.setattr(Runner, "step", lambda self, rows, *a: (computed.append(len(rows)), step(self, rows, *a))[1])
    decoding = rl.Decoding(max_new_tokens=STEPS, verify=False)
    found = rl.generate(None, model, batch_of(some()), decoding, keep_logits=True)
    going = [sum(len(ids) > n for ids in found.ids) for n in range(1, STEPS)]
    assert computed[1 - STEPS :] == [8 if some > 6 else 6 for some in going] and 4 < min(going) <= 6 < max(going)
    for row, ids in enumerate(plain.ids):
        expected = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert found.ids[row] == expected
        assert found.logits[row].shape[0] == len(expected)
        assert len(found.edited[row]) == len(found.prompt_ids[row]) + len(expected)
        # a row that is done leaves the batch, and touches nobody
        torch.testing.assert_close(found.logits[row], plain.logits[row][: len(expected)], atol=ROUNDING, rtol=0)
    assert {len(ids) for ids in found.ids} >= {3, STEPS}


def test_a_finished_row_is_edited_no_more():
    import reftlens as rl

    model, plain = fresh_bridge("llama"), generated_some("llama")
    model.original_model.generation_config.eos_token_id = plain.ids[2][0]
    seen = []
    model.add_hook("blocks.2.hook_resid_pre", lambda h, hook: seen.append((h[..., 0].abs() > 500).sum(dim=1)))
    vector = torch.zeros(D)
    vector[0] = 1000.0
    reft = rl.ReFT({rl.resid_post(1, "generated"): rl.SteeringVector(D, vector)})
    found = rl.generate(reft, model, batch_of(some()), rl.Decoding(max_new_tokens=STEPS))
    assert len(found.ids[2]) == 1 < len(found.ids[0])
    assert torch.stack(seen).sum(dim=0).tolist() == [len(ids) - 1 for ids in found.ids]
    for ids, p, marks in zip(found.ids, found.prompt_ids, found.edited, strict=True):
        assert marks == (False,) * len(p) + (True,) * (len(ids) - 1) + (False,)


def test_chat_ends_with_the_turn_and_a_plain_prompt_does_not():
    import reftlens as rl

    model = fresh_bridge("llama")
    end = tokenizer().convert_tokens_to_ids("<end>")
    with torch.no_grad():  # a model that always says <end>
        model.original_model.lm_head.weight[end] = 0
        model.original_model.lm_head.weight.mul_(0)
        bias = torch.zeros(len(tokenizer()))
        bias[end] = 9.0
    model.original_model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    chat = rl.generate(None, model, ["the cat"], rl.Decoding(max_new_tokens=4), chat=True)
    plain = rl.generate(None, model, ["the cat"], rl.Decoding(max_new_tokens=4))
    assert chat.ids == ((end,),) and plain.ids == ((end,) * 4,)
    assert chat.texts == plain.texts == ("",)  # special tokens are no text
    text = tokenizer().decode(chat.prompt_ids[0])
    assert text == "<bos><turn>user:the cat<end><turn>assistant:"
    messages = [{"role": "user", "content": "the cat"}]
    assert rl.generate(None, model, [messages], rl.Decoding(max_new_tokens=4), chat=True) == chat
    led = rl.generate(None, model, ["the cat"], rl.Decoding(max_new_tokens=1), chat=True, system="sat")
    assert "system:sat<end>" in tokenizer().decode(led.prompt_ids[0])
    encoded = rl.encode_prompts(model, ["the cat"], chat=True)
    assert rl.generate(None, model, encoded, rl.Decoding(max_new_tokens=4)) == chat
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    for prompts in (encoded, rl.generation.prefill(reft, model, ["the cat"], chat=True)):
        assert rl.generate(reft, model, prompts, rl.Decoding(max_new_tokens=4)).ids == chat.ids


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_in_another_form_than_those_of_the_training_warn_also_after_loading(llama, tmp_path, chat):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    few = rl.Decoding(max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.generate(reft, llama, ["the cat"], few, chat=not chat)  # not trained on either
    rl.fit(reft, llama, rl.encode(llama, [rl.Example("the cat", " sat")], chat=chat), steps=1, progress=False)
    for edit in (reft, rl.load(rl.save(reft, tmp_path, llama), llama)):
        with pytest.warns(UserWarning, match=f"pass chat={chat}"):
            rl.generate(edit, llama, ["the cat"], few, chat=not chat)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rl.generate(edit, llama, ["the cat"], few, chat=chat)
            rl.generate(None, llama, ["the cat"], few, chat=not chat)
        with pytest.warns(UserWarning, match=f"pass chat={chat}"):
            list(rl.generation.stream(edit, llama, "the cat", few, chat=not chat))
    reft.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.generate(reft, llama, ["the cat"], few, chat=not chat)  # untrained again


@pytest.mark.parametrize("settings", [{"chat": True}, {"system": "sat"}])
def test_a_batch_comes_with_its_template(llama, settings):
    import reftlens as rl

    batch, reft = rl.encode_prompts(llama, ["the cat"]), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    with pytest.raises(ValueError, match="a Batch comes with the template of its prompts"):
        rl.generate(reft, llama, batch, **settings)
    with pytest.raises(ValueError, match="a Batch comes with the template of its prompts"):
        rl.generation.prefill(reft, llama, batch, **settings)


def test_more_tokens_than_the_context_holds_are_refused_before_anything_runs(any_model):
    import reftlens as rl

    rows = batch_of([list(range(10, 40)), [7]])
    with pytest.raises(ValueError, match=rf"longest prompt has 30 tokens, .*={CONTEXT - 29} .* context of {CONTEXT}"):
        rl.generate(None, any_model, rows, rl.Decoding(max_new_tokens=CONTEXT - 29))


def test_the_whole_context_can_be_filled(gpt2):
    import reftlens as rl

    room = 3
    found = rl.generate(None, gpt2, batch_of([[9] * (CONTEXT - room)]), rl.Decoding(max_new_tokens=room))
    assert len(found.ids[0]) == room


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"max_new_tokens": 0}, "=0, expected 1 or more"),
        ({"beams": 0}, "=0, expected 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0, expected a finite number, 0"),
        ({"temperature": 1e-40}, "temperature=1e-40, by which logits overflow: 0 is greedy"),
        ({"temperature": float("nan")}, "temperature=nan, expected a finite number, 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5, expected a share"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0, expected a share"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0, expected a finite number above 0"),
        ({"top_k": 5}, "temperature=0 does not sample"),
        ({"top_p": 0.5}, "temperature=0 does not sample"),
        ({"beams": 2, "temperature": 1.0}, "beams and sampling do not go together"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, why):
    import reftlens as rl

    with pytest.raises(ValueError, match=why):
        rl.Decoding(**settings)


def test_beams_keep_no_logits_and_are_no_stream_and_nothing_runs_to_say_so(llama):
    import reftlens as rl

    seen = []
    llama.blocks[0].hook_out.add_hook(lambda h, hook: seen.append(h) and None)
    try:
        with pytest.raises(ValueError, match="keep_logits needs beams=1"):
            rl.generate(None, llama, ["the cat"], rl.Decoding(beams=2), keep_logits=True)
        with pytest.raises(ValueError, match="a stream needs beams=1"):
            next(rl.generation.stream(None, llama, "the cat", rl.Decoding(beams=2)))
    finally:
        llama.reset_hooks()
    assert not seen


@pytest.mark.parametrize("misspelt", [{"max_tokens": 3}, {"temprature": 1.0}, {"num_beams": 2}])
def test_a_misspelt_setting_is_refused(misspelt):
    import reftlens as rl

    with pytest.raises(TypeError, match=next(iter(misspelt))):
        rl.Decoding(**misspelt)


@pytest.mark.parametrize("variant", [0.5, [0, 1]])
def test_a_variant_of_no_edit_is_refused(llama, variant):
    import reftlens as rl

    with pytest.raises(ValueError, match="reft=None edits nothing"):
        rl.generate(None, llama, ["the cat"], variant=variant)


def test_a_row_without_a_prompt_is_refused(llama):
    import reftlens as rl

    rows = batch_of([[5, 6], [7, 8]])
    rows.role[1] = 0
    with pytest.raises(ValueError, match="row 1 has no prompt token"):
        rl.generate(None, llama, rows, rl.Decoding(max_new_tokens=1))


def test_completions_of_a_batch_are_not_part_of_its_prompts(llama):
    import reftlens as rl

    pairs = [rl.Example("the cat sat", " on the mat"), rl.Example("a dog", " ran by")]
    decoding = rl.Decoding(max_new_tokens=4)
    with_completions = rl.generate(None, llama, rl.encode(llama, pairs), decoding)
    assert with_completions == rl.generate(None, llama, [p.prompt for p in pairs], decoding)


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, settings",
    [
        *((a, {}) for a in ("gpt2", "gemma3", "llama")),
        ("llama", {"temperature": 1.0, "seed": 3}),
        ("llama", {"repetition_penalty": 1.3, "no_repeat_ngram": 2}),
    ],
)
def test_the_pieces_of_a_stream_are_the_text_of_generate(architecture, settings):
    import reftlens as rl

    model, reft = bridge(architecture), sites_at("both")
    decoding = rl.Decoding(max_new_tokens=7, **settings)
    pieces = {}
    for prompt in ("the cat sat", "a dog ran by")[: 2 if architecture == "llama" else 1]:
        pieces[prompt] = list(rl.generation.stream(reft, model, prompt, decoding, variant=0.8))
        assert "".join(pieces[prompt]) == rl.generate(reft, model, [prompt], decoding, variant=0.8).texts[0]
    if architecture == "llama":
        assert max(map(len, pieces.values())) > 1  # bytes that are no text wait for what follows them


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "llama"])
def test_a_suspended_stream_leaves_no_hook_and_edits_no_other_call(architecture):
    import reftlens as rl

    model, reft = bridge(architecture), sites_at("both")
    batch = batch_of(some())

    def everyday():
        with torch.no_grad():
            return model(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)

    plain = everyday()
    stream = rl.generation.stream(reft, model, "the cat sat on", rl.Decoding(max_new_tokens=6))
    pieces = [next(stream)]
    assert torch.is_grad_enabled()
    assert not any(p.fwd_hooks for p in model.hook_dict.values())
    assert torch.equal(everyday(), plain)
    other = rl.generate(None, model, ["a dog"], rl.Decoding(max_new_tokens=2))
    pieces += list(stream)
    assert "".join(pieces) == rl.generate(reft, model, ["the cat sat on"], rl.Decoding(max_new_tokens=6)).texts[0]
    assert rl.generate(None, model, ["a dog"], rl.Decoding(max_new_tokens=2)) == other


def test_a_stream_that_is_dropped_leaves_nothing_behind(llama):
    import reftlens as rl

    stream = rl.generation.stream(sites_at("both").train(), llama, "the cat", rl.Decoding(max_new_tokens=20))
    next(stream)
    stream.close()
    assert torch.is_grad_enabled() and not any(p.fwd_hooks for p in llama.hook_dict.values())


@pytest.mark.parametrize("text", ["naïve 🍋 café", "🧑‍🚀👩‍👩‍👧‍👦", "日本語 and 한국어", "plain", "end 🎉"])
def test_a_stream_never_splits_a_character(text):
    from reftlens.generation.result import TextStream

    ids = tokenizer()(text, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer())
    pieces = [stream.push(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    if not text.isascii():
        assert "" in pieces  # some tokens are only a part of a character


def test_a_stream_that_ends_inside_a_character_says_so():
    from reftlens.generation.result import TextStream

    ids = tokenizer()("a🍋", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(tokenizer())
    pieces = [stream.push(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(pieces) == tokenizer().decode(ids) and "".join(pieces).startswith("a")


# -- what is given back ------------------------------------------------------------------------------------------------


def test_a_generation_shows_its_edited_tokens(llama):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "f1+l1"): rl.LoReFT(D)})
    found = rl.generate(reft, llama, ["the cat sat on", "a dog"], rl.Decoding(max_new_tokens=2))
    words = tokenizer()
    for row in range(2):
        pieces = [words.decode([t]) for t in found.prompt_ids[row]]
        pieces[0], pieces[-1] = f"⟦{pieces[0]}⟧", f"⟦{pieces[-1]}⟧"
        assert found.marked(row).startswith("".join(pieces))
        assert found.marked(row).count("⟦") == 2
    assert len(found) == 2
    lines = [f"[{i}] {text}".rstrip() for i, text in enumerate(found.texts)]
    assert str(found).split("\n") == "\n".join(lines).split("\n")
    assert rl.generate(None, llama, ["a dog"], rl.Decoding(max_new_tokens=2)).marked().count("⟦") == 0


def test_text_is_escaped_in_html(llama):
    import reftlens as rl

    prompt = '<script>alert("1")</script> & <b>'
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(D)})
    shown = rl.generate(reft, llama, [prompt], rl.Decoding(max_new_tokens=2))._repr_html_()
    assert "<script" not in shown and "<b>" not in shown
    bare = shown.replace('<mark title="edited">', "").replace("</mark>", "")
    assert prompt in html.unescape(bare) and "&lt;script&gt;" in bare
    assert shown.count('<mark title="edited">') > 3
    assert "<mark" not in rl.generate(None, llama, [prompt], rl.Decoding(max_new_tokens=2))._repr_html_()


def test_a_character_of_several_tokens_is_marked_once(llama):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D)})
    found = rl.generate(reft, llama, ["a 🍋"], rl.Decoding(max_new_tokens=1))
    assert "⟦🍋⟧" in found.marked()


def test_the_batch_of_a_generation_is_its_text_with_roles(llama):
    import reftlens as rl
    from reftlens.text.view import TokenRole

    found = rl.generate(None, llama, ["the cat sat on", "a dog"], rl.Decoding(max_new_tokens=3))
    batch = found.batch()
    for row in range(2):
        real = batch.attention_mask[row]
        p, g = found.prompt_ids[row], found.ids[row]
        assert batch.tokens[row][real].tolist() == [*p, *g]
        assert batch.role[row][real].tolist() == [TokenRole.PROMPT] * len(p) + [TokenRole.GENERATED] * len(g)
        assert batch.target_mask[row][real].tolist() == [False] * len(p) + [True] * len(g)


def test_logits_are_kept_only_on_request(llama):
    import reftlens as rl

    assert rl.generate(None, llama, ["a dog"], rl.Decoding(max_new_tokens=1)).logits == ()
    assert rl.generate(None, llama, ["a dog"], rl.Decoding(max_new_tokens=2), keep_logits=True).logits[0].shape == (
        2,
        len(tokenizer()),
    )
