"""Judges that are known: their order is swapped, ties and unread replies are counted, an endpoint is asked as it is.

No judge here says anything about a model: each is a rule, so that what should come out is known.
"""

import pytest
import torch
from judge_server import longer, serving, shown

ASKED = [f"Name {i} birds." for i in range(12)]
SHORT, LONG = ["A wren."] * 12, ["A wren, a robin and a tit."] * 12


def test_a_judge_that_prefers_length_gives_it_every_win():
    from reftlens.experiments.judges.judging import win_rate

    assert win_rate(longer, ASKED, LONG, SHORT).rate.value == 1
    assert win_rate(longer, ASKED, SHORT, LONG).rate.value == 0
    half = win_rate(longer, ASKED, [*LONG[:6], *SHORT[6:]], [*SHORT[:6], *LONG[6:]])
    assert half.rate.value == 0.5 and half.rate.low < 0.5 < half.rate.high and not half.failures
    assert win_rate(longer, ASKED, LONG, SHORT, workers=4) == win_rate(longer, ASKED, LONG, SHORT)


def test_a_judge_that_prefers_a_place_prefers_no_answer():
    from reftlens.experiments.judges.judging import win_rate

    first = win_rate(lambda question: "The first. [[A]]", ASKED, LONG, SHORT)
    assert first.rate.value == 0.5 and first.by_place == 12
    assert "12 pairs decided by place alone" in repr(first)


def test_ties_and_unread_replies_are_counted_and_scored_again_from_what_was_stored():
    from reftlens.experiments.judges.judging import Duel, rate_of, win_rate

    tied = win_rate(longer, ASKED, SHORT, SHORT)
    assert tied.rate.value == 0.5 and tied.ties == 24
    replies = iter(["[[A]]", "who knows", "", "?", *["[[A]]", "[[B]]"] * 10])
    some = win_rate(lambda question: next(replies), ASKED, LONG, SHORT)
    assert some.failures == 3 and some.rate.count == 11 and some.rate.value == 1 and len(some.duels) == 12
    assert rate_of([Duel(d.instruction, d.replies) for d in some.duels]) == some


def test_texts_are_shown_as_they_are():
    from reftlens.experiments.judges.judging import win_rate

    seen = []
    win_rate(lambda question: seen.append(question) or "[[C]]", ["{a} {b}"], ["{b} {x}"], ["{instruction}"])
    assert [shown(question) for question in seen] == [("{b} {x}", "{instruction}"), ("{instruction}", "{b} {x}")]
    assert all("[Instruction]\n{a} {b}\n" in question for question in seen)


def test_what_cannot_be_judged_is_refused():
    from reftlens.experiments.judges.judging import rate_of, win_rate

    with pytest.raises(ValueError, match="12 instructions, 12 and 1 answers"):
        win_rate(longer, ASKED, LONG, ["x"])
    with pytest.raises(ValueError, match=r"none of 24 replies could be read.*'hm'"):
        win_rate(lambda question: "hm", ASKED, LONG, SHORT)
    with pytest.raises(ValueError, match=r"the template has no \{b\}"):
        win_rate(longer, ASKED, LONG, SHORT, template="{instruction} {a}")
    with pytest.raises(TypeError, match="the judge replied 1, expected text"):
        win_rate(lambda question: 1, ASKED, LONG, SHORT)
    with pytest.raises(ValueError, match="no duels to rate"):
        rate_of([])


# -- an endpoint ---------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with serving() as served:
        yield served


def test_an_endpoint_is_a_judge(server):
    from reftlens.experiments.judges.judging import Endpoint, win_rate

    judge = Endpoint("small", f"http://127.0.0.1:{server.server_port}/v1", "a key")
    assert win_rate(judge, ASKED[:3], LONG[:3], SHORT[:3]).rate.value == 1
    path, key, asked = server.asked[0]
    assert (path, key, len(server.asked)) == ("/v1/chat/completions", "Bearer a key", 6)
    assert asked["model"] == "small" and asked["temperature"] == 0 and asked["max_tokens"] == 512
    assert "a key" not in repr(judge)


def test_an_endpoint_is_asked_again_and_then_gives_up(server):
    from reftlens.experiments.judges.judging import Endpoint

    judge = Endpoint("small", f"http://127.0.0.1:{server.server_port}/v1", "a key", attempts=2)
    question = f"[Answer A]\n{LONG[0]}\n\n[Answer B]\n{SHORT[0]}\n\nReason"
    server.failures += [500, 503]
    assert judge(question) == "[[A]]" and len(server.asked) == 3
    server.failures += [404]
    with pytest.raises(ConnectionError, match=r"small at http.* gave no reply: .*no such model.*check base_url="):
        judge(question)
    with pytest.raises(ValueError, match="max_tokens=0"):
        Endpoint("small", max_tokens=0)


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (b'{"choices": []}', "expected a chat completion with a choice"),
        (b'{"error": {"message": "overloaded"}}', "overloaded"),
        (b'{"choices": [{"index": 0, "message": null}]}', "expected a chat completion with a choice"),
        (b'{"choices": [{"index": 0, "message": {"content": [{"type": "text"}]}}]}', "type.*expected text"),
        (b"<html>Log in</html>", "<html>Log in</html>"),
        (b"", "Expecting value"),
    ],
)
def test_what_an_endpoint_sends_in_place_of_a_reply_is_said(server, body, seen):
    from reftlens.experiments.judges.judging import Endpoint

    server.bodies, server.reply = [body], lambda question: ""
    with pytest.raises(ConnectionError, match=rf"(?s)small at http.* gave no reply: .*{seen}.*; check base_url="):
        Endpoint("small", f"http://127.0.0.1:{server.server_port}/v1", "a key", attempts=0)("Which?")


