"""Laws of positions: which tokens are chosen, by an oracle on plain lists, wherever the padding is."""

import json
import random
import re

import pytest
import torch

import architectures

PAD, PROMPT, RESPONSE, GENERATED = 0, 1, 2, 3

# Every kind and every way to join them: a constructor, and the places chosen in a row of roles, typed out on plain
# lists. `p` are the places of the prompt in the row, `a` all places, `r` those after the prompt, `g` the generated.
TABLE = {
    "First()": (lambda rl: rl.positions.First(), lambda p, a, r, g: p[:1]),
    "First(3)": (lambda rl: rl.positions.First(3), lambda p, a, r, g: p[:3]),
    "First(100)": (lambda rl: rl.positions.First(100), lambda p, a, r, g: p),
    "Last()": (lambda rl: rl.positions.Last(), lambda p, a, r, g: p[-1:]),
    "Last(3)": (lambda rl: rl.positions.Last(3), lambda p, a, r, g: p[-3:]),
    "Last(100)": (lambda rl: rl.positions.Last(100), lambda p, a, r, g: p),
    "Nth(0)": (lambda rl: rl.positions.Nth(0), lambda p, a, r, g: [p[0]]),
    "Nth(2)": (lambda rl: rl.positions.Nth(2, missing="skip"), lambda p, a, r, g: p[2:3]),
    "Nth(-1)": (lambda rl: rl.positions.Nth(-1), lambda p, a, r, g: [p[-1]]),
    "Nth(-3)": (lambda rl: rl.positions.Nth(-3, missing="skip"), lambda p, a, r, g: [p[-3]] if len(p) >= 3 else []),
    "At(0, 3, 6)": (lambda rl: rl.positions.At(0, 3, 6), lambda p, a, r, g: [i for i in a if i in (0, 3, 6)]),
    "All()": (lambda rl: rl.positions.All(), lambda p, a, r, g: a),
    "Prompt()": (lambda rl: rl.positions.Prompt(), lambda p, a, r, g: p),
    "Response()": (lambda rl: rl.positions.Response(), lambda p, a, r, g: r),
    "Generated()": (lambda rl: rl.positions.Generated(), lambda p, a, r, g: g),
    "First(2) | Last(2)": (lambda rl: rl.positions.First(2) | rl.positions.Last(2), lambda p, a, r, g: p[:2] + p[-2:]),
    "Last() | Generated()": (lambda rl: rl.positions.Last() | rl.positions.Generated(), lambda p, a, r, g: p[-1:] + g),
    "All() - Last()": (
        lambda rl: rl.positions.All() - rl.positions.Last(),
        lambda p, a, r, g: [i for i in a if i != p[-1]],
    ),
    "Prompt() - First(2)": (lambda rl: rl.positions.Prompt() - rl.positions.First(2), lambda p, a, r, g: p[2:]),
    "All() - Response()": (lambda rl: rl.positions.All() - rl.positions.Response(), lambda p, a, r, g: p),
    "Last(4) >> First(2)": (lambda rl: rl.positions.Last(4) >> rl.positions.First(2), lambda p, a, r, g: p[-4:][:2]),
    "First(4) >> Last()": (lambda rl: rl.positions.First(4) >> rl.positions.Last(), lambda p, a, r, g: p[:4][-1:]),
    "First(4) >> Nth(-1)": (lambda rl: rl.positions.First(4) >> rl.positions.Nth(-1), lambda p, a, r, g: [p[:4][-1]]),
    "First(4) >> At(1, 9)": (
        lambda rl: rl.positions.First(4) >> rl.positions.At(1, 9),
        lambda p, a, r, g: [i for i in p[:4] if i == 1],
    ),
    "Response() >> First(2)": (lambda rl: rl.positions.Response() >> rl.positions.First(2), lambda p, a, r, g: r[:2]),
    "Generated() >> First()": (lambda rl: rl.positions.Generated() >> rl.positions.First(), lambda p, a, r, g: g[:1]),
    "All() >> First(5)": (lambda rl: rl.positions.All() >> rl.positions.First(5), lambda p, a, r, g: a[:5]),
    "All() >> Prompt()": (lambda rl: rl.positions.All() >> rl.positions.Prompt(), lambda p, a, r, g: p),
    "Prompt() >> All()": (lambda rl: rl.positions.Prompt() >> rl.positions.All(), lambda p, a, r, g: p),
    "Response() >> (First() | Generated())": (
        lambda rl: rl.positions.Response() >> (rl.positions.First() | rl.positions.Generated()),
        lambda p, a, r, g: r[:1] + g,
    ),
    # Within a chain both sides of a difference choose among the tokens chosen before, as with a union.
    "First(4) >> (All() - Last())": (
        lambda rl: rl.positions.First(4) >> (rl.positions.All() - rl.positions.Last()),
        lambda p, a, r, g: p[:4][:-1],
    ),
    "(Last(3) >> First()) | First()": (
        lambda rl: (rl.positions.Last(3) >> rl.positions.First()) | rl.positions.First(),
        lambda p, a, r, g: p[-3:][:1] + p[:1],
    ),
}
RESPONDS = [name for name in TABLE if re.search(r"All|At|Response|Generated", name)]
# Prompt, completion and generated tokens of each row: one-token prompts, no response, long ones.
ROWS = [(6, 0, 4), (1, 3, 0), (3, 0, 0), (9, 2, 2), (2, 0, 5), (4, 4, 0)]


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def view_of(rows, side="right", extra=0, ids=None, tokenizer=None):
    """A `TokenView` with the padding on one side, and `extra` columns of it more than needed."""
    from reftlens.text.view import TokenView

    roles = [[PROMPT] * p + [RESPONSE] * r + [GENERATED] * g for p, r, g in rows]
    width = max(map(len, roles)) + extra
    ids = [[7] * len(row) for row in roles] if ids is None else ids

    def padded(row, value):
        gap = [value] * (width - len(row))
        return gap + row if side == "left" else row + gap

    return TokenView(
        torch.tensor([padded(row, 99) for row in ids]), torch.tensor([padded(row, PAD) for row in roles]), tokenizer
    )


