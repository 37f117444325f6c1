"""The share of emoji in a text counts what a reader sees."""

import pytest

SHARES = {
    "": 0.0,
    "  \n": 0.0,
    "plain words, 1 # *": 0.0,
    "🍰": 1.0,
    "🍰 ok": 1 / 3,
    "❤ ★": 1 / 2,  # a heart may be an emoji, a star sign is none
    "❤\ufe0e": 0.0,  # text is asked for
    "© ™ →": 0.0,
    "©\ufe0f": 1.0,  # an emoji is asked for
    "↔\ufe0f!": 1 / 2,
    "👍🏽": 1.0,  # with a skin tone, one
    "👩\u200d👩\u200d👧 x": 1 / 2,  # three people joined, one
    "🇩🇪🇫🇷": 1.0,
    "🇩": 0.0,  # half a flag
    "1\ufe0f\u20e3 1": 1 / 2,  # a keycap and a digit
    "🏴\U000e0067\U000e0062\U000e007f": 1.0,  # a flag spelt with tags
    "🍰\ufffd": 1 / 2,
}


@pytest.mark.parametrize("text", SHARES, ids=ascii)
def test_the_share_of_emoji_counts_what_a_reader_sees(text):
    from reftlens.tasks.emoji import emoji_share

    assert emoji_share(text) == pytest.approx(SHARES[text])