# -- AxBench -------------------------------------------------------------------------------------------------


def test_the_harmonic_mean_is_zero_where_one_rating_is():
    from reftlens.experiments.judges.axbench import harmonic_mean

    ratings = torch.tensor([[2, 2, 2], [1, 2, 2], [1, 1, 1], [0, 2, 2], [2, 2, float("nan")], [0, 2, float("nan")]])
    found = harmonic_mean(ratings)
    assert torch.allclose(found[:4], torch.tensor([2, 3 / (1 + 0.5 + 0.5), 1, 0]), atol=1e-6)
    assert found[4:].isnan().all()


def steered(factor, instructions=8, concepts=("sea", "sun")):
    """Texts that hold more of the concept and less of the rest, the higher the factor."""
    from reftlens.experiments.judges.axbench import Steered

    words = {0: "plain", 1: "some {c}", 2: "{c} {c}", 4: "{c} {c} {c} broken"}[factor]
    return [Steered(c, f"Tell {i}.", words.format(c=c)) for c in concepts for i in range(instructions)]


def known(question):
    text = question.split("[Text]\n")[1].split("\n\nEnd")[0]
    if question.startswith("Is the concept"):
        return f"Rating: [[{min(2, text.count(question.split('[Concept]' + chr(10))[1].split(chr(10))[0]))}]]"
    return f"Rating: [[{0 if 'broken' in text else 2}]]"


def test_the_factor_is_chosen_on_one_half_and_scored_on_the_other():
    from reftlens.experiments.judges.axbench import rate, steering_score

    rated = {factor: rate(known, steered(factor)) for factor in (0, 1, 2, 4)}
    score = steering_score(rated, steered(0))
    assert score.factor == 2 and score.overall.value == 2 and score.overall.count == 8 and score.failures == 0
    assert rated[0].overall.max() == 0 and rated[4].overall.max() == 0 and rated[1].overall.min() == 1.5
    assert "overall 2.00 [all alike; only 8 examples] at factor 2" in repr(score)


def test_what_looks_best_where_it_is_chosen_does_not_count_there():
    """Ratings at random: the best of 40 factors is far above the mean on its own half, and not on the other."""
    from reftlens.experiments.judges.axbench import Ratings, steering_score

    g, texts = torch.Generator().manual_seed(0), steered(0, instructions=10, concepts=("sea",))
    gaps, tops = [], []
    for _ in range(40):
        values = {f: torch.randint(3, (10, 3), generator=g).float() for f in range(40)}
        rated = {f: Ratings(v, (("", "", ""),) * 10) for f, v in values.items()}
        mean = torch.stack([r.overall for r in rated.values()]).mean().item()
        score = steering_score(rated, texts)
        gaps.append(score.overall.value - mean)
        tops.append(rated[score.factor].overall.mean().item() - mean)
    assert abs(sum(gaps) / 40) < 0.15 < sum(tops) / 40


def test_unread_ratings_are_counted_and_left_out():
    from reftlens.experiments.judges.axbench import Ratings, _halves, rate, steering_score

    replies = iter(["none", *["Rating: [[2]]"] * 47])
    rated = rate(lambda question: next(replies), steered(0))
    assert rated.failures == 1 and rated.overall.isnan().sum() == 1
    assert steering_score({1.0: rated}, steered(0)).failures == 1
    silent = rate(lambda question: "none", steered(0))
    with pytest.raises(ValueError, match="no text of the half to choose on has all three ratings"):
        steering_score({1.0: silent}, steered(0))
    half = Ratings(torch.full((16, 3), 2.0), (("", "", ""),) * 16)
    half.values[_halves(steered(0), 0)[1], 0] = float("nan")
    with pytest.raises(ValueError, match="no text of the half to report has all three ratings at factor 1, the best"):
        steering_score({1.0: half}, steered(0))
    with pytest.raises(ValueError, match=r"ratings of {1.0: 16} texts, expected 2"):
        steering_score({1.0: rated}, steered(0)[:2])
    with pytest.raises(ValueError, match="concept 'sea' has one instruction"):
        steering_score({1.0: rate(known, steered(1, 1))}, steered(1, 1))