def chosen(positions, view):
    """Chosen places per row, counted in the row without its padding; padding is never chosen."""
    mask = positions.mask(view)
    assert mask.dtype == torch.bool and mask.shape == view.ids.shape
    assert not (mask & (view.role == PAD)).any(), "padding was chosen"
    real = view.role != PAD
    return [row[keep].nonzero().flatten().tolist() for row, keep in zip(mask, real, strict=True)]


def expected(oracle, rows):
    result = []
    for p, r, g in rows:
        total = list(range(p + r + g))
        result.append(sorted(set(oracle(total[:p], total, total[p:], total[p + r :]))))
    return result


# -- what is chosen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", TABLE)
def test_each_choice_is_what_its_definition_on_plain_lists_says(rl, name, side, extra):
    make, oracle = TABLE[name]
    assert chosen(make(rl), view_of(ROWS, side, extra)) == expected(oracle, ROWS)


@pytest.mark.parametrize("name", TABLE)
def test_padding_on_either_side_and_other_rows_do_not_matter(rl, name):
    positions = TABLE[name][0](rl)
    together = chosen(positions, view_of(ROWS, "right"))
    assert chosen(positions, view_of(ROWS, "left", extra=3)) == together
    assert [chosen(positions, view_of([row]))[0] for row in ROWS] == together


@pytest.mark.parametrize("name", TABLE)
def test_ids_of_padding_tokens_are_never_read(rl, name):
    from reftlens.text.view import TokenView

    positions, view = TABLE[name][0](rl), view_of(ROWS, "left")
    other = TokenView(torch.where(view.role == PAD, torch.randint_like(view.ids, 99), view.ids), view.role)
    assert torch.equal(positions.mask(view), positions.mask(other))


def test_a_choice_of_the_users_own_cannot_choose_padding_either(rl):
    class Everything(rl.positions.Positions):
        kind = "everything"

        def select(self, view, among):
            return torch.ones_like(view.real)

    for side in ("left", "right"):
        assert chosen(Everything(), view_of(ROWS, side)) == chosen(rl.positions.All(), view_of(ROWS, side))


def test_a_short_prompt_chooses_fewer_tokens_and_never_one_of_the_response(rl):
    rows = [(p, 5, 0) for p in (1, 2, 3, 5)]
    for text in ("f3+l3", "f7+l7", "l5", "f5"):
        for (p, _, _), places in zip(rows, chosen(rl.positions.parse(text), view_of(rows)), strict=True):
            assert places and max(places) < p
    assert chosen(rl.positions.parse("f3+l3"), view_of([(3, 5, 0)])) == [[0, 1, 2]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_last_is_the_last_prompt_token_with_and_without_a_response(rl, side):
    rows = [(5, 3, 0), (5, 0, 0), (1, 2, 0)]
    assert chosen(rl.positions.parse("l1"), view_of(rows, side)) == [[4], [4], [0]]


def test_one_sided_choices_are_not_halved(rl):
    assert chosen(rl.positions.parse("f5"), view_of([(8, 0, 0)])) == [[0, 1, 2, 3, 4]]
    assert chosen(rl.positions.parse("l5"), view_of([(8, 0, 0)])) == [[3, 4, 5, 6, 7]]
    assert chosen(rl.positions.parse("l1"), view_of([(1, 0, 0)])) == [[0]]


def test_two_explicit_places_are_two_places(rl):
    assert chosen(rl.positions.At(2, 5), view_of([(8, 0, 0)])) == [[2, 5]]
    assert (
        rl.positions.At([2, 5])
        == rl.positions.At(2, 5)
        == rl.positions.At(5, 2, 5)
        == rl.resid_post(0, [2, 5]).positions
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_an_overlapping_union_edits_each_token_once(rl, gpt2, n):
    from reftlens.editing.bound import Bound

    reft = rl.ReFT({rl.resid_post(1, rl.positions.First(3) | rl.positions.Last(3)): rl.LoReFT(gpt2.cfg.d_model)})
    view = view_of([(n, 2, 0), (4, 0, 0)])
    (edit,) = Bound(reft.bind(gpt2), rl.Variant(), {}).edits(view)
    places = list(zip(edit.tokens.rows.tolist(), edit.tokens.columns.tolist(), strict=True))
    assert len(places) == len(set(places)) == min(n, 6) + 4


# -- nothing later matters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_a_mask_never_depends_on_later_tokens(rl, name):
    """Adding tokens after the prompt leaves every earlier choice as it was, however many are added."""
    positions = TABLE[name][0](rl)
    full = [(4, 3, 4), (2, 0, 6), (1, 2, 0)]
    whole = chosen(positions, view_of(full))
    for length in range(8):
        cut = [(p, min(r, length), max(0, min(g, length - r))) for p, r, g in full]
        for (p, r, g), before, after in zip(cut, chosen(positions, view_of(cut)), whole, strict=True):
            assert before == [i for i in after if i < p + r + g]


@pytest.mark.parametrize("name", TABLE)
def test_what_does_not_reach_the_response_is_unmoved_by_it_and_says_so(rl, name):
    """`reaches_response` is what generation trusts: false means that no token after the prompt is ever chosen."""
    positions, oracle = TABLE[name][0](rl), TABLE[name][1]
    prompts = [(p, 0, 0) for p, _, _ in ROWS]
    beyond = [i >= p for (p, _, _), row in zip(ROWS, expected(oracle, ROWS), strict=True) for i in row]
    if not positions.reaches_response:
        assert not any(beyond)
        assert chosen(positions, view_of(ROWS)) == chosen(positions, view_of(prompts))
    if any(beyond):
        assert positions.reaches_response


@pytest.mark.parametrize("name", RESPONDS)
def test_later_ids_are_not_read(rl, name):
    positions, rows = TABLE[name][0](rl), [(4, 2, 3), (2, 3, 0)]
    draw = random.Random(0)
    first = [[draw.randrange(50) for _ in range(p + r + g)] for p, r, g in rows]
    other = [row[:p] + [i + 1 for i in row[p:]] for row, (p, _, _) in zip(first, rows, strict=True)]
    assert chosen(positions, view_of(rows, ids=first)) == chosen(positions, view_of(rows, ids=other))


def test_response_holds_completion_and_generated_tokens_and_generated_only_its_own(rl):
    rows = [(3, 2, 2), (3, 2, 0), (3, 0, 2)]
    assert chosen(rl.positions.Response(), view_of(rows)) == [[3, 4, 5, 6], [3, 4], [3, 4]]
    assert chosen(rl.positions.Generated(), view_of(rows)) == [[5, 6], [], [3, 4]]


@pytest.mark.parametrize("right", ["Last()", "Nth(0)", "Nth(-1)", "Tokens('a')"])
@pytest.mark.parametrize("left", ["Response()", "Generated()", "All()", "At(9)", "(Last() | Generated())"])
def test_prompt_selectors_are_refused_for_tokens_after_the_prompt(rl, left, right):
    space = vars(rl.positions)
    for text in (f"{left} >> {right}", f"{left} >> ({right} | Response())", f"{left} >> (All() - {right})"):
        with pytest.raises(ValueError, match=r"acts on the prompt only, and .* after the prompt"):
            eval(text, dict(space))


def test_prompt_selectors_after_the_prompt_are_fine_behind_a_prompt_selector(rl):
    assert chosen(rl.positions.Prompt() >> rl.positions.Last(), view_of(ROWS)) == chosen(
        rl.positions.Last(), view_of(ROWS)
    )
    inner = rl.positions.Prompt() >> rl.positions.Last()
    assert chosen(rl.positions.All() >> inner, view_of(ROWS)) == chosen(rl.positions.Last(), view_of(ROWS))


# -- algebra -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", TABLE)
def test_unions_and_differences_are_those_of_sets(rl, left):
    view = view_of(ROWS)
    a = TABLE[left][0](rl)
    for right in list(TABLE)[::4]:
        b = TABLE[right][0](rl)
        assert torch.equal((a | b).mask(view), a.mask(view) | b.mask(view))
        assert torch.equal((a - b).mask(view), a.mask(view) & ~b.mask(view))


@pytest.mark.parametrize("left", ["First(3)", "Last(3)", "Prompt()", "First(2) | Last(2)", "Prompt() - First(2)"])
def test_a_chain_chooses_among_what_came_before_and_distributes_over_unions_and_differences(rl, left):
    view, a = view_of(ROWS), TABLE[left][0](rl)
    pieces = [
        rl.positions.First(2),
        rl.positions.Last(2),
        rl.positions.All(),
        rl.positions.Prompt(),
        rl.positions.At(0, 2),
    ]
    for b in pieces:
        assert not ((a >> b).mask(view) & ~a.mask(view)).any()
        for c in pieces:
            assert torch.equal((a >> (b | c)).mask(view), ((a >> b) | (a >> c)).mask(view))
            assert torch.equal((a >> (b - c)).mask(view), ((a >> b) - (a >> c)).mask(view))
            if not b.reaches_response:  # elsewhere `b >> c` may not exist on its own
                assert torch.equal((a >> (b >> c)).mask(view), ((a >> b) >> c).mask(view))


# -- spelling ------------------------------------------------------------------------------------------------


def test_positions_are_read_from_strings(rl):
    first, last = rl.positions.First, rl.positions.Last
    for text, positions in {
        "f7+l7": first(7) | last(7),
        "f1+l1": first(1) | last(1),
        "l2+f3": last(2) | first(3),
        "f3": first(3),
        "l12": last(12),
        "first": first(),
        "last": last(),
        "all": rl.positions.All(),
        "prompt": rl.positions.Prompt(),
        "response": rl.positions.Response(),
        "generated": rl.positions.Generated(),
        "last+generated": last() | rl.positions.Generated(),
        " f2 + l2 ": first(2) | last(2),
    }.items():
        assert rl.positions.parse(text) == positions
        assert rl.resid_post(0, text).positions == positions
        assert chosen(positions, view_of(ROWS)) == chosen(rl.positions.parse(text), view_of(ROWS))


@pytest.mark.parametrize("text", ["x", "", "+", "f0", "l-1", "f", "7", "f1l1", "F1", "lst", "f1+", "f1+x", "last(3)"])
def test_a_string_that_means_nothing_is_refused_with_the_part_that_does_not(rl, text):
    """pyreft reads "x" as no token at all, and "last" and "l2+f3" crash in it."""
    with pytest.raises(ValueError, match=r"cannot read positions .* is none of f<n>, l<n>, first, last"):
        rl.positions.parse(text)


@pytest.mark.parametrize("name", TABLE)
def test_positions_survive_a_round_trip_through_json(rl, name):
    from reftlens.text.positions.spelling import positions_from_dict

    positions = TABLE[name][0](rl)
    again = positions_from_dict(json.loads(json.dumps(positions.to_dict())))
    assert again == positions and hash(again) == hash(positions)
    assert again.reaches_response == positions.reaches_response
    assert chosen(again, view_of(ROWS)) == chosen(positions, view_of(ROWS))


def test_different_positions_are_different(rl):
    kinds = [make(rl) for make, _ in TABLE.values()]
    assert all((a == b) == (i == j) for i, a in enumerate(kinds) for j, b in enumerate(kinds))


def test_every_kind_of_positions_is_in_the_table(rl):
    from reftlens.text import positions

    def kinds(spec):
        return {spec["kind"]}.union(*(kinds(v) for v in spec.values() if isinstance(v, dict)))

    seen = set().union(*(kinds(make(rl).to_dict()) for make, _ in TABLE.values()))
    assert seen | {"tokens", "role", "written"} == set(
        positions.KINDS
    )  # these need a tokenizer and have tests of their own


def test_unknown_kinds_and_fields_are_refused(rl):
    from reftlens.text.positions.spelling import positions_from_dict

    with pytest.raises(ValueError, match="unknown kind of positions 'frist', expected one of first, last"):
        positions_from_dict({"kind": "frist", "n": 1})
    for spec in ({"kind": "last", "m": 1}, {"kind": "at", "indices": [1], "n": 2}):
        with pytest.raises(TypeError):
            positions_from_dict(spec)


@pytest.mark.parametrize(
    "call", ["First(count=3)", "Last(m=1)", "Nth(0, mising='skip')", "Tokens('a', regexp=True)", "At(indices=3)"]
)
def test_misspelt_arguments_are_refused(rl, call):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        eval(call, dict(vars(rl.positions)))


@pytest.mark.parametrize("call", ["First(0)", "Last(-1)", "At()", "At(-1)", "At(3, -2)", "Tokens('')"])
def test_a_choice_of_nothing_is_refused(rl, call):
    with pytest.raises(ValueError, match=r"n=-?\d, expected 1 or more|counted from 0|matches nothing"):
        eval(call, dict(vars(rl.positions)))


# -- missing -------------------------------------------------------------------------------------------------


def test_a_missing_nth_token_raises_with_its_rows_or_is_skipped(rl):
    view = view_of([(5, 0, 0), (2, 9, 0), (3, 0, 0), (1, 0, 0)])
    for k, rows in ((2, r"\[1, 3\]"), (-3, r"\[1, 3\]"), (1, r"\[3\]")):
        with pytest.raises(ValueError, match=rf"too few tokens in row\(s\) {rows}; pass missing=\"skip\""):
            rl.positions.Nth(k).mask(view)
    assert chosen(rl.positions.Nth(2, missing="skip"), view) == [[2], [], [2], []]
    assert chosen(rl.positions.Nth(-3, missing="skip"), view) == [[2], [], [0], []]


def test_a_missing_text_raises_with_its_rows_or_is_skipped(rl):
    view, _ = text_view(["the cat", "the dog", "a cat", "x"])
    with pytest.raises(ValueError, match=r"no such token in the prompt in row\(s\) \[1, 3\]"):
        rl.positions.Tokens("cat").mask(view)
    rows = rl.positions.Tokens("cat", missing="skip").mask(view).any(dim=1)
    assert rows.tolist() == [True, False, True, False]


# -- by text -------------------------------------------------------------------------------------------------

TEXTS = [
    "the cat sat on the mat",
    "pizza 🍕 and 🍣, 👩‍👩‍👧 at the moon",
    "flags 🇯🇵🇫🇷 thumbs 👍🏽 and 漢字 é ñ naïve",
    "😀😀😀",
    "  spaces   and\nlines\t",
    "<turn>user:the cat<end>",
]


def text_view(texts, side="right", response=0):
    """A view of prompts given as text, and the spans of their tokens by the tokenizer's own account."""
    tokenizer = architectures.tokenizer()
    encoded = [tokenizer(text, return_offsets_mapping=True) for text in texts]
    ids = [e.input_ids + [100] * response for e in encoded]
    rows = [(len(e.input_ids), response, 0) for e in encoded]
    return view_of(rows, side, ids=ids, tokenizer=tokenizer), [e.offset_mapping for e in encoded]


def overlapping(spans, text, pattern):
    matches = [m.span() for m in re.finditer(pattern, text)]
    return [i for i, (s, e) in enumerate(spans) if any(s < b and a < e for a, b in matches)]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_tokens_agrees_with_the_tokenizers_own_offsets(rl, text):
    from reftlens.text.view import token_spans

    encoded = architectures.tokenizer()(text, return_offsets_mapping=True)
    assert token_spans(architectures.tokenizer(), encoded.input_ids) == (text, encoded.offset_mapping)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_piece_of_text_finds_exactly_the_tokens_that_carry_it(rl, side):
    draw = random.Random(0)
    for text in TEXTS:
        view, (spans,) = text_view([text], side, response=3)
        pieces = {text[a : a + draw.randrange(1, 6)] for a in range(len(text))}
        for piece in sorted(pieces):
            assert chosen(rl.positions.Tokens(piece), view) == [overlapping(spans, text, re.escape(piece))], piece


def test_a_text_may_span_several_tokens_and_occur_more_than_once(rl):
    texts = ["the 🍕 cat 🍕 on", "🍕"]
    view, spans = text_view(texts)
    places = chosen(rl.positions.Tokens("🍕"), view)
    assert places == [overlapping(s, t, "🍕") for s, t in zip(spans, texts, strict=True)]
    assert [len(row) for row in places] == [8, 4]  # four bytes of UTF-8 each
    assert chosen(rl.positions.Tokens("the cat"), text_view(["on the cat sat"])[0]) == [[1, 2]]


def test_patterns_are_regular_expressions_and_texts_are_not(rl):
    text = "a.b the cat a+b"
    view, (spans,) = text_view([text])
    assert chosen(rl.positions.Tokens(r"c.t|a\+b", regex=True), view) == [overlapping(spans, text, r"c.t|a\+b")]
    assert chosen(rl.positions.Tokens("a.b"), view) == [overlapping(spans, text, r"a\.b")]
    assert chosen(rl.positions.Tokens("a+b"), view) == [overlapping(spans, text, r"a\+b")]
    with pytest.raises(re.error):
        rl.positions.Tokens("(", regex=True)
    assert chosen(rl.positions.Tokens("x*", regex=True, missing="skip"), view) == [[]]  # an empty match is no match


def test_text_is_looked_for_in_the_prompt_only(rl):
    tokenizer = architectures.tokenizer()
    prompt, response = tokenizer("the cat").input_ids, tokenizer(" the dog").input_ids
    rows, ids = [(len(prompt), len(response), 0)], [prompt + response]
    view = view_of(rows, ids=ids, tokenizer=tokenizer)
    assert chosen(rl.positions.Tokens("the"), view) == [[0]]
    assert not rl.positions.Tokens("the").reaches_response
    with pytest.raises(ValueError, match="no such token"):
        rl.positions.Tokens("dog").mask(view)


def test_texts_join_and_chain_like_other_choices(rl):
    view, _ = text_view(["the cat sat on the mat"])
    assert chosen(rl.positions.Tokens("the") >> rl.positions.Last(), view) == [[4]]
    assert chosen(rl.positions.Last(3) >> rl.positions.Tokens("the"), view) == [[4]]
    assert chosen(rl.positions.Tokens("the") - rl.positions.First(), view) == [[4]]
    assert chosen(rl.positions.Tokens("cat") | rl.positions.Last(), view) == [[1, 5]]
    again = type(rl.positions.Tokens("c"))(
        **{k: v for k, v in rl.positions.Tokens("c.t", regex=True).to_dict().items() if k != "kind"}
    )
    assert again == rl.positions.Tokens("c.t", regex=True)


def test_text_needs_a_tokenizer(rl):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        rl.positions.Tokens("a").mask(view_of([(3, 0, 0)]))


def test_neighbouring_emoji_are_told_apart_where_bytes_fall_back_to_tokens_of_their_own(rl):
    """Llama and Gemma spell unknown characters as byte tokens, and decode a run of bytes only as a whole."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from reftlens.text.view import token_spans

    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    bpe = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    text, spans = token_spans(tokenizer, tokenizer("a😀🍕a a").input_ids)
    assert text == "a😀🍕a a"  # the space in front is dropped at the start of a text, and there only
    assert spans == [(0, 1)] + [(1, 2)] * 4 + [(2, 3)] * 4 + [(3, 4), (4, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS[:5])
def test_the_real_tokenizer_finds_every_piece_of_text(rl, smol, text):
    """Its own offsets give all but the first token of a character an empty span, so the text is the oracle."""
    from reftlens.text.view import token_spans

    ids = smol.tokenizer(text, add_special_tokens=False).input_ids
    read, spans = token_spans(smol.tokenizer, ids)
    assert read == text
    for place in range(len(text)):
        carrying = [i for i, (s, e) in enumerate(spans) if s <= place < e]
        assert text[place] in smol.tokenizer.decode([ids[i] for i in carrying])
        without = [t for i, t in enumerate(ids) if i not in carrying]
        assert smol.tokenizer.decode(without).count(text[place]) < text.count(text[place])


def test_a_choice_says_what_was_asked_for():
    import reftlens as rl

    assert str(rl.positions.Last(3)) == "Last(n=3)" and str(rl.positions.All()) == "All()"
    assert str(rl.positions.Tokens("cat")) == "Tokens(text='cat')"
    assert str(rl.positions.Tokens("c.t", regex=True)) == "Tokens(text='c.t', regex=True)"
    assert (
        str(rl.positions.First(1) | rl.positions.Nth(-2, missing="skip"))
        == "Union(left=First(n=1), right=Nth(k=-2, missing='skip'))"
    )


# -- by what has been written --------------------------------------------------------------------------------

WRITTEN = [
    ("cat", False),
    ("t", False),
    (" the", False),
    ("🍕", False),
    (r"c.t", True),
    (r"[aeiou]{2}|\bon", True),
    (r"\.?$", True),
    (r"a(?!n)", True),
]


def written_view(texts, side="right", cut=None, generated=False):
    """Prompts of two tokens, and texts after them, of which the first `cut` tokens are there."""
    tokenizer = architectures.tokenizer()
    prompt = tokenizer("the cat").input_ids
    ids = [prompt + tokenizer(text).input_ids[:cut] for text in texts]
    rows = [(2, 0, len(row) - 2) if generated else (2, len(row) - 2, 0) for row in ids]
    return view_of(rows, side, ids=ids, tokenizer=tokenizer)


def written_oracle(text, pattern, regex):
    """Which tokens end a match in the text up to them alone, each prefix decoded by itself."""
    tokenizer, hits, before = architectures.tokenizer(), [], ""
    ids = tokenizer(text).input_ids
    for stop in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:stop]).removesuffix("\ufffd")
        if regex:
            ends = [m.end() for m in re.finditer(pattern, now) if m.group()]
        else:
            ends = [i + len(pattern) for i in range(len(now)) if now[i:].startswith(pattern)]
        hits.append(any(len(before) < end <= len(now) for end in ends))
        before = now
    return hits


@pytest.mark.parametrize(("pattern", "regex"), WRITTEN)
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_written_is_matched_as_it_stands_at_each_token(rl, pattern, regex, side):
    """Whoever writes it, and however much more is written afterwards."""
    texts = [*TEXTS[:2], "catcat on the cat", "a moon, an 🍕 é"]
    at, after = (rl.positions.Written(pattern, regex, then) for then in ("at", "after"))
    for generated in (False, True):
        view = written_view(texts, side, generated=generated)
        for text, here, later in zip(texts, chosen(at, view), chosen(after, view), strict=True):
            hits = written_oracle(text, pattern, regex)
            assert here == [2 + i for i, hit in enumerate(hits) if hit]
            assert later == [2 + i for i in range(len(hits)) if any(hits[:i])]
    whole = chosen(at | after, written_view(texts))
    for cut in range(1, 12):
        short = written_view(texts, side, cut=cut)
        assert chosen(at | after, short) == [[i for i in row if i < 2 + cut] for row in whole]


def test_written_text_joins_chains_and_is_stored_like_other_choices(rl):
    from reftlens.text.positions.spelling import positions_from_dict

    view = written_view(["catcat on the cat"])
    cats = rl.positions.Written("cat")
    assert chosen(rl.positions.Response() >> cats, view) == chosen(cats, view)
    assert chosen(cats >> rl.positions.First(), view) == [chosen(cats, view)[0][:1]]
    assert chosen(rl.positions.Prompt() >> cats, view) == [[]], "the cat of the prompt is not written"
    assert cats.reaches_response and positions_from_dict(json.loads(json.dumps(cats.to_dict()))) == cats
    assert str(rl.positions.Written("c", then="after")) == "Written(text='c', then='after')"
    with pytest.raises(ValueError, match="matches nothing"):
        rl.positions.Written("")
    with pytest.raises(re.error):
        rl.positions.Written("(", regex=True)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        cats.mask(view_of([(3, 2, 0)]))
